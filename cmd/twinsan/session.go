package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type sessionsPage struct {
	version1
	Sessions    []sessionView     `json:"sessions"`
	Unreachable []unreachableView `json:"unreachable"`
}

func (s *sessionsPage) text(p *printer) {
	rows := [][]string{}
	for _, v := range s.Sessions {
		rows = append(rows, []string{v.Host, v.Initiator, v.Node, v.Portal, v.Peer, since(v.Since), v.Auth, v.Digests,
			fmt.Sprint(v.Commands), p.size(v.BytesIn), p.size(v.BytesOut)})
	}
	p.table("HOST INITIATOR NODE PORTAL FROM SINCE AUTH DIGESTS COMMANDS IN OUT", rows)
	unreachableLines(p, s.Unreachable)
}

func (a *app) sessionCommand() *cobra.Command {
	listing := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the iSCSI sessions on all nodes", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Sessions.ListSessions(ctx, &v1.ListSessionsRequest{})
				if err != nil {
					return err
				}
				page := &sessionsPage{v1Header, views(r.Sessions, viewSession), views(r.Unreachable, viewUnreachable)}
				if err := a.print(page); err != nil {
					return err
				}
				a.next("twinsan host list")
				return partly(page.Unreachable)
			})
		},
	}
	return noun("session", "iSCSI sessions", nil, listing)
}
