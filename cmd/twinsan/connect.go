package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type connectPage struct {
	version1
	Volume     string   `json:"volume"`
	LUN        uint32   `json:"lun"`
	NAA        string   `json:"naa"`
	Host       string   `json:"host"`
	Target     string   `json:"target"`
	Portals    []string `json:"portals"`
	OS         string   `json:"os"`
	Commands   []string `json:"commands"`
	CHAPUser   string   `json:"chap_user,omitempty"`
	MutualUser string   `json:"mutual_user,omitempty"`
	// The users of discovery, which may be others.
	DiscoveryUser   string `json:"discovery_user,omitempty"`
	DiscoveryMutual string `json:"discovery_mutual_user,omitempty"`

	ownDiscovery bool // they are those of the cluster
}

func (c *connectPage) text(p *printer) {
	p.line("# volume %s for host %s (%s): target %s, LUN %d", c.Volume, c.Host, c.OS, c.Target, c.LUN)
	if c.CHAPUser != "" {
		p.line("# put the secret that \"twinsan host add\" showed in the place of SECRET")
	}
	if c.ownDiscovery && c.OS != "qemu" {
		p.line("# put the secret that \"twinsan cluster set discovery-auth\" showed in the place of DISCOVERY-SECRET")
	}
	for _, line := range c.Commands {
		p.line("%s", line)
	}
}

var hostSystems = []string{"windows", "esxi", "linux", "proxmox", "qemu"}

func (a *app) connectCommand() *cobra.Command {
	var system string
	c := &cobra.Command{
		Use: "connect VOLUME HOST", Short: "Print the commands that connect a host to a volume",
		Long: "Print the commands that connect a host to a volume, for the host's system: " + strings.Join(hostSystems, ", ") + ".",
		Args: arguments("VOLUME", "HOST"),
		RunE: func(c *cobra.Command, args []string) error {
			if system != "" && !slices.Contains(hostSystems, system) {
				return usage("--os %s: want one of %s", system, strings.Join(hostSystems, ", "))
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Volumes.GetVolume(ctx, &v1.GetVolumeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				hosts, err := client.Hosts.ListHosts(ctx, &v1.ListHostsRequest{})
				if err != nil {
					return err
				}
				at := slices.IndexFunc(hosts.Hosts, func(h *v1.Host) bool { return h.Name == args[1] })
				if at < 0 {
					return fmt.Errorf("host %q is not known\n  add it: twinsan host add %s INITIATOR", args[1], args[1])
				}
				host := hosts.Hosts[at]
				if !v.AnyHost && !slices.Contains(v.Hosts, host.Name) {
					return refuse("host %s does not see volume %s\n  let it: twinsan volume hosts %s %s", host.Name, v.Name, v.Name, strings.Join(append(words(v.Hosts), host.Name), " "))
				}
				info, err := client.Cluster.GetCluster(ctx, &v1.GetClusterRequest{})
				if err != nil {
					return err
				}
				page := &connectPage{
					version1: v1Header, Volume: v.Name, LUN: v.Lun, NAA: v.Naa, Host: host.Name, Target: info.Target,
					Portals: views(info.Portals, func(p *v1.Portal) string { return p.Address }),
					OS:      system, CHAPUser: host.ChapUser, MutualUser: host.MutualUser,
				}
				page.discover(info)
				if page.OS == "" {
					page.OS = guessSystem(host.Initiators)
				}
				page.Commands = connectCommands(page)
				if err := a.print(page); err != nil {
					return err
				}
				a.next("type these on %s, then: twinsan session list", host.Name)
				return nil
			})
		},
	}
	c.Flags().StringVar(&system, "os", "", "system of the host (default: guessed from its initiator name)")
	return c
}

// discover fills in the users of discovery by the policy of the cluster.
func (c *connectPage) discover(info *v1.ClusterInfo) {
	switch info.Discovery {
	case v1.DiscoveryMode_DISCOVERY_MODE_NONE:
	case v1.DiscoveryMode_DISCOVERY_MODE_CHAP:
		c.DiscoveryUser, c.DiscoveryMutual, c.ownDiscovery = info.DiscoveryUser, info.DiscoveryMutualUser, true
	default:
		c.DiscoveryUser, c.DiscoveryMutual = c.CHAPUser, c.MutualUser
	}
}

// discoverySecrets are the words that stand for the secrets of discovery.
func (c *connectPage) discoverySecrets() (secret, mutual string) {
	if c.ownDiscovery {
		return "DISCOVERY-SECRET", "TARGETS-DISCOVERY-SECRET"
	}
	return "SECRET", "TARGETS-SECRET"
}

func guessSystem(initiators []string) string {
	for _, name := range initiators {
		switch {
		case strings.Contains(name, "com.microsoft:"):
			return "windows"
		case strings.Contains(name, "com.vmware:"):
			return "esxi"
		}
	}
	return "linux"
}

// connectCommands are the lines for one system. Every portal of every node is
// logged in to: that is what multipathing stands on.
func connectCommands(c *connectPage) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	split := func(portal string) (string, string) {
		host, port, err := net.SplitHostPort(portal)
		if err != nil {
			return portal, "3260"
		}
		return host, port
	}
	discoverySecret, discoveryMutual := c.discoverySecrets()
	switch c.OS {
	case "windows":
		add("Install-WindowsFeature Multipath-IO   # once; restart when it says so")
		add("Enable-MSDSMAutomaticClaim -BusType iSCSI")
		add("Set-Service MSiSCSI -StartupType Automatic; Start-Service MSiSCSI")
		// Windows has one secret for every target that proves itself.
		if c.MutualUser != "" {
			add("Set-IscsiChapSecret -ChapSecret TARGETS-SECRET")
		} else if c.DiscoveryMutual != "" {
			add("Set-IscsiChapSecret -ChapSecret %s", discoveryMutual)
		}
		for _, portal := range c.Portals {
			host, port := split(portal)
			auth := ""
			if c.DiscoveryUser != "" {
				kind := "ONEWAYCHAP"
				if c.DiscoveryMutual != "" {
					kind = "MUTUALCHAP"
				}
				auth = fmt.Sprintf(" -AuthenticationType %s -ChapUsername '%s' -ChapSecret %s", kind, c.DiscoveryUser, discoverySecret)
			}
			add("New-IscsiTargetPortal -TargetPortalAddress %s -TargetPortalPortNumber %s%s", host, port, auth)
		}
		chap := ""
		if c.MutualUser != "" {
			chap = " -AuthenticationType MUTUALCHAP"
		} else if c.CHAPUser != "" {
			chap = " -AuthenticationType ONEWAYCHAP"
		}
		if c.CHAPUser != "" {
			chap += fmt.Sprintf(" -ChapUsername '%s' -ChapSecret SECRET", c.CHAPUser)
		}
		for _, portal := range c.Portals {
			host, port := split(portal)
			add("Connect-IscsiTarget -NodeAddress %s -TargetPortalAddress %s -TargetPortalPortNumber %s -IsMultipathEnabled $true -IsPersistent $true%s", c.Target, host, port, chap)
		}
		add("Get-Disk | Where-Object BusType -eq iSCSI")
	case "esxi":
		add("esxcli iscsi software set --enabled=true")
		add("esxcli storage nmp satp rule add -s VMW_SATP_ALUA -V TWINSAN -M 'VIRTUAL DISK' -P VMW_PSP_RR -O iops=1 -c tpgs_on   # once")
		add("A=$(esxcli iscsi adapter list | awk '/iscsi_vmk/ {print $1}')")
		if c.CHAPUser != "" {
			add("esxcli iscsi adapter auth chap set -A $A --direction=uni --authname='%s' --secret=SECRET --level=required", c.CHAPUser)
		}
		if c.MutualUser != "" {
			add("esxcli iscsi adapter auth chap set -A $A --direction=mutual --authname='%s' --secret=TARGETS-SECRET --level=required", c.MutualUser)
		}
		for _, portal := range c.Portals {
			add("esxcli iscsi adapter discovery sendtarget add -A $A -a %s", portal)
			if c.ownDiscovery {
				add("esxcli iscsi adapter discovery sendtarget auth chap set -A $A -a %s --direction=uni --authname='%s' --secret=%s --level=required", portal, c.DiscoveryUser, discoverySecret)
			}
			if c.ownDiscovery && c.DiscoveryMutual != "" {
				add("esxcli iscsi adapter discovery sendtarget auth chap set -A $A -a %s --direction=mutual --authname='%s' --secret=%s --level=required", portal, c.DiscoveryMutual, discoveryMutual)
			}
		}
		add("esxcli storage core adapter rescan --all")
	case "qemu":
		for _, portal := range c.Portals {
			add("iscsi://%s/%s/%d", portal, c.Target, c.LUN)
		}
	default: // linux, proxmox
		add("apt-get install -y open-iscsi multipath-tools   # or: dnf install iscsi-initiator-utils device-mapper-multipath")
		for _, portal := range c.Portals {
			if c.DiscoveryUser == "" {
				add("iscsiadm -m discovery -t sendtargets -p %s", portal)
				continue
			}
			add("iscsiadm -m discoverydb -t sendtargets -p %s -o new", portal)
			record := func(name, value string) {
				add("iscsiadm -m discoverydb -t sendtargets -p %s -o update -n discovery.sendtargets.auth.%s -v '%s'", portal, name, value)
			}
			record("authmethod", "CHAP")
			record("username", c.DiscoveryUser)
			record("password", discoverySecret)
			if c.DiscoveryMutual != "" {
				record("username_in", c.DiscoveryMutual)
				record("password_in", discoveryMutual)
			}
			add("iscsiadm -m discoverydb -t sendtargets -p %s --discover", portal)
		}
		set := func(name, value string) {
			add("iscsiadm -m node -T %s -o update -n %s -v '%s'", c.Target, name, value)
		}
		if c.CHAPUser != "" {
			set("node.session.auth.authmethod", "CHAP")
			set("node.session.auth.username", c.CHAPUser)
			set("node.session.auth.password", "SECRET")
		}
		if c.MutualUser != "" {
			set("node.session.auth.username_in", c.MutualUser)
			set("node.session.auth.password_in", "TARGETS-SECRET")
		}
		set("node.session.timeo.replacement_timeout", "20")
		set("node.startup", "automatic")
		add("iscsiadm -m node -T %s --login", c.Target)
		disk := "/dev/mapper/3" + strings.TrimPrefix(strings.ToLower(c.NAA), "naa.")
		if c.OS == "proxmox" {
			add("multipath -ll")
			add("vgcreate %s %s && pvesm add lvm %s --vgname %s --shared 1", c.Volume, disk, c.Volume, c.Volume)
		} else {
			add("multipath -ll   # the disk is %s", disk)
		}
	}
	return out
}
