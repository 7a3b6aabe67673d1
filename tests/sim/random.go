package sim

import (
	"math/rand/v2"
	"sync"
	"time"
)

// random is one stream of choices. Every concern has its own, derived from the seed,
// so that more choices of one do not shift those of another.
type random struct {
	mu sync.Mutex
	r  *rand.Rand
}

func newRandom(seed, stream uint64) *random {
	return &random{r: rand.New(rand.NewPCG(seed, stream*0x9e3779b97f4a7c15+1))}
}

// n is uniform in [0, n).
func (r *random) n(n int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.r.IntN(n)
}

func (r *random) u64() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.r.Uint64()
}

// chance is true with probability p.
func (r *random) chance(p float64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.r.Float64() < p
}

// between is uniform in [a, b).
func (r *random) between(a, b time.Duration) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return a + time.Duration(r.r.Int64N(int64(b-a)))
}

// exp is exponential with the given mean, cut at ten times of it.
func (r *random) exp(mean time.Duration) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return min(time.Duration(r.r.ExpFloat64()*float64(mean)), 10*mean)
}
