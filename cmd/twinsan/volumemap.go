package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

func (a *app) volumeMap() *cobra.Command {
	var hosts []string
	var readOnly bool
	c := &cobra.Command{
		Use: "map NAME --host HOST", Short: "Let hosts see a volume, read-only if you say so",
		Long: `Let hosts see a volume, in addition to those that do. With --read-only their
writes are refused (write protected); the same command without it lets them
write again. Hosts that are logged in notice at once.`,
		Example: "  twinsan volume map csv1 --host backup --read-only", Args: arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			if len(hosts) == 0 {
				return usage("--host HOST is missing\n  see: twinsan host list")
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Hosts.MapVolume(ctx, &v1.MapVolumeRequest{Volume: args[0], Hosts: hosts, ReadOnly: readOnly})
				if err != nil {
					return err
				}
				a.next("twinsan connect %s %s", v.Name, hosts[0])
				return a.printVolume(v)
			})
		},
	}
	c.Flags().StringSliceVar(&hosts, "host", nil, "the hosts")
	c.Flags().BoolVar(&readOnly, "read-only", false, "refuse their writes")
	return c
}

func (a *app) volumeUnmap() *cobra.Command {
	var hosts []string
	c := &cobra.Command{
		Use: "unmap NAME --host HOST", Short: "Take a volume away from hosts", Args: arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			if len(hosts) == 0 {
				return usage("--host HOST is missing\n  see: twinsan volume show %s", args[0])
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Hosts.UnmapVolume(ctx, &v1.UnmapVolumeRequest{Volume: args[0], Hosts: hosts})
				if err != nil {
					return err
				}
				a.next("twinsan volume list")
				return a.printVolume(v)
			})
		},
	}
	c.Flags().StringSliceVar(&hosts, "host", nil, "the hosts")
	return c
}

func (a *app) volumeHosts() *cobra.Command {
	var anyHost bool
	c := &cobra.Command{
		Use: "hosts NAME [HOST...]", Short: "Let exactly these hosts see a volume",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return arguments("NAME")(c, args)
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Hosts.SetVolumeHosts(ctx, &v1.SetVolumeHostsRequest{Volume: args[0], Hosts: args[1:], AnyHost: anyHost})
				if err != nil {
					return err
				}
				if len(args) > 1 {
					a.next("twinsan connect %s %s", v.Name, args[1])
				}
				return a.printVolume(v)
			})
		},
	}
	c.Flags().BoolVar(&anyHost, "any-host", false, "every initiator sees the volume, without authentication")
	return c
}
