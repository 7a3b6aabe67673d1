//go:build !simruntime

package sim

// runtimeSeed does nothing: with the usual runtime, the order of goroutines is not
// drawn from the seed, and a seed reproduces most of a run but not all.
func runtimeSeed(uint64) {}

const deterministic = false
