package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/server"
)

type storePage struct {
	version1
	Clean    bool     `json:"clean"`
	Devices  []string `json:"devices"`
	Volumes  int      `json:"volumes"`
	Blocks   uint64   `json:"blocks"`
	Mapped   uint64   `json:"mapped_bytes"`
	Problems []string `json:"problems"` // the first hundred
	Count    int      `json:"problem_count"`
}

func (s *storePage) text(p *printer) {
	p.facts("devices", list(s.Devices), "volumes", fmt.Sprint(s.Volumes), "stored blocks", fmt.Sprint(s.Blocks), "mapped", p.size(s.Mapped))
	for _, x := range s.Problems {
		p.line("! %s", x)
	}
	if s.Clean {
		p.line("the store is clean: every checksum and every reference count is right")
	} else {
		p.line("the store is DAMAGED: %d problems", s.Count)
	}
}

func (a *app) storeCommand() *cobra.Command {
	check := &cobra.Command{
		Use: "check", Short: "Verify every checksum and reference count of this node's stopped store",
		Long: `Verify every checksum and reference count of this node's store, offline: the
node must be stopped. Nothing is changed. Exit code 0: clean; 1: damaged.`,
		Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := server.LoadConfig(a.configPath())
			if err != nil {
				return err
			}
			r, err := server.CheckStore(c.Context(), config)
			if err != nil {
				return err
			}
			page := &storePage{v1Header, r.Count == 0, words(r.Devices), r.Volumes, r.Blocks, r.Mapped, words(r.Problems), r.Count}
			if err := a.print(page); err != nil {
				return err
			}
			if page.Clean {
				a.next("systemctl start twinsan")
				return nil
			}
			a.next("keep the devices as they are, and rebuild this node from the others")
			return &failure{exitFailed, nil}
		},
	}
	return noun("store", "The store of this node, offline", nil, check)
}
