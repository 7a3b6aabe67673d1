// Command twinsan is the whole of a twinsan node and its administration: the
// daemon ("twinsan serve"), every command that asks or changes a cluster through
// the API, and a demonstration cluster on one machine ("twinsan demo").
//
// Each noun has a file. A command asks the API, makes a page (view.go) and
// prints it, as a table for people or as versioned JSON for scripts (page.go).
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	a := &app{in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.Getenv, terminal: stdinIsTerminal}
	code := a.run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}
