//go:build mutants

package replication

var mutantOn string

// SetMutant switches one rule off; "" none. Before any Node is made. It exists only
// with the build tag mutants.
func SetMutant(name string) { mutantOn = name }

func mutant(name string) bool { return name == mutantOn }
