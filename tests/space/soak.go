package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/device"
)

// soak fills a pool and then, again and again, has a process of its own overwrite it at
// random and kills that process. What was acknowledged is noted in memory that both
// share, and all of the volume is compared with it after each kill. Meanwhile snapshots
// come, each five seconds, and go, the oldest first, when the pool is as full as asked for.
func soak(args []string) error {
	f := flag.NewFlagSet("soak", flag.ExitOnError)
	dir := f.String("dir", "bin/space", "directory of the pool")
	size := f.Int64("mib", 2048, "size of the pool")
	fill := f.Int("fill", 95, "percent of the usable size")
	length := f.Duration("time", 30*time.Minute, "of the whole run")
	each := f.Duration("kill", time.Minute, "time between kills")
	_ = f.Parse(args)
	path := filepath.Join(*dir, "soak")
	_ = os.Remove(path + ".notes") // of a run that was ended from outside
	if err := makePool(path, *size<<20, 0); err != nil {
		return err
	}
	defer os.Remove(path)
	defer os.Remove(path + ".notes")
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var first, last life
	begin := time.Now()
	for round := 0; round == 0 || time.Since(begin) < *length; round++ {
		c := exec.Command(self, "soaked", "-path", path, "-fill", strconv.Itoa(*fill), "-seed", strconv.Itoa(round))
		c.Stderr = os.Stderr
		out, err := c.StdoutPipe()
		if err != nil {
			return err
		}
		if err := c.Start(); err != nil {
			return err
		}
		var died bool
		killer := time.AfterFunc(24*time.Hour, func() { died = true; _ = c.Process.Kill() })
		var l life
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			text := lines.Text()
			switch {
			case strings.HasPrefix(text, "{"):
				if err := json.Unmarshal([]byte(text), &l); err != nil {
					return err
				}
			case text == "serving":
				killer.Reset(*each)
			default:
				fmt.Println(text)
			}
		}
		err = c.Wait()
		killer.Stop()
		if !died {
			return fmt.Errorf("round %d: the process ended by itself: %w", round, err)
		}
		fmt.Printf("round %d: %.0f writes/s, worst %.0f ms, amplification %.2f, %d MiB resident, %d goroutines, %d refused, %d snapshots taken and %d there\n", round, l.Ops, l.Worst, l.Amp, l.Resident>>20, l.Goroutines, l.Refused, l.Taken, l.Kept)
		if round == 1 {
			first = l
		}
		last = l
		if l.Resident > residentMax {
			return fmt.Errorf("round %d: %d MiB are resident, there should be %d at most", round, l.Resident>>20, residentMax>>20)
		}
		if l.Refused > 0 {
			return fmt.Errorf("round %d: %d overwrites were refused", round, l.Refused)
		}
	}
	// The last look, without a kill after it.
	if err := exec.Command(self, "soaked", "-path", path, "-fill", strconv.Itoa(*fill), "-look").Run(); err != nil {
		return fmt.Errorf("the last look: %w", err)
	}
	if last.Goroutines > first.Goroutines+device.DefaultReaders+8 { // readers begin when they are needed
		return fmt.Errorf("%d goroutines, %d at the beginning", last.Goroutines, first.Goroutines)
	}
	fmt.Println("soak: nothing was lost, nothing grew")
	return nil
}

// residentMax is what the pool's budgets (openPool) come to, and what a process takes besides.
const residentMax = (16+128+8)<<20 + 64<<20

// life is what the killed process says of itself each second: operations and waits are of that second, the
// rest is of its whole life.
type life struct {
	Ops        float64
	Worst      float64
	Amp        float64
	Resident   int64
	Goroutines int
	Refused    int
	Taken      int // snapshots
	Kept       int
}

// notes are the versions of each block that were sent and acknowledged, in a file that is
// mapped: they outlive the process, not the machine, which is not what is tested.
type notes struct{ sent, acked []uint32 }

func openNotes(path string, blocks uint64) (*notes, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(int64(blocks * 8)); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(blocks*8), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	all := unsafe.Slice((*uint32)(unsafe.Pointer(unsafe.SliceData(mem))), blocks*2)
	return &notes{sent: all[:blocks], acked: all[blocks:]}, nil
}

// soaked is the process that is killed.
func soaked(args []string) error {
	f := flag.NewFlagSet("soaked", flag.ExitOnError)
	path := f.String("path", "", "pool")
	fill := f.Int("fill", 95, "percent")
	seed := f.Uint64("seed", 0, "seed")
	look := f.Bool("look", false, "compare and end")
	_ = f.Parse(args)
	began := time.Now()
	p, err := openPool(*path, 128<<20)
	if err != nil {
		return err
	}
	took := time.Since(began)
	blocks := uint64(p.Room().Size / 4096)
	n, err := openNotes(*path+".notes", blocks)
	if err != nil {
		return err
	}
	if p.volume == nil {
		if p.volume, err = p.CreateVolume(context.Background(), 1, blocks, [16]byte{1}); err != nil {
			return err
		}
	} else {
		err := verify(p.volume, blocks, content, func(no, v uint64) bool { return uint64(n.acked[no]) <= v && v <= uint64(n.sent[no]) })
		if err != nil {
			return err
		}
		if err := inOrder(p, blocks, *seed); err != nil {
			return err
		}
		r, err := p.Check(context.Background())
		if err != nil {
			return err
		}
		if !r.OK() {
			return fmt.Errorf("%d problems: %v", r.Count, r.Problems)
		}
		fmt.Printf("opened in %v, compared and checked in %v\n", took.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
		for no := range n.sent {
			n.sent[no] = max(n.sent[no], n.acked[no]) // what was in flight may be there or not
		}
	}
	if *look {
		return p.Close()
	}
	l := newLoad(p, 32)
	flying := map[uint64]bool{}
	l.ended = func(op *lsfs.Op, err error) {
		delete(flying, uint64(op.Start))
		if err == nil {
			n.acked[op.Start] = n.sent[op.Start]
		}
	}
	write := func(no uint64) {
		if flying[no] {
			return
		}
		flying[no] = true
		n.sent[no]++
		l.write(no, uint64(n.sent[no]))
	}
	used := uint64(0)
	for used < blocks && n.sent[used] > 0 {
		used++
	}
	full := float64(*fill) / 100
	for ; p.fill() < full-snapshotShare; used++ {
		write(used)
	}
	l.wait()
	fmt.Println("serving")
	rng := rand.New(rand.NewPCG(*seed, 4))
	begin, started := p.Stats(), time.Now()
	l.lats = l.lats[:0]
	taken, seconds := 0, 0
	for {
		for range 64 {
			write(rng.Uint64N(used))
		}
		if p.fill() >= full {
			if all := p.Snapshots(1); len(all) > 0 {
				if err := p.DeleteSnapshot(context.Background(), all[0].ID()); err != nil {
					return err
				}
			}
		}
		if took := time.Since(started); took > time.Second {
			now := p.Stats()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			line, err := json.Marshal(life{Ops: float64(len(l.lats)) / took.Seconds(), Worst: ms(l.percentile(1)),
				Amp:      float64(now.LogBytes-begin.LogBytes) / float64(max(now.StoredBytes-begin.StoredBytes, 1)),
				Resident: resident(), Goroutines: runtime.NumGoroutine(), Refused: l.refused,
				Taken: taken, Kept: len(p.Snapshots(1))})
			if err != nil {
				return err
			}
			if seconds++; seconds%snapshotEvery != 0 {
				// not yet
			} else if l.wait(); l.failed == nil {
				l.snapshot(lsfs.VolumeID(*seed<<16+uint64(taken)) + 2)
				taken++
			}
			if l.failed != nil {
				return l.failed
			}
			fmt.Println(string(line))
			started = time.Now()
			l.lats = l.lats[:0]
		}
	}
}

// snapshotEvery is the number of seconds between snapshots.
const snapshotEvery = 5

// snapshotShare is the part of the pool that snapshots have for what is overwritten.
const snapshotShare = 0.05

// inOrder reads some blocks of all snapshots: none may hold a version that is newer than
// that in a younger snapshot or in the volume.
func inOrder(p *pool, blocks, seed uint64) error {
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(seed, 5))
	all := p.Snapshots(1)
	b, want := make([]byte, dedup.BlockSize), make([]byte, dedup.BlockSize)
	for range 2000 {
		no, last := rng.Uint64N(blocks), uint64(0)
		for i := 0; i <= len(all); i++ {
			from, read := "the volume", p.volume.Read
			if i < len(all) {
				from, read = fmt.Sprintf("snapshot %d", all[i].ID()), all[i].Read
			}
			if err := read(ctx, no*dedup.BlockSize, b); err != nil {
				return fmt.Errorf("%s: %w", from, err)
			}
			version := binary.LittleEndian.Uint64(b[8:])
			if dedup.IsZero(b) {
				version = 0
			} else if content(want, no, version); string(want) != string(b) {
				return fmt.Errorf("block %d of %s holds what was never written there", no, from)
			}
			if version < last {
				return fmt.Errorf("block %d has version %d in an older snapshot and %d in %s", no, last, version, from)
			}
			last = version
		}
	}
	return nil
}

// resident is the memory of this process, in bytes.
func resident() int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	var size, pages int64
	_, _ = fmt.Sscan(string(b), &size, &pages)
	return pages * int64(os.Getpagesize())
}
