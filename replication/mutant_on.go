//go:build mutants

package replication

import (
	"slices"
	"strings"
)

var mutantsOn []string

// SetMutant switches rules off, joined by "+"; "" none. Before any Node is made. It
// exists only with the build tag mutants.
func SetMutant(names string) { mutantsOn = strings.Split(names, "+") }

func mutant(name string) bool { return slices.Contains(mutantsOn, name) }
