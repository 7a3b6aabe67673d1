package iscsi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

// TestSlowReader: who does not take its replies is not read from any more, holds
// bounded memory, does not disturb others, and is closed in the end.
func TestSlowReader(t *testing.T) {
	b := newBench(t, func(c *Config) {
		c.Limits = Limits{Unsent: 1 << 20, WriteTime: 500 * time.Millisecond}
	})
	c := dial(t, b).login("MaxRecvDataSegmentLength=65536")
	_ = c.conn.(*net.TCPConn).SetReadBuffer(4096)
	other := dial(t, b)
	other.isid[5]++
	other.login()
	var sent sync.WaitGroup
	sent.Go(func() { // more than the socket and the limit hold; this blocks, too
		for n := range 4096 {
			p := pdu.SCSICommand{Final: true, Read: true, ITT: uint32(n), Expected: 65536, CDB: read10(0, 128), CmdSN: c.cmdSN + uint32(n)}
			var h pdu.Header
			p.Encode(&h)
			if _, err := c.conn.Write(h[:]); err != nil {
				return
			}
		}
	})
	eventually(t, "a stall", func() bool { return b.Stats().WriteStalls > 0 })
	other.quiet()
	for _, s := range b.Sessions() {
		if s.Unsent > 4<<20 {
			t.Errorf("%d bytes unsent", s.Unsent)
		}
	}
	eventually(t, "the connection to be closed", func() bool {
		n := 0
		for _, s := range b.Sessions() {
			if s.Peer != "" {
				n++
			}
		}
		return n == 1
	})
	_ = c.conn.Close()
	sent.Wait()
	other.quiet()
}

// TestStalledReaderCatchesUp: a reader that was slow for a while gets everything,
// in order, with data sent from task buffers and from the output buffer.
func TestStalledReaderCatchesUp(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login("MaxRecvDataSegmentLength=262144", "FirstBurstLength=65536")
	want := pattern(1<<20, 7)
	c.writeAll(0, want, 65536)
	b.device.cached = false
	var tags []uint32
	for range 24 {
		tags = append(tags, c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 1 << 20, CDB: read10(0, 2048)}, nil))
		tags = append(tags, c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 4096, CDB: read10(0, 8)}, nil))
	}
	eventually(t, "a stall", func() bool { return b.Stats().WriteStalls > 0 })
	for i, itt := range tags {
		got, p := c.collect(itt)
		if p.Status != 0 || !bytes.Equal(got, want[:len(got)]) || len(got) != []int{1 << 20, 4096}[i%2] {
			t.Fatalf("read %d: %d bytes, %+v", i, len(got), p)
		}
	}
	c.quiet()
}

// TestConcurrentCompletions: completions on many goroutines never interleave
// PDUs, repeat or skip a StatSN, or lose a response.
func TestConcurrentCompletions(t *testing.T) {
	b := newBench(t, nil)
	b.device.cached = false
	c := dial(t, b).login("HeaderDigest=CRC32C", "DataDigest=CRC32C", "MaxRecvDataSegmentLength=4096")
	const rounds, depth = 20, 100
	b.device.gate(true)
	stop := make(chan struct{})
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				b.device.mu.Lock()
				var batch = b.device.queue
				if n := len(batch); n > 3 {
					batch = batch[n-3:]
				}
				b.device.queue = b.device.queue[:len(b.device.queue)-len(batch)]
				batch = append(batch[:0:0], batch...)
				b.device.mu.Unlock()
				for _, task := range batch {
					b.device.complete(task)
				}
				b.Flush()
			}
		})
	}
	var next uint32
	for round := range rounds {
		open := make(map[uint32]bool)
		for i := range depth {
			open[c.command(pdu.SCSICommand{Final: true, Read: true, Expected: uint32(testBlock * (i%20 + 1)), CDB: read10(i, i%20+1)}, nil)] = true
		}
		for len(open) > 0 {
			r, err := c.receive()
			if err != nil {
				t.Fatal(err)
			}
			if r.Opcode() != pdu.OpDataIn || !open[r.ITT()] {
				t.Fatalf("% x", r.Header[:])
			}
			if r.Header[1]&1 != 0 {
				if next != 0 && r.StatSN() != next {
					t.Fatalf("round %d: StatSN %d, want %d", round, r.StatSN(), next)
				}
				next = r.StatSN() + 1
				delete(open, r.ITT())
			}
		}
	}
	close(stop)
	workers.Wait()
}

// TestBatch writes batches of bytes and inserts in steps of all sizes.
func TestBatch(t *testing.T) {
	var b batch
	var want []byte
	add := func(n int, insert bool) {
		p := pattern(n, byte(len(want)))
		want = append(want, p...)
		if insert {
			b.insert(p, lease{})
		} else {
			b.append(p)
		}
	}
	for i, n := range []int{0, 5, 48, 1, 0, 70000, 3, 3, 200, 0, 9} {
		add(n, i%2 == 0 || i == 7)
	}
	if b.size != len(want) {
		t.Errorf("size %d, want %d", b.size, len(want))
	}
	for _, step := range []int{1, 2, 3, 7, 48, 1000, 1 << 20} {
		w := writeState{batch: &b}
		w.skipDone()
		var got []byte
		for w.more() {
			n := w.collect()
			var seen []byte
			for _, v := range w.vectors[:n] {
				seen = append(seen, vectorBytes(v)...)
			}
			if len(seen) == 0 {
				t.Fatal("nothing collected")
			}
			seen = seen[:min(step, len(seen))]
			got = append(got, seen...)
			w.consume(len(seen))
		}
		if !bytes.Equal(got, want) {
			t.Errorf("steps of %d: %d bytes differ from %d", step, len(got), len(want))
		}
	}
	b.empty()
	if b.size != 0 || len(b.buf) != 0 || len(b.inserts) != 0 {
		t.Error("not empty")
	}
}

// traffic is a client that sends depth commands with one write and takes their
// answers with one read, without allocating anything itself.
type traffic struct {
	c             *client
	reads, writes []byte // PDUs of equal length
	answer        []byte
}

const trafficDepth = 32

func newTraffic(c *client) *traffic {
	tr := &traffic{c: c, answer: make([]byte, trafficDepth*(pdu.HeaderLen+4096+2*pdu.DigestLen))}
	block := pattern(4096, 1)
	for range trafficDepth {
		var h pdu.Header
		(&pdu.SCSICommand{Final: true, Read: true, Expected: 4096, CDB: read10(0, 8)}).Encode(&h)
		tr.reads = append(tr.reads, encode(c.layout, &h, nil, nil)...)
		(&pdu.SCSICommand{Final: true, Write: true, Expected: 4096, CDB: write10(0, 8)}).Encode(&h)
		tr.writes = append(tr.writes, encode(c.layout, &h, nil, block)...)
	}
	return tr
}

// round numbers and sends all commands and reads as many answers with dataLen
// bytes of data.
func (tr *traffic) round(tb testing.TB, pdus []byte, dataLen int) {
	c := tr.c
	step := len(pdus) / trafficDepth
	for i := range trafficDepth {
		raw := pdus[i*step:]
		h := (*pdu.Header)(raw)
		n := h.DataLen()
		var p pdu.SCSICommand
		p.Decode(h)
		p.ITT, p.CmdSN = c.cmdSN, c.cmdSN
		p.Encode(h)
		h.SetDataLen(n)
		if c.layout.HeaderDigest {
			pdu.PutDigest(raw[pdu.HeaderLen:], pdu.Digest(h[:]))
		}
		c.cmdSN++
	}
	if _, err := c.conn.Write(pdus); err != nil {
		tb.Fatal(err)
	}
	size := pdu.HeaderLen + dataLen + c.layout.Tail(dataLen)
	if c.layout.HeaderDigest {
		size += pdu.DigestLen
	}
	if _, err := io.ReadFull(c.conn, tr.answer[:trafficDepth*size]); err != nil {
		tb.Fatal(err)
	}
}

// quieten puts a device server in place that allocates nothing.
func (b *bench) quieten() *quietDevice {
	b.device.state = nil // its bookkeeping allocates
	quiet := &quietDevice{b.device}
	b.Target.device = quiet
	return quiet
}

func (b *bench) unquieten() {
	b.device.state = map[*scsiTask]string{}
	b.Target.device = b.device
}

var withDigests = []string{"HeaderDigest=CRC32C", "DataDigest=CRC32C"}

// TestNoAllocation: the steady state of reads and writes allocates nothing, with
// digests as without.
func TestNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for name, keys := range map[string][]string{"plain": nil, "digests": withDigests} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, nil)
			c := dial(t, b).login(keys...)
			tr := newTraffic(c)
			measure := func(name string, f func()) {
				for range 20 {
					f()
				}
				if n := testing.AllocsPerRun(50, f); n >= 1 {
					t.Errorf("%s: %v allocations for %d commands", name, n, trafficDepth)
				}
			}
			quiet := b.quieten()
			defer b.unquieten()
			measure("cached reads", func() { tr.round(t, tr.reads, 4096) })
			measure("writes", func() { tr.round(t, tr.writes, 0) })
			quiet.cached = false
			measure("reads that are executed", func() { tr.round(t, tr.reads, 4096) })
		})
	}
}

// BenchmarkDigests shows what CRC32C costs per 4 KiB command, client included.
func BenchmarkDigests(b *testing.B) {
	for name, keys := range map[string][]string{"plain": nil, "digests": withDigests} {
		for _, write := range []bool{false, true} {
			kind := map[bool]string{false: "read", true: "write"}[write]
			b.Run(kind+"/"+name, func(b *testing.B) {
				bench := newBench(b, nil)
				c := dial(b, bench).login(keys...)
				if err := c.conn.SetDeadline(time.Time{}); err != nil {
					b.Fatal(err)
				}
				tr := newTraffic(c)
				bench.quieten()
				defer bench.unquieten()
				b.ReportAllocs()
				b.SetBytes(4096)
				for n := 0; b.Loop(); n++ {
					if n%trafficDepth != 0 {
						continue // one round counts for all its commands
					}
					if write {
						tr.round(b, tr.writes, 0)
					} else {
						tr.round(b, tr.reads, 4096)
					}
				}
			})
		}
	}
}

// BenchmarkSessions shows that a command costs the same whatever the number of
// sessions beside it.
func BenchmarkSessions(b *testing.B) {
	for _, n := range []int{0, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			bench := newBench(b, func(c *Config) {
				c.Limits = Limits{Sessions: 2000, SessionsPerInitiator: 2000, ConnectionsPerAddress: 2000}
			})
			for i := range n {
				c := dial(b, bench)
				binary.BigEndian.PutUint16(c.isid[4:], uint16(i+100))
				c.login()
			}
			c := dial(b, bench).login()
			if err := c.conn.SetDeadline(time.Time{}); err != nil {
				b.Fatal(err)
			}
			tr := newTraffic(c)
			bench.quieten()
			defer bench.unquieten()
			for n := 0; b.Loop(); n++ {
				if n%trafficDepth == 0 {
					tr.round(b, tr.reads, 4096)
				}
			}
		})
	}
}
