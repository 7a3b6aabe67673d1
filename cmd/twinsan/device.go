package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type devicesPage struct {
	version1
	Devices     []deviceView      `json:"devices"`
	Unreachable []unreachableView `json:"unreachable"`
}

func (d *devicesPage) text(p *printer) {
	rows := [][]string{}
	for _, v := range d.Devices {
		io := "direct"
		if !v.DirectIO {
			io = "buffered"
		}
		rows = append(rows, []string{v.Node, v.Path, p.size(v.Size), v.State, io, fmt.Sprint(v.Errors), v.UUID})
	}
	p.table("NODE DEVICE SIZE STATE I/O ERRORS UUID", rows)
	unreachableLines(p, d.Unreachable)
}

func unreachableLines(p *printer, nodes []unreachableView) {
	for _, u := range nodes {
		p.line("! node %s does not answer: %s", u.Node, u.Error)
	}
}

// partly is the exit of a list from which nodes are missing.
func partly(missing []unreachableView) error {
	if len(missing) > 0 {
		return &failure{exitDegraded, nil}
	}
	return nil
}

func (a *app) deviceCommand() *cobra.Command {
	var node string
	listing := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the devices of the pools", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Devices.ListDevices(ctx, &v1.ListDevicesRequest{Node: node})
				if err != nil {
					return err
				}
				page := &devicesPage{v1Header, views(r.Devices, viewDevice), views(r.Unreachable, viewUnreachable)}
				if err := a.print(page); err != nil {
					return err
				}
				a.next("twinsan status")
				return partly(page.Unreachable)
			})
		},
	}
	listing.Flags().StringVar(&node, "node", "", "only this node")
	return noun("device", "Disks of the nodes' pools", nil, listing)
}
