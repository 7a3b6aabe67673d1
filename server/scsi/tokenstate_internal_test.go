package scsi

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/twinsan/twinsan/replication"
)

func TestTokensInTheState(t *testing.T) {
	st := &luState{protected: true, identity: []byte("name"), tokens: []*tokenRecord{
		{id: 1<<64 - 1, secret: [32]byte{1, 31: 9}, status: tokenReady, shift: 9, timeout: 600, uses: 1<<32 - 1,
			ranges: []tokenRange{{0, 512}, {replication.AnnexBytes - 4096, 4096}}},
		{id: 2, status: tokenEvicted, shift: 12, timeout: 1, ranges: []tokenRange{{1 << 40, 1 << 30}}},
	}}
	b := st.encode(nil)
	got, err := decodeState(StateID{}, b)
	if err != nil || !reflect.DeepEqual(got, st) {
		t.Fatalf("%v\n got %+v\nwant %+v", err, got, st)
	}
	for _, change := range []func(*tokenRecord){
		func(r *tokenRecord) { r.status = 0 },
		func(r *tokenRecord) { r.status = tokenEvicted + 1 },
		func(r *tokenRecord) { r.shift = 8 },
		func(r *tokenRecord) { r.ranges = nil },
		func(r *tokenRecord) { r.ranges = []tokenRange{{0, 0}} },
		func(r *tokenRecord) { r.ranges = []tokenRange{{replication.AnnexBytes - 512, 1024}} },
		func(r *tokenRecord) { r.ranges = make([]tokenRange, maxTokenRanges+1) },
	} {
		bad := *st.tokens[0]
		change(&bad)
		if _, err := decodeState(StateID{}, (&luState{tokens: []*tokenRecord{&bad}}).encode(nil)); !errors.Is(err, errState) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func FuzzTokensInTheState(f *testing.F) {
	st := &luState{tokens: []*tokenRecord{{id: 1, status: tokenReady, shift: 9, timeout: 60, ranges: []tokenRange{{4096, 512}, {8192, 512}}}}}
	f.Add(st.putTokens(nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var st luState
		if st.getTokens(b) != nil {
			return
		}
		if again := st.putTokens(nil); !bytes.Equal(again, b) {
			t.Fatalf("%x became %x", b, again)
		}
	})
}

// Whatever comes and goes: no two tokens share a block of the annex, each range
// lies to the pages of the map as its source, and all limits hold.
func TestReserveToken(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		st := &luState{}
		for id := range uint64(400) {
			var sources []tokenRange
			for range 1 + rnd.IntN(1+rnd.IntN(maxTokenRanges)) {
				sources = append(sources, tokenRange{rnd.Uint64N(1<<40) &^ 511, (1 + rnd.Uint64N(1<<rnd.IntN(22))) << 9})
			}
			r := &tokenRecord{id: id, status: tokenReady, shift: 9, ranges: sources}
			next, err := st.reserveToken(r, sources)
			if err != nil {
				var refused *refusal
				if !errors.As(err, &refused) {
					t.Fatal(err)
				}
			} else {
				placed := next.token(id)
				for i, src := range sources {
					if p := placed.ranges[i]; p.bytes != src.bytes || (p.off-src.off)%clonePageBytes != 0 {
						t.Fatalf("seed %d: %+v placed at %+v", seed, src, p)
					}
				}
				st = next
			}
			check(t, seed, st)
			for range rnd.IntN(4) {
				if len(st.tokens) == 0 {
					break
				}
				victim := st.tokens[rnd.IntN(len(st.tokens))]
				if rnd.IntN(2) == 0 && !victim.status.ending() {
					st = st.setToken(victim, func(r *tokenRecord) { r.status = tokenSpent })
				} else {
					after := *st
					after.tokens = st.withToken(victim.id, nil)
					st = &after
				}
			}
		}
	}
}

func check(t *testing.T, seed uint64, st *luState) {
	t.Helper()
	live, used := 0, uint64(0)
	type span struct{ start, end uint64 }
	var all []span
	for _, r := range st.tokens {
		if !r.status.ending() {
			live++
		}
		for _, x := range r.ranges {
			start, end := x.cover()
			for _, o := range all {
				if start < o.end && o.start < end {
					t.Fatalf("seed %d: token %d overlaps another", seed, r.id)
				}
			}
			all = append(all, span{start, end})
			used += x.bytes
			if end > replication.AnnexBytes {
				t.Fatalf("seed %d: token %d beyond the annex", seed, r.id)
			}
		}
	}
	if live > maxTokens || len(st.tokens) > maxTokenRecords || used > maxAnnexBytes || len(st.putTokens(nil)) > maxTokenBytes {
		t.Fatalf("seed %d: %d tokens, %d live, %d bytes, %d of state", seed, len(st.tokens), live, used, len(st.putTokens(nil)))
	}
}

// CopiesUnderWay is the number of copy operations that have not ended.
func (s *Server) CopiesUnderWay() int {
	s.copies.mu.Lock()
	defer s.copies.mu.Unlock()
	return s.copies.running
}
