package replication

import (
	"crypto/rand"
	"encoding/binary"
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
	"github.com/twinsan/twinsan/tests/lab"
)

// BenchmarkResync fills a replica over TLS, two nodes in one process with their pools in
// files, and nobody else works. It reports the rate beside what the disk gives (the
// same bytes read from one file and written to another at the same time, past the page cache)
// and what the link gives (the same bytes through TLS, thrown away), measured around
// it, and the processor time of both nodes together. Segments are those of a large pool. TWINSAN_BENCH_DIR says where the pools are.
func BenchmarkResync(b *testing.B) {
	for _, c := range []struct {
		name    string
		outage  bool
		entropy int // of 4096 bytes so many are random, the rest zeros
		writers int // initiators that write 4 KiB anywhere meanwhile
		single  int // blocks that are rewritten in the outage, one by one; 0: all of the volume
	}{{"new-replica", false, 4096, 0, 0}, {"new-replica-half", false, 2048, 0, 0}, {"outage", true, 4096, 0, 0},
		{"outage-single-blocks", true, 4096, 0, 16 << 10}, {"beside-writes", false, 4096, 4, 0}} {
		b.Run(c.name, func(b *testing.B) {
			const volume = 512 << 20
			dir := os.Getenv("TWINSAN_BENCH_DIR")
			if dir == "" {
				dir = b.TempDir()
			}
			b.SetBytes(volume)
			var took, cpu time.Duration
			var moved, disk, link float64
			for range b.N {
				b.StopTimer()
				d, err := lab.DiskLimit(dir, volume)
				if err != nil {
					b.Fatal(err)
				}
				k, err := lab.LinkLimit(volume, Records)
				if err != nil {
					b.Fatal(err)
				}
				disk, link = disk+d.MiBps, link+k.MiBps
				b.Logf("disk: %s; link: %s", d, k)
				l := newBench(b)
				l.timing, l.tls = Timing{}, mutual(b)
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
				a := l.startWith(1, lsfs.Config{Devices: at[1:2]})
				l.create(volume, 1)
				if c.single > 0 {
					fillVolume(b, a, volume, c.entropy)
				}
				if c.outage {
					n := l.startWith(2, lsfs.Config{Devices: at[2:]})
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
				n := l.startWith(2, lsfs.Config{Devices: at[2:]})
				text := <-done
				b.StopTimer()
				load.stop()
				cpu += lab.OwnCPU() - before
				stop()
				moved += float64(a.Resyncs().SentBytes - sent)
				t, err := time.ParseDuration(text[strings.LastIndex(text, " ")+1:])
				if err != nil {
					b.Fatal(err)
				}
				took += t
				st := n.store.Stats()
				b.Logf("%s; the replica committed %d times in %s, of that flushed for %s", text, count(st.CommitMicros),
					time.Duration(st.CommitMicros.Sum)*time.Microsecond, time.Duration(st.FlushMicros.Sum)*time.Microsecond)
				l.stop(2, n)
				l.stop(1, a)
			}
			n := float64(b.N)
			b.ReportMetric(moved/(1<<20)/took.Seconds(), "MiB/s")
			b.ReportMetric(n*volume/(1<<20)/took.Seconds(), "volume-MiB/s")
			b.ReportMetric(disk/n, "disk-MiB/s")
			b.ReportMetric(link/n, "link-MiB/s")
			b.ReportMetric(cpu.Seconds()/(moved/(1<<30)), "cpu-s/GiB")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// fillVolume writes new content to all of volume 1.
func fillVolume(b *testing.B, n *testNode, volume, entropy int) {
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
