package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

type clusterPage struct {
	version1
	Name         string       `json:"name"`
	UUID         string       `json:"uuid"`
	Created      *time.Time   `json:"created,omitempty"`
	Target       string       `json:"target"`
	Portals      []portalView `json:"portals"`
	Leader       string       `json:"leader"`
	Quorum       bool         `json:"quorum"`
	Voters       uint32       `json:"voters"`
	FeatureLevel uint32       `json:"feature_level"`
	Discovery    string       `json:"discovery_auth"`
	DiscoverUser string       `json:"discovery_user,omitempty"`
	DiscoverBack string       `json:"discovery_mutual_user,omitempty"`

	LevelKnown   uint32  `json:"feature_level_known"`
	QuorumMode   string  `json:"quorum_mode"`
	Preferred    string  `json:"preferred_node,omitempty"`
	Balance      bool    `json:"balance"`
	BalanceAfter float64 `json:"balance_after_seconds"`
	ResyncRate   uint32  `json:"resync_mib_per_second"` // 0: no bound
}

// newClusterPage shows what is known of a cluster.
func newClusterPage(i *v1.ClusterInfo) *clusterPage {
	return &clusterPage{v1Header, i.Name, i.Uuid, moment(api.Time(i.Created)), i.Target,
		views(i.Portals, func(p *v1.Portal) portalView { return portalView{p.Address, p.Node, p.Group} }),
		i.Leader, i.Quorum, i.Voters, i.FeatureLevel,
		api.Word(i.Discovery, "DISCOVERY_MODE_"), i.DiscoveryUser, i.DiscoveryMutualUser,
		i.LevelKnown, api.Word(i.QuorumMode, "QUORUM_MODE_"), i.PreferredNode, i.Balance, i.BalanceAfter.AsDuration().Seconds(), i.ResyncMibPerSecond}
}

type portalView struct {
	Address string `json:"address"`
	Node    string `json:"node"`
	Group   uint32 `json:"group"`
}

func (c *clusterPage) text(p *printer) {
	quorum := "no"
	if c.Quorum {
		quorum = "yes"
	}
	p.facts("cluster", c.Name, "uuid", c.UUID, "created", since(c.Created), "target", c.Target, "quorum", quorum, "leader", c.Leader,
		"voters", fmt.Sprint(c.Voters), "who votes", quorumWords(c.QuorumMode, c.Preferred), "balance", balanceWords(c.Balance, c.BalanceAfter), "resync rate", resyncWords(c.ResyncRate),
		"feature level", levelWords(c.FeatureLevel, c.LevelKnown),
		"discovery", discoveryWords(c.Discovery, c.DiscoverUser, c.DiscoverBack))
	p.line("")
	rows := [][]string{}
	for _, x := range c.Portals {
		rows = append(rows, []string{x.Address, x.Node, fmt.Sprint(x.Group)})
	}
	p.table("PORTAL NODE GROUP", rows)
}

type tokenPage struct {
	version1
	Token     string     `json:"token"`
	Role      string     `json:"role"`
	Expires   *time.Time `json:"expires"`
	Addresses []string   `json:"addresses"`
}

func (t *tokenPage) text(p *printer) {
	where := "ADDRESS"
	if len(t.Addresses) > 0 {
		where = t.Addresses[0]
	}
	rest := "--devices DISK,... --sync IP --iscsi IP"
	if t.Role == "witness" {
		rest = "--witness --sync IP"
	}
	p.line("This token lets one %s node join, once, until %s:", t.Role, since(t.Expires))
	p.line("  sudo twinsan join %s --token %s %s", where, t.Token, rest)
}

type certificatePage struct {
	version1
	Name      string     `json:"name"`
	Directory string     `json:"directory"`
	Expires   *time.Time `json:"expires"`
}

func (c *certificatePage) text(p *printer) {
	p.line("certificate of administrator %s in %s, until %s", c.Name, c.Directory, since(c.Expires))
}

func (a *app) clusterCommand() *cobra.Command {
	show := &cobra.Command{
		Use: "show", Short: "Show the identity of the cluster and its portals", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				i, err := client.Cluster.GetCluster(ctx, &v1.GetClusterRequest{})
				if err != nil {
					return err
				}
				a.next("twinsan status")
				return a.print(newClusterPage(i))
			})
		},
	}
	var witness bool
	var ttl time.Duration
	create := &cobra.Command{
		Use: "create", Short: "Make a token with which one node may join", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			role := v1.Role_ROLE_DATA
			if witness {
				role = v1.Role_ROLE_WITNESS
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				t, err := client.Cluster.CreateToken(ctx, &v1.CreateTokenRequest{Role: role, Ttl: durationpb.New(ttl)})
				if err != nil {
					return err
				}
				a.next("the line above, on the machine that joins")
				return a.print(&tokenPage{v1Header, t.Token, api.Word(t.Role, "ROLE_"), moment(api.Time(t.Expires)), words(t.Addresses)})
			})
		},
	}
	create.Flags().BoolVar(&witness, "witness", false, "for a witness")
	create.Flags().DurationVar(&ttl, "ttl", 15*time.Minute, "how long the token is good")
	return noun("cluster", "The cluster as a whole", nil, show, a.clusterSet(), noun("token", "Join tokens", nil, create), a.adminCertificate(), a.clusterRecover())
}

func (a *app) adminCertificate() *cobra.Command {
	var dir, name string
	c := &cobra.Command{
		Use: "admin-cert", Short: "Make a certificate for administration over the network",
		Long: `Make a certificate with which --api HOST:PORT works from another machine.
Copy the directory there, to ~/.config/twinsan or where --certs says.`,
		Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			if dir == "" {
				return usage("--out DIR is missing")
			}
			if !server.ValidName(name) {
				return usage("--name %q: want lower case letters, digits and hyphens", name)
			}
			dir, err := filepath.Abs(dir)
			if err != nil {
				return err
			}
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return err
			}
			csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
			if err != nil {
				return err
			}
			keyDER, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				return err
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Cluster.IssueCertificate(ctx, &v1.IssueCertificateRequest{Csr: csr, Name: name})
				if err != nil {
					return err
				}
				if err := os.MkdirAll(dir, 0o700); err != nil {
					return err
				}
				for _, f := range []struct {
					name string
					data []byte
				}{
					{api.AdminKey, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})},
					{api.AdminCertificate, r.CertificatePem},
					{api.AdminCA, r.CaPem},
				} {
					if err := renameio.WriteFile(filepath.Join(dir, f.name), f.data, 0o600); err != nil {
						return err
					}
				}
				address, err := a.apiAddress()
				if err != nil || strings.HasPrefix(address, "unix:") || filepath.IsAbs(address) {
					address = "HOST:" + fmt.Sprint(server.APIPort)
				}
				a.next("twinsan --certs %s --api %s status", dir, address)
				return a.print(&certificatePage{v1Header, name, dir, moment(api.Time(r.Expires))})
			})
		},
	}
	c.Flags().StringVar(&dir, "out", "", "directory to write "+api.AdminCertificate+", "+api.AdminKey+" and "+api.AdminCA+" to")
	c.Flags().StringVar(&name, "name", "admin", "name of the administrator, for the logs")
	return c
}
