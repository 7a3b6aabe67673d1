package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type hostsPage struct {
	version1
	Hosts []hostView `json:"hosts"`
}

func (h *hostsPage) text(p *printer) {
	rows := [][]string{}
	for _, v := range h.Hosts {
		rows = append(rows, []string{v.Name, list(v.Initiators), authWord(v), list(v.Volumes), list(v.Paths)})
	}
	p.table("HOST INITIATORS AUTH VOLUMES PATHS", rows)
}

func authWord(h hostView) string {
	switch {
	case h.MutualUser != "":
		return "mutual CHAP"
	case h.CHAPUser != "":
		return "CHAP"
	}
	return "none"
}

type hostPage struct {
	version1
	Host hostView `json:"host"`
	// The secrets are shown once, when this program made them.
	CHAPSecret   string `json:"chap_secret,omitempty"`
	MutualSecret string `json:"mutual_secret,omitempty"`
}

func (h *hostPage) text(p *printer) {
	p.facts("host", h.Host.Name, "initiators", list(h.Host.Initiators), "auth", authWord(h.Host),
		"CHAP user", h.Host.CHAPUser, "CHAP secret", h.CHAPSecret, "target's user", h.Host.MutualUser, "target's secret", h.MutualSecret,
		"volumes", list(h.Host.Volumes), "logged in to", list(h.Host.Paths))
	if h.CHAPSecret != "" {
		p.line("The secrets are shown this one time.")
	}
}

func (a *app) hostCommand() *cobra.Command {
	return noun("host", "Hosts: named sets of initiators", nil, a.hostAdd(), a.hostList(), a.hostRemove())
}

func (a *app) hostAdd() *cobra.Command {
	var chap, mutual, secretsIn bool
	c := &cobra.Command{
		Use: "add NAME INITIATOR...", Short: "Add a host by its initiator names (iqn., eui. or naa.)",
		Long: `Add a host by its initiator names.

--chap makes a secret with which the host proves itself, --mutual also one with
which the target proves itself to the host; both are shown once. With
--secrets-stdin the secrets are read from standard input, one on each line.`,
		Example: "  twinsan host add hv1 iqn.1991-05.com.microsoft:hv1.corp.local --chap",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) < 2 {
				return arguments("NAME", "INITIATOR")(c, args)
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			request := &v1.AddHostRequest{Name: args[0], Initiators: args[1:]}
			page := &hostPage{version1: v1Header}
			if secretsIn && !chap && !mutual {
				return usage("--secrets-stdin needs --chap or --mutual")
			}
			secret := a.secrets(secretsIn)
			if chap || mutual {
				var err error
				request.ChapUser = args[1]
				if request.ChapSecret, page.CHAPSecret, err = secret(); err != nil {
					return err
				}
			}
			if mutual {
				var err error
				request.MutualUser = "twinsan"
				if request.MutualSecret, page.MutualSecret, err = secret(); err != nil {
					return err
				}
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				h, err := client.Hosts.AddHost(ctx, request)
				if err != nil {
					return err
				}
				page.Host = viewHost(h)
				a.next("twinsan volume create NAME SIZE --host %s", h.Name)
				return a.print(page)
			})
		},
	}
	c.Flags().BoolVar(&chap, "chap", false, "authenticate the host by CHAP")
	c.Flags().BoolVar(&mutual, "mutual", false, "authenticate host and target by CHAP")
	c.Flags().BoolVar(&secretsIn, "secrets-stdin", false, "read the secrets instead of making them")
	return c
}

// secrets returns a source of CHAP secrets: lines of standard input, or new ones,
// which have to be shown (shown is empty for what was read).
func (a *app) secrets(read bool) func() (secret, shown string, err error) {
	lines := bufio.NewReader(io.LimitReader(a.in, 4096))
	return func() (string, string, error) {
		if !read {
			made := rand.Text()[:16]
			return made, made, nil
		}
		line, err := lines.ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return "", "", err
		}
		line = strings.TrimRight(line, "\r\n")
		if len(line) < 12 || len(line) > 255 {
			return "", "", usage("a CHAP secret has 12 to 255 bytes; 12 to 16 work with Windows")
		}
		return line, "", nil
	}
}

func (a *app) hostList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the hosts and where they are logged in", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Hosts.ListHosts(ctx, &v1.ListHostsRequest{})
				if err != nil {
					return err
				}
				if len(r.Hosts) == 0 {
					a.next("twinsan host add NAME INITIATOR")
				} else {
					a.next("twinsan session list")
				}
				return a.print(&hostsPage{v1Header, views(r.Hosts, viewHost)})
			})
		},
	}
}

type removedPage struct {
	version1
	Host    hostView `json:"host"`
	Removed bool     `json:"removed"`
}

func (r *removedPage) text(p *printer) {
	if r.Removed {
		p.line("host %s is removed", r.Host.Name)
	}
}

func (a *app) hostRemove() *cobra.Command {
	var k confirmation
	var inUse bool
	c := &cobra.Command{
		Use: "remove NAME", Aliases: []string{"rm"}, Short: "Remove a host and end its sessions", Args: arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Hosts.RemoveHost(ctx, &v1.RemoveHostRequest{Name: args[0], DryRun: true, InUse: inUse})
				if err != nil {
					return err
				}
				h := viewHost(r.Host)
				effect := fmt.Sprintf("Host %s loses its volumes (%s); the volumes and their data stay.", h.Name, orNone(list(h.Volumes)))
				if len(h.Paths) > 0 {
					effect += "\n  in use: it is logged in to " + list(h.Paths)
				}
				if k.dryRun {
					fmt.Fprintln(a.err, effect)
					return a.print(&removedPage{v1Header, h, false})
				}
				if err := a.confirm(k, effect); err != nil {
					return err
				}
				again, cancel := context.WithTimeout(c.Context(), a.timeout)
				defer cancel()
				if r, err = client.Hosts.RemoveHost(again, &v1.RemoveHostRequest{Name: args[0], InUse: inUse}); err != nil {
					return err
				}
				a.next("twinsan host list")
				return a.print(&removedPage{v1Header, viewHost(r.Host), true})
			})
		},
	}
	k.flags(c)
	c.Flags().BoolVar(&inUse, "in-use", false, "remove although the host is logged in")
	return c
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
