// Command space measures what a store does when it is nearly full: a pool in a real
// file with direct I/O, overwritten at random without end.
//
//	go run ./tests/space bench              throughput, stalls, write amplification at several fills (make bench-space)
//	go run ./tests/space soak -time 30m     95 % full, killed each minute, verified (make soak)
//	go run ./tests/space open -mapped 1T    how long a pool of that many mapped bytes takes to serve after a kill (make bench-open)
//	go run ./tests/space budget -gib 64     savings and speed with more and less RAM for metadata (make bench-budget)
//	go run ./tests/space large -tib 2       cost per operation and RAM of very large pools (make bench-64t)
//	go run ./tests/space plot IN.json       the pictures of docs/ from what bench saved
package main

import (
	"fmt"
	"os"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: space bench|soak|open|budget|large|plot [flags]")
		os.Exit(2)
	}
	run := map[string]func(args []string) error{"bench": bench, "soak": soak, "soaked": soaked, "open": opened, "budget": budgeted, "large": large, "plot": plot}[os.Args[1]]
	if run == nil {
		fmt.Fprintf(os.Stderr, "space: no such command: %s\n", os.Args[1])
		os.Exit(2)
	}
	if err := run(os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "space:", err)
		os.Exit(1)
	}
}
