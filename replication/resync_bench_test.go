package replication

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/tests/lab"
)

// resyncCase is a row of BenchmarkResync.
type resyncCase struct {
	name    string
	outage  bool
	entropy int // of 4096 bytes so many are random, the rest zeros
	writers int // initiators that write 4 KiB anywhere meanwhile
	single  int // blocks that are rewritten in the outage, one by one; 0: all of the volume
	// What bounds the resync, but not what is before it; 0: this machine.
	line  int64         // of the cable between the nodes, bytes a second
	trip  time.Duration // of a byte there and one back
	disk  int64         // of the disk of each node, bytes a second
	flush time.Duration // of these
}

// Of a cable's bits a second Ethernet, IP and TCP leave 0.94 for what they carry.
const (
	gigabit = 118 << 20 // bytes a second
	two5    = 295 << 20
)

var resyncCases = []resyncCase{
	{name: "new-replica", entropy: 4096}, {name: "new-replica-half", entropy: 2048}, {name: "outage", outage: true, entropy: 4096},
	{name: "outage-single-blocks", outage: true, entropy: 4096, single: 16 << 10}, {name: "beside-writes", entropy: 4096, writers: 4},
	{name: "line-1G", outage: true, entropy: 4096, line: gigabit},
	{name: "line-1G-1ms", outage: true, entropy: 4096, line: gigabit, trip: time.Millisecond},
	{name: "line-1G-10ms", outage: true, entropy: 4096, line: gigabit, trip: 10 * time.Millisecond},
	{name: "line-2.5G", outage: true, entropy: 4096, line: two5},
	{name: "line-2.5G-1ms", outage: true, entropy: 4096, line: two5, trip: time.Millisecond},
	{name: "line-2.5G-10ms", outage: true, entropy: 4096, line: two5, trip: 10 * time.Millisecond},
	{name: "disk-100M", outage: true, entropy: 4096, disk: 100 << 20, flush: time.Millisecond},
	{name: "disk-200M", outage: true, entropy: 4096, disk: 200 << 20, flush: time.Millisecond},
}

// BenchmarkResync fills a replica over TLS, two nodes in one process with their pools in
// files, and nobody else works. It reports the rate beside what the disk gives (the
// same bytes read from one file and written to another at the same time, past the page cache)
// and what the link gives (the same bytes through TLS, thrown away), measured around
// it, and the processor time of both nodes together. Where the link or the disks are bounded, so are
// these; what a bounded disk gives is writing in order, with a flush for each 8 MiB. Segments are
// those of a large pool. TWINSAN_BENCH_DIR says where the pools are.
func BenchmarkResync(b *testing.B) {
	for _, c := range resyncCases {
		b.Run(c.name, func(b *testing.B) {
			const volume = 512 << 20
			dir := os.Getenv("TWINSAN_BENCH_DIR")
			if dir == "" {
				dir = b.TempDir()
			}
			b.SetBytes(volume)
			var took, cpu time.Duration
			var moved, wrote, disk, link float64
			for range b.N {
				b.StopTimer()
				line := &lab.Line{}
				line.Set(c.line, c.trip/2)
				d, err := c.diskLimit(dir, volume)
				if err != nil {
					b.Fatal(err)
				}
				k, err := lab.LinkLimit(volume, line, Records)
				if err != nil {
					b.Fatal(err)
				}
				disk, link = disk+d.MiBps, link+k.MiBps
				b.Logf("disk: %s; link: %s", d, k)
				line.Set(0, 0)
				l := newBench(b)
				l.timing, l.tls = Timing{}, mutual(b)
				if c.line > 0 {
					// Requests of a node and their answers run over the connection that it dials.
					l.wire = func(from NodeID, conn net.Conn) net.Conn {
						if from == 1 {
							conn = line.Put(conn)
						}
						return conn
					}
				}
				done := make(chan string, 10)
				l.told = func(id NodeID, code, text string) {
					if id == 1 && code == "resync-done" {
						done <- text
					}
				}
				at := []string{"", filepath.Join(dir, "one"), filepath.Join(dir, "two")}
				for _, path := range at[1:] {
					os.Remove(path)
					if err := lsfs.Format(b.Context(), lsfs.FormatConfig{Devices: []string{path}, Sizes: []int64{3 * volume}, SegmentBytes: 16 << 20}); err != nil {
						b.Fatal(err)
					}
				}
				disks := [3]*devicetest.Paced{}
				config := func(id NodeID) lsfs.Config {
					return lsfs.Config{Devices: at[id : id+1], OpenDevice: func(path string) (device.Device, error) {
						d, err := device.Open(path, device.Options{})
						if err != nil || c.disk == 0 {
							return d, err
						}
						disks[id] = devicetest.Pace(d)
						return disks[id], nil
					}}
				}
				a := l.startWith(1, config(1))
				l.create(volume, 1)
				if c.single > 0 {
					fillVolume(b, a, volume, c.entropy)
				}
				if c.outage {
					n := l.startWith(2, config(2))
					<-done
					l.inSync(1, 2)
					l.stop(2, n)
					l.inSync(1)
				}
				if c.single > 0 {
					writeSingle(b, a, volume, c.single)
				} else {
					fillVolume(b, a, volume, c.entropy)
				}
				eventually(b, "nobody works", func() bool { return !a.throttle.working(a.now()) })
				load := startWriters(b, a, volume, c.writers)
				stop := profile(b, c.name)
				before, sent := lab.OwnCPU(), a.Resyncs().SentBytes
				b.StartTimer()
				load.turn()
				line.Set(c.line, c.trip/2)
				if c.disk > 0 {
					disks[1].Set(c.disk, c.flush)
				}
				n := l.startWith(2, config(2))
				if c.disk > 0 {
					disks[2].Set(c.disk, c.flush)
				}
				text := <-done
				b.StopTimer()
				load.stop()
				cpu += lab.OwnCPU() - before
				stop()
				moved += float64(a.Resyncs().SentBytes - sent)
				if c.disk > 0 {
					wrote += float64(disks[2].Wrote())
				}
				t, err := time.ParseDuration(text[strings.LastIndex(text, " ")+1:])
				if err != nil {
					b.Fatal(err)
				}
				took += t
				st := n.store.Stats()
				b.Logf("%s; the replica committed %d times in %s, of that flushed for %s", text, count(st.CommitMicros),
					time.Duration(st.CommitMicros.Sum)*time.Microsecond, time.Duration(st.FlushMicros.Sum)*time.Microsecond)
				line.Set(0, 0)
				l.stop(2, n)
				l.stop(1, a)
			}
			n := float64(b.N)
			rate := moved / (1 << 20) / took.Seconds()
			b.ReportMetric(rate, "MiB/s")
			b.ReportMetric(n*volume/(1<<20)/took.Seconds(), "volume-MiB/s")
			b.ReportMetric(disk/n, "disk-MiB/s")
			b.ReportMetric(link/n, "link-MiB/s")
			b.ReportMetric(100*rate/(min(disk, link)/n), "%-of-lesser")
			b.ReportMetric(cpu.Seconds()/(moved/(1<<30)), "cpu-s/GiB")
			if c.single == 0 {
				b.ReportMetric(moved/(n*volume), "moved/changed")
			}
			if c.disk > 0 {
				b.ReportMetric(wrote/moved, "written/moved")
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// diskLimit is what the disks of a row give.
func (c *resyncCase) diskLimit(dir string, size int64) (lab.Rate, error) {
	if c.disk == 0 {
		return lab.DiskLimit(dir, size)
	}
	path := filepath.Join(dir, "limit")
	f, err := os.Create(path)
	if err != nil {
		return lab.Rate{}, err
	}
	defer os.Remove(path)
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return lab.Rate{}, err
	}
	d, err := device.Open(path, device.Options{})
	if err != nil {
		return lab.Rate{}, err
	}
	defer d.Close()
	paced := devicetest.Pace(d)
	paced.Set(c.disk, c.flush)
	const each = 1 << 20
	data := device.AlignedBuffer(each)
	defer device.FreeAligned(data)
	rand.Read(data)
	cpu, start := lab.OwnCPU(), time.Now()
	for off := int64(0); off < size; off += each {
		if err := paced.WriteAt(data, off); err != nil {
			return lab.Rate{}, err
		}
		if (off+each)%copyFlush == 0 {
			if err := paced.Flush(); err != nil {
				return lab.Rate{}, err
			}
		}
	}
	gib := float64(size) / (1 << 30)
	return lab.Rate{MiBps: 1024 * gib / time.Since(start).Seconds(), CPUSeconds: (lab.OwnCPU() - cpu).Seconds() / gib}, nil
}

// copyFlush is about how much a replica has written of a resync when it flushes (Y9).
const copyFlush = 8 << 20

// fillVolume writes new content to all of volume 1.
func fillVolume(b testing.TB, n *testNode, volume, entropy int) {
	b.Helper()
	const piece = 1 << 20
	var group sync.WaitGroup
	for worker := range 4 {
		group.Go(func() {
			data := make([]byte, piece)
			for off := worker * piece; off < volume; off += 4 * piece {
				for at := 0; at < piece; at += blockSize {
					rand.Read(data[at : at+entropy])
				}
				if err := n.do(&Request{Op: OpWrite, Off: uint64(off), Len: piece, Data: data}); err != nil {
					b.Errorf("write at %d: %v", off, err)
					return
				}
			}
		})
	}
	group.Wait()
}

// writeSingle writes new content to so many blocks anywhere in volume 1.
func writeSingle(b *testing.B, n *testNode, volume, blocks int) {
	b.Helper()
	const under = 32
	var group sync.WaitGroup
	for range under {
		group.Go(func() {
			data := make([]byte, blockSize)
			for range blocks / under {
				rand.Read(data)
				if err := n.do(&Request{Op: OpWrite, Off: binary.LittleEndian.Uint64(data) % uint64(volume) / blockSize * blockSize, Len: blockSize, Data: data}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
}

func count(h lsfs.Histogram) (n uint64) {
	for _, c := range h.Counts {
		n += c
	}
	return n
}

// foreLoad is initiators that write 4 KiB anywhere, one write under way each.
type foreLoad struct {
	b       *testing.B
	idle    bool
	quit    chan struct{}
	group   sync.WaitGroup
	filling atomic.Bool
	mu      sync.Mutex
	took    [2][]time.Duration // without a resync, and beside it
}

func startWriters(b *testing.B, n *testNode, volume, count int) *foreLoad {
	w := &foreLoad{b: b, quit: make(chan struct{}), idle: count == 0}
	for range count {
		w.group.Go(func() {
			data := make([]byte, blockSize)
			for {
				select {
				case <-w.quit:
					return
				default:
				}
				rand.Read(data)
				at := time.Now()
				if err := n.do(&Request{Op: OpWrite, Off: binary.LittleEndian.Uint64(data) % uint64(volume) / blockSize * blockSize, Len: blockSize, Data: data}); err != nil {
					b.Error(err)
					return
				}
				kind := 0
				if w.filling.Load() {
					kind = 1
				}
				w.mu.Lock()
				w.took[kind] = append(w.took[kind], time.Since(at))
				w.mu.Unlock()
			}
		})
	}
	return w
}

// turn ends the time without a resync: until the writes took ten seconds together.
func (w *foreLoad) turn() {
	if !w.idle {
		eventually(w.b, "some writes without a resync", func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			total := time.Duration(0)
			for _, d := range w.took[0] {
				total += d
			}
			return total > 10*time.Second
		})
	}
	w.filling.Store(true)
}

func (w *foreLoad) stop() {
	close(w.quit)
	w.group.Wait()
	for kind, name := range []string{"without a resync", "beside it"} {
		if all := w.took[kind]; len(all) > 0 {
			slices.Sort(all)
			w.b.Logf("%s: %d writes, p50 %s p99 %s", name, len(all), all[len(all)/2], all[len(all)*99/100])
		}
	}
}

// profile writes a profile of the resync alone where TWINSAN_BENCH_PROFILE says, and
// goes on until the returned function is called.
func profile(b *testing.B, name string) func() {
	dir := os.Getenv("TWINSAN_BENCH_PROFILE")
	if dir == "" {
		return func() {}
	}
	f, err := os.Create(filepath.Join(dir, "resync-"+name+".pprof"))
	if err == nil {
		err = pprof.StartCPUProfile(f)
	}
	if err != nil {
		b.Fatal(err)
	}
	return func() { pprof.StopCPUProfile(); f.Close() }
}
