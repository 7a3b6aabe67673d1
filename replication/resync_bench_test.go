package replication

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
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

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/lsfs"
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
	}{{"new-replica", false, 4096, 0}, {"new-replica-half", false, 2048, 0}, {"outage", true, 4096, 0}, {"beside-writes", false, 4096, 4}} {
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
				d, k, err := benchLimits(b, dir, volume)
				if err != nil {
					b.Fatal(err)
				}
				disk, link = disk+d, link+k
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
				if c.outage {
					n := l.startWith(2, lsfs.Config{Devices: at[2:]})
					l.inSync(1, 2)
					l.stop(2, n)
					<-done
					l.inSync(1)
				}
				fillVolume(b, a, volume, c.entropy)
				load := startWriters(b, a, volume, c.writers)
				stop := profile(b, c.name)
				before, sent := cpuTime(), a.Resyncs().SentBytes
				b.StartTimer()
				load.turn()
				n := l.startWith(2, lsfs.Config{Devices: at[2:]})
				text := <-done
				b.StopTimer()
				load.stop()
				cpu += cpuTime() - before
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

// benchLimits is what the disk and the link give, in MiB/s.
func benchLimits(b *testing.B, dir string, bytes int) (disk, link float64, err error) {
	const piece = 1 << 20
	var fd [2]int
	for i, name := range []string{"from", "to"} {
		path := filepath.Join(dir, name)
		if fd[i], err = unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT|unix.O_CLOEXEC, 0o600); err != nil {
			return 0, 0, err
		}
		defer os.Remove(path)
		defer unix.Close(fd[i])
		if err := unix.Fallocate(fd[i], 0, 0, int64(bytes)); err != nil {
			return 0, 0, err
		}
	}
	page := func() []byte {
		p, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			b.Fatal(err)
		}
		rand.Read(p)
		b.Cleanup(func() { unix.Munmap(p) })
		return p
	}
	in, out := page(), page()
	for _, f := range fd {
		for off := 0; off < bytes; off += piece {
			if _, err := unix.Pwrite(f, out, int64(off)); err != nil {
				return 0, 0, err
			}
		}
		if err := unix.Fdatasync(f); err != nil {
			return 0, 0, err
		}
	}
	start, before := time.Now(), cpuTime()
	var group sync.WaitGroup
	errs := make([]error, 2)
	group.Go(func() {
		for off := 0; off < bytes && errs[0] == nil; off += piece {
			_, errs[0] = unix.Pread(fd[0], in, int64(off))
		}
	})
	group.Go(func() {
		for off := 0; off < bytes && errs[1] == nil; off += piece {
			_, errs[1] = unix.Pwrite(fd[1], out, int64(off))
		}
		errs[1] = errors.Join(errs[1], unix.Fdatasync(fd[1]))
	})
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return 0, 0, err
	}
	disk = float64(bytes) / (1 << 20) / time.Since(start).Seconds()
	b.Logf("disk: %.2f processor seconds for each GiB", (cpuTime()-before).Seconds()/(float64(bytes)/(1<<30)))
	before = cpuTime()

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, 0, err
	}
	defer ln.Close()
	conf := mutual(b)
	start = time.Now()
	group.Go(func() {
		c, err := ln.Accept()
		if err != nil {
			errs[0] = err
			return
		}
		t := tls.Server(Records(c), conf)
		_, errs[0] = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{io.LimitReader(t, int64(bytes))}, make([]byte, piece))
		t.Close()
	})
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		return 0, 0, err
	}
	t := tls.Client(Records(c), conf)
	for off := 0; off < bytes; off += piece {
		if _, err := t.Write(out); err != nil {
			return 0, 0, err
		}
	}
	group.Wait()
	t.Close()
	b.Logf("link: %.2f processor seconds for each GiB", (cpuTime()-before).Seconds()/(float64(bytes)/(1<<30)))
	return disk, float64(bytes) / (1 << 20) / time.Since(start).Seconds(), errs[0]
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

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
