package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/server"
)

// nodeFlags are the flags from which init and join write the file of a node
// that has none yet.
type nodeFlags struct {
	name, data, sync, management, apiAddress, metrics, socket string
	devices, capacity, portals                                []string
	deviceSize                                                server.Size
	wipe                                                      bool
}

func (n *nodeFlags) register(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&n.name, "name", "", "name of this node (default: the host name)")
	f.StringVar(&n.data, "data-dir", "", "directory for certificates and raft (default "+server.DefaultDataDir+")")
	f.StringSliceVar(&n.devices, "devices", nil, "disks of the pool: block devices or files")
	f.StringSliceVar(&n.capacity, "capacity-devices", nil, "more disks, for cold data (of --devices, those that rotate are for that too)")
	f.Var(&n.deviceSize, "device-size", "make devices that are missing files of this size")
	f.StringVar(&n.sync, "sync", "", "IP[:port] of the data path between nodes: replication and leases")
	f.StringVar(&n.management, "management", "", "IP[:port] where nodes agree and ask each other (default: the sync address)")
	f.StringSliceVar(&n.portals, "iscsi", nil, "IP[:port] where initiators log in")
	f.StringVar(&n.apiAddress, "api-address", "", "IP[:port] of the API (default: the management address, port 7443)")
	f.StringVar(&n.socket, "socket", "", "path of the API's unix socket (default "+server.DefaultSocket+")")
	f.StringVar(&n.metrics, "metrics", "", "IP[:port] for Prometheus (default: none)")
	f.BoolVar(&n.wipe, "wipe", false, "format devices although they hold data")
}

// config loads the node's file, or makes one from the flags. Both at once are
// refused: nobody could say which one is meant.
func (a *app) nodeConfig(c *cobra.Command, n *nodeFlags, witness bool) (*server.Config, error) {
	path := a.configPath()
	var given []string
	for _, name := range []string{"name", "data-dir", "devices", "capacity-devices", "device-size", "sync", "management", "iscsi", "api-address", "socket", "metrics"} {
		if c.Flags().Changed(name) {
			given = append(given, "--"+name)
		}
	}
	_, err := os.Stat(path)
	switch {
	case err == nil && len(given) > 0:
		return nil, usage("%s exists: leave out %s, or change the file", path, strings.Join(given, " "))
	case err == nil:
		return server.LoadConfig(path)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	if n.sync == "" && witness {
		n.sync, n.management = n.management, "" // it has no data path
	}
	if n.sync == "" {
		return nil, usage("--sync IP is missing (or write %s first)", path)
	}
	if !witness && (len(n.devices) == 0 || len(n.portals) == 0) {
		return nil, usage("--devices and --iscsi are missing (or write %s first)", path)
	}
	config := server.DefaultConfig()
	config.Name = n.name
	if config.Name == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, err
		}
		config.Name, _, _ = strings.Cut(strings.ToLower(host), ".")
	}
	for _, set := range []struct {
		to   *string
		from string
	}{{&config.DataDir, n.data}, {&config.Management.Address, n.management}, {&config.API.Address, n.apiAddress}, {&config.API.Socket, n.socket}, {&config.Metrics.Address, n.metrics}} {
		if set.from != "" {
			*set.to = set.from
		}
	}
	config.Sync.Address, config.ISCSI.Portals = n.sync, n.portals
	config.Store.Devices, config.Store.CapacityDevices, config.Store.DeviceSize = n.devices, n.capacity, n.deviceSize
	text, err := config.TOML()
	if err != nil {
		return nil, err
	}
	if config, err = server.ParseConfig("the flags", text); err != nil {
		return nil, usage("%w", err)
	}
	// The completed form, so that the file says what runs.
	if text, err = config.TOML(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := renameio.WriteFile(path, text, 0o644); err != nil {
		return nil, err
	}
	fmt.Fprintln(a.err, "wrote", path)
	return config, nil
}

type setupPage struct {
	version1
	Cluster string   `json:"cluster,omitempty"`
	Node    string   `json:"node"`
	Role    string   `json:"role"`
	DataDir string   `json:"data_dir"`
	Devices []string `json:"devices"`
	Config  string   `json:"config"`
	// After init: tokens with which the next nodes join, shown once.
	Join         string     `json:"join_address,omitempty"`
	DataToken    string     `json:"data_token,omitempty"`
	WitnessToken string     `json:"witness_token,omitempty"`
	Expires      *time.Time `json:"tokens_expire,omitempty"`
}

func (s *setupPage) text(p *printer) {
	if s.Cluster != "" {
		p.line("cluster %s is created with node %s", s.Cluster, s.Node)
	} else {
		p.line("node %s (%s) has joined", s.Node, s.Role)
	}
	for _, d := range s.Devices {
		p.line("  formatted %s", d)
	}
	if s.DataToken != "" {
		p.line("When this node runs, join a second node and a witness, until %s:", since(s.Expires))
		p.line("  sudo twinsan join %s --token %s --devices DISK,... --sync IP --iscsi IP", s.Join, s.DataToken)
		p.line("  sudo twinsan join %s --token %s --witness --sync IP", s.Join, s.WitnessToken)
	}
}

// nextServe tells how to start the node.
func (a *app) nextServe() {
	if _, err := os.Stat("/run/systemd/system"); err == nil && os.Geteuid() == 0 && a.configPath() == server.DefaultConfigPath {
		a.next("systemctl enable --now twinsan")
		return
	}
	a.next("twinsan serve --config %s", a.configPath())
}

func (a *app) initCommand() *cobra.Command {
	var n nodeFlags
	c := &cobra.Command{
		Use: "init CLUSTER", Short: "Make a cluster with this machine as its first node",
		Long: `Make a cluster with this machine as its first node: format the devices, make
the cluster's certificates and write the node's file when it has none. Devices
that hold anything are refused without --wipe. Nothing is started.`,
		Example: `  sudo twinsan init lab --devices /dev/nvme1n1,/dev/sdb --sync 10.0.1.11 --iscsi 10.0.2.11
  sudo twinsan init lab --devices /dev/nvme1n1 --sync 10.0.1.11 --management 10.0.3.11 --iscsi 10.0.2.11`,
		Args: arguments("CLUSTER"),
		RunE: func(c *cobra.Command, args []string) error {
			if !server.ValidName(args[0]) {
				return usage("%q cannot name a cluster: want 1 to 63 lower case letters, digits and hyphens", args[0])
			}
			config, err := a.nodeConfig(c, &n, false)
			if err != nil {
				return err
			}
			tokens, err := server.Init(c.Context(), config, server.InitOptions{Cluster: args[0], Wipe: n.wipe})
			if err != nil {
				return err
			}
			if err := a.print(&setupPage{
				version1: v1Header, Cluster: args[0], Node: config.Name, Role: "data", DataDir: config.DataDir, Devices: words(slices.Concat(config.Store.Devices, config.Store.CapacityDevices)),
				Config: a.configPath(), Join: config.JoinAddress(), DataToken: tokens.Data, WitnessToken: tokens.Witness, Expires: moment(tokens.Expires),
			}); err != nil {
				return err
			}
			a.nextServe()
			return nil
		},
	}
	n.register(c)
	return c
}

func (a *app) joinCommand() *cobra.Command {
	var n nodeFlags
	var token string
	var witness bool
	c := &cobra.Command{
		Use: "join ADDRESS", Short: "Add this machine to a cluster",
		Long: `Add this machine to a cluster: ADDRESS is the management address of any of its
data nodes (the sync address where there is no other), and the token comes from "twinsan cluster token create" there. It carries
the fingerprint of the cluster's CA, so nothing needs to be copied. With
--witness the machine only votes: no disks, little memory.`,
		Example: "  sudo twinsan join 10.0.1.11 --token tw1-... --devices /dev/nvme1n1,/dev/sdb --sync 10.0.1.12 --iscsi 10.0.2.12",
		Args:    arguments("ADDRESS"),
		RunE: func(c *cobra.Command, args []string) error {
			address, err := server.CompleteAddress(args[0], server.SyncPort, false)
			if err != nil {
				return usage("%w", err)
			}
			if token == "" {
				return usage("--token is missing: make one with \"twinsan cluster token create\" on a node of the cluster")
			}
			config, err := a.nodeConfig(c, &n, witness)
			if err != nil {
				return err
			}
			if err := server.Join(c.Context(), config, server.JoinOptions{Address: address, Token: token, Witness: witness, Wipe: n.wipe}); err != nil {
				if errors.Is(err, syscall.ECONNREFUSED) {
					return fmt.Errorf("%w\n  is that the management address of a running node?  twinsan node list", err)
				}
				return err
			}
			role := "data"
			if witness {
				role = "witness"
			}
			page := &setupPage{version1: v1Header, Node: config.Name, Role: role, DataDir: config.DataDir, Devices: []string{}, Config: a.configPath()}
			if !witness {
				page.Devices = words(slices.Concat(config.Store.Devices, config.Store.CapacityDevices))
			}
			if err := a.print(page); err != nil {
				return err
			}
			a.nextServe()
			return nil
		},
	}
	n.register(c)
	c.Flags().StringVar(&token, "token", "", "join token")
	c.Flags().BoolVar(&witness, "witness", false, "vote only, store nothing")
	return c
}
