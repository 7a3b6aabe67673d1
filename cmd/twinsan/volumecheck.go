package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type checkPage struct {
	version1
	Volume  string       `json:"volume"`
	Equal   bool         `json:"equal"`
	Digests []digestView `json:"digests"`
}

type digestView struct {
	Node      string   `json:"node"`
	Digest    string   `json:"digest"`
	Different []uint32 `json:"different_chunks,omitempty"`
	Error     string   `json:"error,omitempty"`
	Snapshots []string `json:"different_snapshots,omitempty"`
}

func (c *checkPage) text(p *printer) {
	rows := [][]string{}
	for _, d := range c.Digests {
		problem := d.Error
		if len(d.Different) > 0 {
			problem = fmt.Sprintf("differs, first in MiB %d", d.Different[0])
		}
		if len(d.Snapshots) > 0 {
			problem = "snapshots differ: " + d.Snapshots[0]
		}
		rows = append(rows, []string{d.Node, d.Digest, problem})
	}
	p.table("REPLICA DIGEST PROBLEM", rows)
	if c.Equal {
		p.line("volume %s: all replicas hold the same content and the same snapshots", c.Volume)
	} else {
		p.line("volume %s: the replicas are NOT proved equal", c.Volume)
	}
}

func (a *app) volumeCheck() *cobra.Command {
	var limit time.Duration
	c := &cobra.Command{
		Use: "check NAME", Short: "Compare the content of all replicas by digest, snapshots too",
		Long: "Compare the content of all replicas by digest. Exit code 0: equal; 1: not equal; 3: some replica could not be asked.",
		Args: arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), limit)
			defer cancel()
			return a.stream(ctx, func(ctx context.Context, client *api.Client) error {
				r, err := client.Volumes.CheckVolume(ctx, &v1.CheckVolumeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				page := &checkPage{v1Header, args[0], r.Equal, views(r.Digests, func(d *v1.ReplicaDigest) digestView {
					return digestView{d.Node, hex.EncodeToString(d.Digest), d.DifferentChunks, d.Error, d.DifferentSnapshots}
				})}
				if err := a.print(page); err != nil {
					return err
				}
				if r.Equal {
					return nil
				}
				a.next("twinsan status")
				for _, d := range r.Digests {
					if len(d.DifferentChunks)+len(d.DifferentSnapshots) > 0 {
						return &failure{exitFailed, nil}
					}
				}
				return &failure{exitDegraded, nil}
			})
		},
	}
	c.Flags().DurationVar(&limit, "limit", time.Hour, "how long the check may take")
	return c
}
