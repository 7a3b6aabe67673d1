//go:build invariants

package cluster

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// StoreFaultEnv names the variable that lets raft's store fail, in binaries with the
// tag "invariants": when it is set, every write of log, vote or snapshot fails while
// there is a file "fault" in the directory of raft's store.
const StoreFaultEnv = "TWINSAN_RAFT_FAULT"

func init() {
	if os.Getenv(StoreFaultEnv) == "" {
		return
	}
	injectedFault = func(dir string) func(string) error {
		return func(what string) error {
			if _, err := os.Stat(filepath.Join(dir, "fault")); err == nil && strings.HasPrefix(what, "write") {
				return errors.New("injected: input/output error")
			}
			return nil
		}
	}
}
