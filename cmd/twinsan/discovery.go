package main

import (
	"context"
	"slices"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

var discoveryModes = []string{"host", "none", "chap"}

type discoveryPage struct {
	version1
	Mode       string `json:"discovery_auth"`
	User       string `json:"discovery_user,omitempty"`
	MutualUser string `json:"discovery_mutual_user,omitempty"`
	// The secrets are shown once, when this program made them.
	Secret       string `json:"chap_secret,omitempty"`
	MutualSecret string `json:"mutual_secret,omitempty"`
}

func (d *discoveryPage) text(p *printer) {
	p.facts("discovery", discoveryWords(d.Mode, d.User, d.MutualUser), "CHAP secret", d.Secret, "target's secret", d.MutualSecret)
	if d.Secret != "" {
		p.line("The secrets are shown this one time.")
	}
}

// discoveryWords says how initiators prove themselves for discovery.
func discoveryWords(mode, user, mutual string) string {
	switch {
	case mode == "host":
		return "as for a login: by the credentials of the host"
	case mode == "none":
		return "without authentication"
	case mode == "chap" && mutual != "":
		return "mutual CHAP as user " + user + "; the target is " + mutual
	case mode == "chap":
		return "CHAP as user " + user
	}
	return mode
}

func (a *app) clusterSet() *cobra.Command {
	var user string
	var mutual, secretsIn bool
	c := &cobra.Command{
		Use: "discovery-auth host|none|chap", Short: "Say how initiators prove themselves before they are told the portals",
		Long: `Say how initiators prove themselves before they are told the portals:

  host   as for a login: by the CHAP credentials of the host, if it has any
  none   not at all; what they are told is the name of the target and its addresses
  chap   by one user and secret for all; with --mutual the target proves itself too

In every mode only initiators of known hosts are answered (or all, when some
volume admits any initiator). Secrets are made and shown once; with
--secrets-stdin they are read from standard input, one on each line. They have
12 characters or more, and the target's differs from every initiator's.`,
		Example: "  twinsan cluster set discovery-auth chap --user portal",
		Args:    arguments("MODE"),
		RunE: func(c *cobra.Command, args []string) error {
			if !slices.Contains(discoveryModes, args[0]) {
				return usage("discovery-auth %s: want host, none or chap", args[0])
			}
			chap := args[0] == "chap"
			for _, flag := range []string{"user", "mutual", "secrets-stdin"} {
				if !chap && c.Flags().Changed(flag) {
					return usage("--%s is for discovery-auth chap, and %s was asked for", flag, args[0])
				}
			}
			if chap && user == "" {
				return usage("--user is empty: name the user that initiators give")
			}
			r := &v1.SetDiscoveryRequest{Mode: map[string]v1.DiscoveryMode{
				"host": v1.DiscoveryMode_DISCOVERY_MODE_HOST, "none": v1.DiscoveryMode_DISCOVERY_MODE_NONE, "chap": v1.DiscoveryMode_DISCOVERY_MODE_CHAP,
			}[args[0]]}
			page := &discoveryPage{version1: v1Header}
			if chap {
				secret := a.secrets(secretsIn)
				var err error
				r.ChapUser = user
				if r.ChapSecret, page.Secret, err = secret(); err != nil {
					return err
				}
				if mutual {
					r.MutualUser = "twinsan"
					if r.MutualSecret, page.MutualSecret, err = secret(); err != nil {
						return err
					}
				}
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				i, err := client.Cluster.SetDiscovery(ctx, r)
				if err != nil {
					return err
				}
				page.Mode, page.User, page.MutualUser = api.Word(i.Discovery, "DISCOVERY_MODE_"), i.DiscoveryUser, i.DiscoveryMutualUser
				a.next("twinsan connect VOLUME HOST")
				return a.print(page)
			})
		},
	}
	c.Flags().StringVar(&user, "user", "discovery", "CHAP user that initiators give")
	c.Flags().BoolVar(&mutual, "mutual", false, "the target proves itself as well")
	c.Flags().BoolVar(&secretsIn, "secrets-stdin", false, "read the secrets instead of making them")
	return noun("set", "Settings of the whole cluster", nil, c, a.setBalance(), a.setQuorum(), a.setResyncRate())
}
