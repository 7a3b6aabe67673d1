//go:build !mutants

package replication

// mutant says whether a rule is switched off, for the proof that the simulator would
// notice (make mutants). Here it never is, and the compiler drops what depends on it.
func mutant(string) bool { return false }
