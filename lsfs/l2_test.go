package lsfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
)

// flashed is a rig with a second level on a disk of its own.
func flashed(tb testing.TB, seed uint64, flash *devicetest.Disk) *rig {
	r := newRig(tb, seed, 64<<20)
	r.withFlash(flash)
	return r
}

func (r *rig) withFlash(flash *devicetest.Disk) {
	r.cfg.L2, r.cfg.L2Rate, r.cfg.ReadAhead = "flash", 1<<40, -1
	r.cfg.OpenL2 = func(string) (device.Device, error) {
		flash.Reopen()
		return flash, nil
	}
}

// fill writes n blocks, numbered from first on.
func fill(c *client, v VolumeID, seq *Seq, n int, content func(i uint64) []byte) {
	for i := 0; i < n; i += 64 {
		var data []byte
		for k := i; k < min(i+64, n); k++ {
			data = append(data, content(uint64(k))...)
		}
		*seq++
		c.must(c.write(v, *seq, BlockNo(i), data))
	}
}

// mustRead reads n blocks one by one and compares them.
func mustRead(tb testing.TB, v *Volume, n int, content func(i uint64) []byte) {
	tb.Helper()
	buf := make([]byte, dedup.BlockSize)
	for i := range n {
		if err := v.Read(context.Background(), uint64(i)*dedup.BlockSize, buf); err != nil {
			tb.Fatal(err)
		}
		if !bytes.Equal(buf, content(uint64(i))) {
			tb.Fatalf("block %d: other content", i)
		}
	}
}

// readUntilFlashed reads a set that the RAM cannot hold until flash serves most of it.
func readUntilFlashed(tb testing.TB, s *Store, v *Volume, n int, content func(i uint64) []byte) {
	tb.Helper()
	for round := 0; ; round++ {
		was := s.Stats().L2
		mustRead(tb, v, n, content)
		st := s.Stats().L2
		if st.Hits-was.Hits > int64(n)/2 {
			return
		}
		if round == 30 {
			tb.Fatalf("after %d rounds flash serves little: %+v", round, st)
		}
	}
}

var patterns sync.Map

// known is pattern, remembered.
func known(n uint64) []byte {
	if b, ok := patterns.Load(n); ok {
		return b.([]byte)
	}
	b := pattern(n)
	patterns.Store(n, b)
	return b
}

const flashedBlocks = 1000 // the RAM of a rig holds 250

// TestL2 reads what RAM cannot hold: flash serves it, also after a restart.
func TestL2(t *testing.T) {
	flash := devicetest.New(99, 32<<20)
	r := flashed(t, 1, flash)
	s := r.start()
	v := mustCreate(t, s, 1, flashedBlocks)
	var seq Seq
	fill(newClient(t, s), 1, &seq, flashedBlocks, known)
	readUntilFlashed(t, s, v, flashedBlocks, known)
	st := s.Stats()
	if st.L2.Failure != nil || st.L2.Stale > 0 || st.L2.Written == 0 {
		t.Errorf("%+v", st.L2)
	}
	mustCheck(t, s)
	mustClose(t, s)

	s = r.start()
	until(t, "warm", func() bool { return s.Stats().L2.Warm })
	mustRead(t, s.Volume(1), flashedBlocks, known)
	if st := s.Stats().L2; st.Hits < flashedBlocks/2 {
		t.Errorf("after a restart: %+v", st)
	}
	mustClose(t, s)
}

// TestL2BlockIdentities: a new pool with the same id hands the same identities out for
// other blocks. The flash of the old one has nothing wrong to say.
func TestL2BlockIdentities(t *testing.T) {
	flash := devicetest.New(99, 32<<20)
	r := flashed(t, 1, flash)
	s := r.start()
	v := mustCreate(t, s, 1, flashedBlocks)
	var seq Seq
	fill(newClient(t, s), 1, &seq, flashedBlocks, known)
	readUntilFlashed(t, s, v, flashedBlocks, known)
	mustClose(t, s)

	other := func(i uint64) []byte {
		if i%3 == 0 {
			return known(i) // some are equal, and may be found
		}
		return known(i + 1<<32)
	}
	r = flashed(t, 2, flash)
	s = r.start()
	v = mustCreate(t, s, 1, flashedBlocks)
	seq = 0
	fill(newClient(t, s), 1, &seq, flashedBlocks, other)
	until(t, "warm", func() bool { return s.Stats().L2.Warm })
	for range 3 {
		mustRead(t, v, flashedBlocks, other)
	}
	// Within one pool: overwritten blocks are read anew.
	fill(newClient(t, s), 1, &seq, flashedBlocks, known)
	for range 3 {
		mustRead(t, v, flashedBlocks, known)
	}
	mustClose(t, s)
}

// TestL2Corrupt: rot on flash is never served, and costs a read of the pool.
func TestL2Corrupt(t *testing.T) {
	flash := devicetest.New(99, 32<<20)
	r := flashed(t, 1, flash)
	corrupt := 0
	r.cfg.Event = func(e Event) {
		if e.Code == "corrupt" {
			corrupt++
		}
	}
	s := r.start()
	v := mustCreate(t, s, 1, flashedBlocks)
	var seq Seq
	fill(newClient(t, s), 1, &seq, flashedBlocks, known)
	readUntilFlashed(t, s, v, flashedBlocks, known)
	rng := testRand(4)
	for range 8000 {
		flash.FlipBit(1<<20+rng.Int64N(31<<20)&^4095, rng.Int64N(4096*8))
	}
	mustRead(t, v, flashedBlocks, known)
	if st := s.Stats().L2; st.Stale == 0 || st.Failure != nil {
		t.Errorf("%+v", st)
	}
	mustClose(t, s)
	if corrupt > 0 {
		t.Errorf("%d events about rot in a cache", corrupt)
	}
}

// TestL2Fails: the pool does not notice that the flash is gone, at whatever moment.
func TestL2Fails(t *testing.T) {
	for _, when := range []string{"open", "format", "warm", "serve", "write"} {
		t.Run(when, func(t *testing.T) {
			flash := devicetest.New(99, 16<<20)
			r := flashed(t, 1, flash)
			var mu sync.Mutex
			var told []Event
			r.cfg.Event = func(e Event) {
				mu.Lock()
				defer mu.Unlock()
				if e.Code == "l2-off" {
					told = append(told, e)
				}
			}
			broken := errors.New("broken")
			switch when {
			case "open":
				r.cfg.OpenL2 = func(string) (device.Device, error) { return nil, broken }
			case "format":
				flash.FailNth(devicetest.Write, 1, broken)
			case "warm":
				flash.FailNth(devicetest.Read, 3, broken)
			}
			s := r.start()
			v := mustCreate(t, s, 1, flashedBlocks)
			var seq Seq
			fill(newClient(t, s), 1, &seq, flashedBlocks, known)
			switch when {
			case "serve", "write":
				readUntilFlashed(t, s, v, flashedBlocks, known)
				kind := devicetest.Read
				if when == "write" {
					kind = devicetest.Write
				}
				flash.FailRange(kind, 0, 1<<40, broken)
			}
			fill(newClient(t, s), 1, &seq, flashedBlocks, func(i uint64) []byte { return known(i + 77) })
			until(t, "off", func() bool {
				mustRead(t, v, flashedBlocks, func(i uint64) []byte { return known(i + 77) })
				return s.Stats().L2.Failure != nil
			})
			mustRead(t, v, flashedBlocks, func(i uint64) []byte { return known(i + 77) })
			mustCheck(t, s)
			mustClose(t, s)
			if len(told) != 1 || !strings.Contains(told[0].Text, "flash") || !errors.Is(told[0].Err, broken) {
				t.Errorf("told %v", told)
			}
		})
	}
}

// versioned is a block that says which write it is of.
func versioned(n uint64) []byte {
	b := make([]byte, dedup.BlockSize)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], n)
	}
	rng := rand.New(rand.NewPCG(n, 1))
	for i := 8; i < 1024; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
	}
	return b
}

// TestReadStable: READ-STABLE with everything on: readers in order and at random, over
// blocks that are overwritten all the time, never see an older version than one of
// them has seen, nor than was written before they asked.
func TestReadStable(t *testing.T) {
	for _, window := range []int64{-1, 0} {
		const blocks, rounds = 512, 30
		r := flashed(t, 3, devicetest.New(99, 16<<20))
		r.cfg.ReadAhead = window
		s := r.start()
		v := mustCreate(t, s, 1, blocks)
		c := newClient(t, s)
		var mu sync.Mutex
		floor := make([]uint64, blocks) // of each block: a version that was seen or acknowledged
		var seq Seq
		round := func(n uint64) {
			for i := uint64(0); i < blocks; i += 64 {
				var data []byte
				for k := i; k < i+64; k++ {
					data = append(data, versioned(n*blocks+k)...)
				}
				seq++
				c.must(c.write(1, seq, BlockNo(i), data))
				mu.Lock()
				for k := i; k < i+64; k++ {
					floor[k] = n
				}
				mu.Unlock()
			}
		}
		round(0)
		stop := make(chan struct{})
		var group sync.WaitGroup
		for w := range 4 {
			group.Go(func() {
				rng := testRand(uint64(w))
				buf := make([]byte, 16*dedup.BlockSize)
				least := make([]uint64, 16)
				for at := uint64(0); ; {
					select {
					case <-stop:
						return
					default:
					}
					n := 1 + rng.Uint64N(16)
					if w%2 == 0 {
						at = rng.Uint64N(blocks)
					}
					if n = min(n, blocks-at); n == 0 {
						at = 0
						continue
					}
					mu.Lock()
					copy(least, floor[at:at+n])
					mu.Unlock()
					p := buf[:n*dedup.BlockSize]
					if !v.TryRead(at*dedup.BlockSize, p) {
						if err := v.Read(context.Background(), at*dedup.BlockSize, p); err != nil {
							t.Error(err)
							return
						}
					}
					mu.Lock()
					for i := range n {
						b := p[i*dedup.BlockSize:][:dedup.BlockSize]
						got := binary.LittleEndian.Uint64(b)
						if got%blocks != at+i || got/blocks < least[i] || !bytes.Equal(b, versioned(got)) {
							t.Errorf("block %d reads as version %d of %d, at least %d was expected", at+i, got/blocks, got%blocks, least[i])
							mu.Unlock()
							return
						}
						floor[at+i] = max(floor[at+i], got/blocks)
					}
					mu.Unlock()
					at += n
				}
			})
		}
		for n := range uint64(rounds) {
			round(n + 1)
		}
		close(stop)
		group.Wait()
		if window == 0 && s.Stats().AheadBlocks == 0 {
			t.Error("nothing was read ahead")
		}
		mustCheck(t, s)
		mustClose(t, s)
	}
}

// TestL2File: a file that does not exist is made, of the size that is asked for, and
// found again; without a size it is told as missing.
func TestL2File(t *testing.T) {
	path := filepath.Join(t.TempDir(), "flash")
	r := newRig(t, 1, 64<<20)
	var told []string
	r.cfg.Event = func(e Event) { told = append(told, e.Code) }
	r.cfg.L2, r.cfg.ReadAhead = path, -1
	s := r.start()
	mustClose(t, s)
	if len(told) != 1 || told[0] != "l2-off" {
		t.Errorf("told %v about a file that is not there", told)
	}
	r.cfg.L2Bytes, r.cfg.L2Rate = 16<<20, 1<<40
	s = r.start()
	v := mustCreate(t, s, 1, flashedBlocks)
	var seq Seq
	fill(newClient(t, s), 1, &seq, flashedBlocks, known)
	readUntilFlashed(t, s, v, flashedBlocks, known)
	mustClose(t, s)
	if fi, err := os.Stat(path); err != nil || fi.Size() != 16<<20 {
		t.Errorf("%v %v", fi, err)
	}
	s = r.start()
	until(t, "warm", func() bool { return s.Stats().L2.Warm })
	if st := s.Stats().L2; st.Blocks < flashedBlocks/4 || st.Failure != nil {
		t.Errorf("after a restart: %+v", st)
	}
	mustClose(t, s)
	if len(told) != 1 {
		t.Errorf("told %v", told)
	}
}
