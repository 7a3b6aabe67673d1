package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/server"
)

type storePage struct {
	version1
	Clean     bool               `json:"clean"`
	Devices   []string           `json:"devices"`
	Volumes   int                `json:"volumes"`
	Blocks    uint64             `json:"blocks"`
	Mapped    uint64             `json:"mapped_bytes"`
	Problems  []storeProblemView `json:"problems"` // the first hundred
	Count     int                `json:"problem_count"`
	Corrected uint64             `json:"counters_corrected"`
}

type storeProblemView struct {
	Kind   string `json:"kind"` // counter, damage or structure
	Text   string `json:"text"`
	Remedy string `json:"do"`
}

func (s *storePage) text(p *printer) {
	p.facts("devices", list(s.Devices), "volumes", fmt.Sprint(s.Volumes), "stored blocks", fmt.Sprint(s.Blocks), "mapped", p.size(s.Mapped))
	if s.Corrected > 0 {
		p.line("%d counters were not what the maps say, and are corrected", s.Corrected)
	}
	last := ""
	for _, x := range s.Problems {
		p.line("! %s", x.Text)
		if x.Remedy != last {
			p.line("    do: %s", x.Remedy)
			last = x.Remedy
		}
	}
	if s.Clean {
		p.line("the store is clean: every checksum, fingerprint and reference count is right")
	} else {
		p.line("the store is NOT clean: %d findings", s.Count)
	}
}

// exitCannot: the check could not be made, which says nothing about the store.
const exitCannot = 2

func (a *app) storeCommand() *cobra.Command {
	var repair bool
	check := &cobra.Command{
		Use: "check [DEVICE...]", Short: "Prove every checksum, fingerprint and reference count of this node's stopped store",
		Long: `Prove every checksum, fingerprint and count of this node's store, offline: the
node must be stopped. Nothing is changed unless --repair-counters says so.
DEVICE... is used instead of the devices in the node's file: all of the pool, in any order.
Exit code 0: clean; 1: something is wrong; 2: the check could not be made.`,
		Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, devices []string) error {
			config, err := server.LoadConfig(a.configPath())
			if err != nil {
				return &failure{exitCannot, err}
			}
			r, err := server.CheckStore(c.Context(), config, devices, repair)
			if err != nil {
				return &failure{exitCannot, err}
			}
			page := &storePage{v1Header, r.Count == 0, words(r.Devices), r.Volumes, r.Blocks, r.Mapped,
				views(r.Problems, func(p server.StoreProblem) storeProblemView { return storeProblemView(p) }), r.Count, r.Corrected}
			if err := a.print(page); err != nil {
				return err
			}
			if page.Clean {
				a.next("systemctl start twinsan")
				return nil
			}
			return &failure{exitFailed, nil}
		},
	}
	check.Flags().BoolVar(&repair, "repair-counters", false, "make reference counts and live bytes what the maps say, before the check")

	o := server.NewDumpOptions()
	var segment int64
	var blocks string
	dump := &cobra.Command{
		Use: "dump [DEVICE...]", Short: "Print what stands on the devices of this node's stopped store",
		Long: `Print superblocks, root and volumes of this node's store for people; more with the
flags. The node must be stopped. Nothing is changed.`,
		Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, devices []string) error {
			if segment >= 0 {
				o.Segment = uint32(segment)
			}
			if blocks != "" {
				if err := parseBlocks(blocks, &o); err != nil {
					return err
				}
			}
			config, err := server.LoadConfig(a.configPath())
			if err != nil {
				return err
			}
			return server.DumpStore(c.Context(), config, devices, o, a.out)
		},
	}
	dump.Flags().BoolVar(&o.Segments, "segments", false, "list the segments that are in use")
	dump.Flags().Int64Var(&segment, "segment", -1, "list the commits of this segment with their records")
	dump.Flags().StringVar(&blocks, "map", "", "print where blocks of a volume stand: VOLUME:START:COUNT, a volume's number and blocks of 4 KiB")
	return noun("store", "The store of this node, offline", nil, check, dump, a.storeForget(), a.storeSalvage(), a.storeRebuild())
}

// parseBlocks reads VOLUME:START:COUNT.
func parseBlocks(s string, o *server.DumpOptions) error {
	var n [3]uint64
	parts := strings.Split(s, ":")
	for i, p := range parts {
		v, err := strconv.ParseUint(p, 10, 64)
		if err != nil || len(parts) != len(n) {
			return usage("--map %s: want VOLUME:START:COUNT", s)
		}
		n[i] = v
	}
	if len(parts) != len(n) || n[0] == 0 || n[2] > 1<<20 {
		return usage("--map %s: want VOLUME:START:COUNT, at most %d blocks", s, 1<<20)
	}
	o.Range(n[0], n[1], n[2])
	return nil
}
