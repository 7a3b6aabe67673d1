package replication

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/tests/lab"
)

var allRates = flag.Bool("resync.rates", false, "all links and disks of TestResyncRate, not two")

// TestResyncRate fills a replica over links and from and to disks of all speeds, in
// virtual time: what processors do takes none, so what is measured is what the protocol
// waits for. Beside it is what one stream gets through the same link, and writing in order
// with a flush for each 8 MiB from the same disk. A resync must get 80 % of the lesser.
func TestResyncRate(t *testing.T) {
	if slowdown > 1 {
		t.Skip("the race detector takes half a minute for each row")
	}
	for i, c := range []resyncCase{
		{name: "1 Gbit/s, 10 ms", line: gigabit, trip: 10 * time.Millisecond},
		{name: "200 MiB/s behind 2.5 Gbit/s, 1 ms", line: two5, trip: time.Millisecond, disk: 200 << 20, flush: time.Millisecond},
		{name: "1 Gbit/s", line: gigabit},
		{name: "2.5 Gbit/s", line: two5},
		{name: "2.5 Gbit/s, 1 ms", line: two5, trip: time.Millisecond},
		{name: "2.5 Gbit/s, 10 ms", line: two5, trip: 10 * time.Millisecond},
		{name: "10 Gbit/s, 1 ms", line: 4 * two5, trip: time.Millisecond},
		{name: "100 MiB/s", disk: 100 << 20, flush: time.Millisecond},
		{name: "200 MiB/s", disk: 200 << 20, flush: time.Millisecond},
		{name: "200 MiB/s, flushes of 10 ms", disk: 200 << 20, flush: 10 * time.Millisecond},
		{name: "1 GiB/s", disk: 1 << 30, flush: 100 * time.Microsecond},
	} {
		if i >= 2 && !*allRates {
			break
		}
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) { c.rate(t, dir) })
		})
	}
}

func (c *resyncCase) rate(t *testing.T, dir string) {
	volume := 256 << 20
	line := &lab.Line{}
	limit := 0.0
	if c.line > 0 {
		line.Set(c.line, c.trip/2)
		limit = streamRate(t, line, int64(volume))
		line.Set(0, 0)
	}
	if c.disk > 0 {
		d, err := c.diskLimit(dir, int64(volume))
		if err != nil {
			t.Fatal(err)
		}
		if limit == 0 || d.MiBps < limit {
			limit = d.MiBps
		}
	}
	b := newBench(t)
	b.timing, b.memory = Timing{}, map[NodeID]*memoryListener{}
	began := time.Now()
	b.clock = func() Instant { return Instant(time.Since(began)) + 1e15 }
	b.wire = func(from NodeID, conn net.Conn) net.Conn {
		if from == 1 {
			conn = line.Put(conn)
		}
		return conn
	}
	done := make(chan string, 10)
	b.told = func(id NodeID, code, text string) {
		if id == 1 && code == "resync-done" {
			done <- text
		}
	}
	var disks [3]*devicetest.Paced
	config := func(id NodeID) lsfs.Config {
		path := filepath.Join(dir, fmt.Sprint(id))
		if err := lsfs.Format(t.Context(), lsfs.FormatConfig{Devices: []string{path}, Sizes: []int64{3 * int64(volume)}, SegmentBytes: 16 << 20}); err != nil {
			t.Fatal(err)
		}
		return lsfs.Config{Devices: []string{path}, OpenDevice: func(path string) (device.Device, error) {
			d, err := device.Open(path, device.Options{})
			if err != nil {
				return d, err
			}
			disks[id] = devicetest.Pace(d)
			return disks[id], nil
		}}
	}
	a := b.startWith(1, config(1))
	b.create(uint64(volume), 1)
	fillVolume(t, a, volume, blockSize)
	eventually(t, "nobody works", func() bool { return !a.throttle.working(a.now()) })
	line.Set(c.line, c.trip/2)
	disks[1].Set(c.disk, c.flush)
	n := b.startWith(2, config(2))
	disks[2].Set(c.disk, c.flush)
	text := <-done
	line.Set(0, 0)
	took, err := time.ParseDuration(text[strings.LastIndex(text, " ")+1:])
	if err != nil {
		t.Fatal(err)
	}
	moved := float64(a.Resyncs().SentBytes)
	rate := moved / (1 << 20) / took.Seconds()
	t.Logf("%.0f of %.0f MiB/s: %.0f %%; moved / changed %.3f", rate, limit, 100*rate/limit, moved/float64(volume))
	if rate < 0.8*limit || moved > 1.01*float64(volume) {
		t.Errorf("a resync moves %.0f MiB at %.0f MiB/s, where %.0f are to be had", moved/(1<<20), rate, limit)
	}
	b.stop(2, n)
	b.stop(1, a)
}

// streamRate is what one stream in one direction gets through a line, in MiB/s.
func streamRate(t *testing.T, line *lab.Line, size int64) float64 {
	here, there := net.Pipe()
	c := line.Put(here)
	failed := make(chan error, 1)
	start := time.Now()
	go func() {
		piece := bytes.Repeat([]byte{1}, 1<<20)
		for off := int64(0); off < size; off += int64(len(piece)) {
			if _, err := c.Write(piece); err != nil {
				failed <- err
				return
			}
		}
		failed <- nil
	}()
	_, err := io.CopyN(io.Discard, there, size)
	took := time.Since(start)
	if err = errors.Join(err, <-failed, c.Close(), there.Close()); err != nil && !errors.Is(err, os.ErrClosed) {
		t.Fatal(err)
	}
	return float64(size) / (1 << 20) / took.Seconds()
}

// memoryListener accepts what is dialled inside of the process.
type memoryListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (m *memoryListener) Accept() (net.Conn, error) {
	select {
	case c := <-m.conns:
		return c, nil
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

func (m *memoryListener) Close() error   { close(m.closed); return nil }
func (m *memoryListener) Addr() net.Addr { return &net.TCPAddr{} }

// dial gives the listener one end of a new connection and returns the other.
func (m *memoryListener) dial() (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case m.conns <- there:
		return here, nil
	case <-m.closed:
		return nil, errors.New("refused")
	}
}
