package main

import (
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/server"
)

type networksPage struct {
	version1
	Node       string   `json:"node"`
	Config     string   `json:"config"`
	Changed    bool     `json:"changed"`
	Sync       string   `json:"sync_address"`
	Management string   `json:"management_address"`
	Portals    []string `json:"portals"`
	API        string   `json:"api_address"`
	old        *server.Config
}

func (n *networksPage) text(p *printer) {
	was := func(old, now string) string {
		if old == now {
			return now
		}
		return now + " (was " + old + ")"
	}
	p.facts("node", n.Node, "file", n.Config,
		"sync", was(n.old.Sync.Address, n.Sync), "management", was(n.old.JoinAddress(), n.Management),
		"portals", was(list(n.old.ISCSI.Portals), list(n.Portals)), "api", was(n.old.API.Address, n.API))
}

// nodeSet changes the file of the node that runs here: an address has to be known
// before the node can speak to its cluster, and is told to the others at its start.
func (a *app) nodeSet() *cobra.Command {
	var n server.Networks
	var dry bool
	c := &cobra.Command{
		Use: "set NODE", Short: "Change the addresses of the node on this machine", Args: arguments("NODE"),
		Long: `Change the addresses of the node on this machine, in its file. They take effect when
the node is started again; it tells the others then. Do one node after the other.

--sync is the data path: replication and leases. --management is where nodes agree
and ask each other; "sync" puts it back to the sync address. --iscsi replaces all
portals: hosts that use an old one have to log in to the new one.`,
		Example: "  sudo twinsan node set a --management 10.0.3.11\n  sudo twinsan node set a --iscsi 10.0.2.11,10.0.4.11",
		RunE: func(c *cobra.Command, args []string) error {
			if n.Sync == "" && n.Management == "" && n.API == "" && n.Portals == nil {
				return usage("what is to be changed? --sync, --management, --iscsi or --api-address")
			}
			path := a.configPath()
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			old, err := server.ParseConfig(path, text)
			if err != nil {
				return err
			}
			if old.Name != args[0] {
				return usage("this machine is node %s: run this on node %s", old.Name, args[0])
			}
			changed, now, err := server.SetNetworks(path, text, n)
			if err != nil {
				return err
			}
			for _, address := range append([]string{now.Sync.Address, now.JoinAddress(), now.API.Address}, now.ISCSI.Portals...) {
				if err := mine(address); err != nil {
					return usage("%w", err)
				}
			}
			page := &networksPage{v1Header, now.Name, path, string(changed) != string(text), now.Sync.Address, now.JoinAddress(), words(now.ISCSI.Portals), now.API.Address, old}
			if !dry && page.Changed {
				if err := renameio.WriteFile(path, changed, 0o644); err != nil {
					return err
				}
			}
			if err := a.print(page); err != nil {
				return err
			}
			switch {
			case dry:
				a.next("the same without --dry-run")
			case page.Changed:
				a.next("twinsan node maintenance %s enter; systemctl restart twinsan; twinsan node maintenance %s leave", now.Name, now.Name)
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&n.Sync, "sync", "", "IP[:port] of the data path between nodes")
	f.StringVar(&n.Management, "management", "", "IP[:port] where nodes agree and ask each other, or \"sync\"")
	f.StringVar(&n.API, "api-address", "", "IP[:port] of the API")
	f.StringSliceVar(&n.Portals, "iscsi", nil, "IP[:port] where initiators log in; all of them")
	f.BoolVar(&dry, "dry-run", false, "only show what would change")
	return c
}

// mine refuses an IP address that no interface of this machine has: the node could
// not start with it. A host name is left to the start.
func mine(address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	ip := net.ParseIP(host)
	if ip == nil || ip.IsLoopback() {
		return nil
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	var have []string
	for _, x := range all {
		if n, ok := x.(*net.IPNet); ok {
			if n.IP.Equal(ip) {
				return nil
			}
			if !n.IP.IsLoopback() && !n.IP.IsLinkLocalUnicast() {
				have = append(have, n.IP.String())
			}
		}
	}
	return fmt.Errorf("%s is no address of this machine; it has %s", host, strings.Join(have, ", "))
}
