package lsfs

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
)

// TestIdentityPagesStayDense: overwriting at random many times over leaves at most a
// little over twice as many identity pages as the live entries need; without slots being
// used again there would be nearly five times as many. The count survives a crash.
func TestIdentityPagesStayDense(t *testing.T) {
	r := newRig(t, 1, 48<<20)
	s := r.start()
	const blocks = 24 << 10
	mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	rng := rand.New(rand.NewPCG(1, 7))
	seq, next := Seq(0), uint64(0)
	content := make([]uint64, blocks)
	write := func(start, n uint64) {
		data := make([]byte, 0, n*dedup.BlockSize)
		for i := range n {
			next++
			content[start+i] = next
			data = append(data, tiny(next)...)
		}
		seq++
		c.must(c.write(1, seq, BlockNo(start), data))
	}
	for at := uint64(0); at < blocks; at += 256 {
		write(at, 256)
	}
	worst := 0.0
	rounds := 4
	if testing.Short() {
		rounds = 2
	}
	for i := range uint64(blocks) / 4 * uint64(rounds) {
		write(rng.Uint64N(blocks-4), 4)
		if i%512 == 0 {
			st := s.Stats()
			worst = max(worst, float64(st.IdentityPages*64)/blocks)
		}
		if i == blocks/2 {
			r2 := r.crash(devicetest.CrashOptions{Seed: 1})
			mustClose(t, s)
			r = r2
			s = r.start()
			c = newClient(t, s)
			seq = s.Volume(1).Meta().Durable.Seq
			if s.Stats().IdentityPages*64 > 2*blocks+128*64 {
				t.Fatalf("%d identity pages after a crash", s.Stats().IdentityPages)
			}
		}
	}
	t.Logf("%d blocks overwritten %d times over: at most %.2f slots in pages per identity", blocks, rounds, worst)
	if worst > 2.2 {
		t.Errorf("%.2f slots in pages per identity", worst)
	}
	mustEqualAs(t, s.Volume(1), content, tiny)
	mustCheck(t, s)
	mustClose(t, s)
}

// tiny is small without remembering what it made.
func tiny(n uint64) []byte {
	b := make([]byte, dedup.BlockSize)
	for i := range 8 {
		b[i*512] = byte(n >> (8 * i))
	}
	b[4095] = 1
	return b
}

// TestIdentitiesAreNeverGivenTwice: a slot that is used again has another generation, so
// what is keyed by an identity cannot take one block for another.
func TestIdentitiesAreNeverGivenTwice(t *testing.T) {
	r := newRig(t, 1, 24<<20)
	s := r.start()
	const blocks = 4096
	v := mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	rng := rand.New(rand.NewPCG(1, 8))
	given := map[BID]uint64{}
	reused := 0
	for n := uint64(1); n <= 40000; n += 8 {
		start := rng.Uint64N(blocks - 8)
		var data []byte
		for i := range uint64(8) {
			data = append(data, tiny(n+i)...)
		}
		c.must(c.write(1, Seq(n/8+1), BlockNo(start), data))
		rc, err := s.lease(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		err = v.resolve(context.Background(), rc, start, 8, func(i int, bid BID) bool {
			if was, ok := given[bid]; ok {
				t.Errorf("identity %x of block %d is given again to %d", uint64(bid), was, n+uint64(i))
			}
			given[bid] = n + uint64(i)
			if bid.generation() > 0 {
				reused++
			}
			return true
		})
		s.letGo(rc)
		s.giveBack(rc)
		if err != nil || t.Failed() {
			t.Fatal(err)
		}
	}
	if reused < 1000 {
		t.Errorf("only %d slots were used again: the test shows nothing", reused)
	}
	mustCheck(t, s)
	mustClose(t, s)
}
