//go:build mutants

package sim

import "github.com/twinsan/twinsan/replication"

var mutantOn string

func mutant(name string) bool { return name == mutantOn }

func setMutant(name string) error {
	mutantOn = name
	replication.SetMutant(name)
	return nil
}
