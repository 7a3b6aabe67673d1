package dedup

import (
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

func fpOf(n uint64) *Fingerprint {
	rng := rand.New(rand.NewPCG(n, 17))
	var fp Fingerprint
	for i := 0; i < len(fp); i += 8 {
		binary.LittleEndian.PutUint64(fp[i:], rng.Uint64())
	}
	return &fp
}

func newIndex(t testing.TB, bytes int64) *Index {
	t.Helper()
	x, err := NewIndex(bytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := x.Close(); err != nil {
			t.Error(err)
		}
	})
	return x
}

func lookup(x *Index, fp *Fingerprint) (uint64, bool) {
	return x.Lookup(fp, func(uint64) bool { return true })
}

// TestIndexModel: what the index answers was inserted last for that fingerprint
// and not removed; and with room to spare it answers everything.
func TestIndexModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bytes := rapid.SampledFrom([]int64{128, 300, 1024, 1 << 16}).Draw(t, "bytes")
		x, err := NewIndex(bytes)
		if err != nil {
			t.Fatal(err)
		}
		defer x.Close()
		model := map[uint64]uint64{}
		most := 0
		for range rapid.IntRange(0, 300).Draw(t, "steps") {
			n := rapid.Uint64Range(0, 40).Draw(t, "n")
			ref := rapid.Uint64Range(0, 1<<refBits-1).Draw(t, "ref")
			fp := fpOf(n)
			switch rapid.IntRange(0, 3).Draw(t, "kind") {
			case 0, 1:
				x.Insert(fp, ref)
				model[n] = ref
			case 2:
				x.Remove(fp, ref) // another one's
				if want, ok := model[n]; ok && rapid.Bool().Draw(t, "own") {
					x.Remove(fp, want)
					delete(model, n)
				} else if ok && want == ref {
					delete(model, n)
				}
			case 3:
				got, ok := lookup(x, fp)
				want, known := model[n]
				if ok && (!known || got != want) {
					t.Fatalf("fingerprint %d: %d, want %d, %t", n, got, want, known)
				}
				if !ok && known && bytes >= 1<<16 {
					t.Fatalf("fingerprint %d forgotten in an index with room", n)
				}
			}
			most = max(most, len(model))
		}
		st := x.Stats()
		if st.Entries > int64(len(model)) || st.Entries > st.Slots || st.Bytes > max(bytes, 128) {
			t.Fatalf("%+v with %d in the model", st, len(model))
		}
		if st.Forgotten == 0 && x.Len() != len(model) {
			t.Fatalf("nothing forgotten, but %d entries of %d", x.Len(), len(model))
		}
	})
}

// TestIndexLoad: at four fifths of the slots nearly everything is remembered, and
// however much more comes, the table stays full and right.
func TestIndexLoad(t *testing.T) {
	x := newIndex(t, 1<<20)
	slots := uint64(x.Stats().Slots)
	n := slots * 4 / 5
	for i := range n {
		x.Insert(fpOf(i), i)
	}
	lost := 0
	for i := range n {
		if ref, ok := lookup(x, fpOf(i)); !ok {
			lost++
		} else if ref != i {
			t.Fatalf("%d answers %d", i, ref)
		}
	}
	if float64(lost) > 0.05*float64(n) {
		t.Errorf("%d of %d forgotten at 80 %% load", lost, n)
	}
	if st := x.Stats(); st.Entries+int64(st.Forgotten) != int64(n) || int64(lost) != int64(st.Forgotten) {
		t.Errorf("%+v after %d inserts, %d lost", st, n, lost)
	}
	for i := range 4 * slots {
		x.Insert(fpOf(n+i), n+i)
	}
	if st := x.Stats(); st.Entries < st.Slots*99/100 {
		t.Errorf("%+v: a full index is not full", st)
	}
}

// TestIndexKeepsWhatIsFound: entries that lookups find outlive others.
func TestIndexKeepsWhatIsFound(t *testing.T) {
	x := newIndex(t, 1<<16)
	hot := uint64(x.Stats().Slots / 4)
	for i := range hot {
		x.Insert(fpOf(i), i)
	}
	kept := uint64(0)
	for i := range uint64(x.Stats().Slots) * 4 {
		lookup(x, fpOf(i%hot))
		x.Insert(fpOf(1e6+i), i)
	}
	for i := range hot {
		if _, ok := lookup(x, fpOf(i)); ok {
			kept++
		}
	}
	if kept < hot*8/10 {
		t.Errorf("%d of %d entries in use survived a flood", kept, hot)
	}
}

func TestIndexCandidatesAreVerified(t *testing.T) {
	x := newIndex(t, 128)
	a := fpOf(1)
	b := *a
	b[31] ^= 1 // the same set, the same 32 bits
	x.Insert(a, 7)
	var refs [Ways]uint64
	if n := x.Candidates(&b, &refs); n != 1 || refs[0] != 7 {
		t.Fatalf("%d candidates, %v", n, refs)
	}
	if _, ok := x.Lookup(&b, func(ref uint64) bool { return false }); ok {
		t.Error("a candidate that was refused is an answer")
	}
	x.Remove(a, 8)
	if _, ok := lookup(x, a); !ok {
		t.Error("Remove of another reference removed this one")
	}
	x.Remove(a, 7)
	if _, ok := lookup(x, a); ok || x.Len() != 0 {
		t.Error("removed entry is still there")
	}
	x.Insert(a, 1<<refBits)
	if x.Len() != 0 {
		t.Error("a reference of 49 bits was taken")
	}
	x.Insert(a, 1<<refBits-1)
	if ref, ok := lookup(x, a); !ok || ref != 1<<refBits-1 {
		t.Errorf("largest reference: %x, %t", ref, ok)
	}
	zeroTag := *a
	copy(zeroTag[8:12], make([]byte, 4)) // an empty slot's tag
	if x.Candidates(&zeroTag, &refs) != 0 {
		t.Error("an empty slot is a candidate")
	}
	x.Insert(&zeroTag, 3)
	if ref, ok := lookup(x, &zeroTag); !ok || ref != 3 {
		t.Errorf("fingerprint with the tag 0: %d, %t", ref, ok)
	}
}

func TestNewIndexRefuses(t *testing.T) {
	for _, n := range []int64{-1, 0, 127, 1 << 62} {
		if x, err := NewIndex(n); err == nil {
			x.Close()
			t.Errorf("index of %d bytes", n)
		}
	}
}

func TestIndexConcurrent(t *testing.T) {
	x := newIndex(t, 1<<14)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			for range 20000 {
				n := rng.Uint64N(2000)
				fp := fpOf(n)
				// Every reference of n is n modulo 2000, whoever inserted it.
				ref := n + 2000*rng.Uint64N(1000)
				switch rng.IntN(3) {
				case 0:
					x.Insert(fp, ref)
				case 1:
					x.Remove(fp, ref)
				case 2:
					if got, ok := lookup(x, fp); ok && got%2000 != n {
						t.Errorf("fingerprint %d answers a reference of %d", n, got%2000)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

func TestIndexIsOffHeapAndDoesNotAllocate(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	x := newIndex(t, 64<<20)
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 1<<20 {
		t.Errorf("an index of 64 MiB took %d bytes of the Go heap", grown)
	}
	fp := fpOf(1)
	var refs [Ways]uint64
	if n := testing.AllocsPerRun(100, func() {
		x.Insert(fp, 5)
		x.Candidates(fp, &refs)
		x.Remove(fp, 5)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkIndex(b *testing.B) {
	x := newIndex(b, 256<<20) // beyond the processor's caches
	n := uint64(x.Stats().Slots * 4 / 5)
	var fp Fingerprint
	next := func(i uint64) *Fingerprint {
		binary.LittleEndian.PutUint64(fp[:], (i+1)*0x9e3779b97f4a7c15)
		binary.LittleEndian.PutUint32(fp[8:], uint32(i)|1)
		return &fp
	}
	for i := range n {
		x.Insert(next(i), i)
	}
	var refs [Ways]uint64
	rng := rand.New(rand.NewPCG(1, 1))
	b.Run("hit", func(b *testing.B) {
		for b.Loop() {
			x.Candidates(next(rng.Uint64N(n)), &refs)
		}
	})
	b.Run("miss", func(b *testing.B) {
		for b.Loop() {
			x.Candidates(next(n+rng.Uint64N(n)), &refs)
		}
	})
	b.Run("insert", func(b *testing.B) {
		for b.Loop() {
			x.Insert(next(rng.Uint64N(n)), 1)
		}
	})
}
