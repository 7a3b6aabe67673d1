//go:build mutants

package sim

import (
	"slices"
	"strings"

	"github.com/twinsan/twinsan/replication"
)

var mutantsOn []string

func mutant(name string) bool { return slices.Contains(mutantsOn, name) }

// setMutant switches rules off, joined by "+".
func setMutant(names string) error {
	mutantsOn = strings.Split(names, "+")
	replication.SetMutant(names)
	return nil
}
