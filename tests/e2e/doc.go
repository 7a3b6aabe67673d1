// Package e2e tests twinsan from outside: real processes, real initiators, real
// files as disks. Nodes are killed, frozen, filled and fed with garbage while a
// load generator that knows every acknowledged write looks for lost, stale and
// corrupt blocks.
//
// The tests stand behind the build tag e2e and need the tools that
// tests/install.sh installs. "make test" runs them short, "make e2e" at full
// length. Each test has a cluster of its own, and a failed one keeps its
// directory and prints how to repeat it.
package e2e
