package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type upgradePage struct {
	version1
	Level     uint32            `json:"feature_level"`
	Next      uint32            `json:"feature_level_known"`
	Ready     bool              `json:"ready"`
	Advice    string            `json:"advice"`
	Unhealthy string            `json:"unhealthy,omitempty"`
	Nodes     []upgradeNodeView `json:"nodes"`
}

type upgradeNodeView struct {
	Name    string `json:"name"`
	Version string `json:"software"`
	Level   uint32 `json:"feature_level_known"`
	Error   string `json:"error,omitempty"`
}

func newUpgradePage(p *v1.UpgradePlan) *upgradePage {
	return &upgradePage{v1Header, p.Level, p.Next, p.Ready, p.Advice, p.Unhealthy, views(p.Nodes, func(n *v1.UpgradeNode) upgradeNodeView {
		return upgradeNodeView{n.Name, n.Version, n.Level, n.Error}
	})}
}

func (u *upgradePage) text(p *printer) {
	rows := [][]string{}
	for _, n := range u.Nodes {
		level := fmt.Sprint(n.Level)
		if n.Error != "" {
			level = "does not answer"
		}
		rows = append(rows, []string{n.Name, n.Version, level})
	}
	p.table("NODE SOFTWARE KNOWS_LEVEL", rows)
	p.line("")
	p.facts("feature level", fmt.Sprint(u.Level), "all nodes know", fmt.Sprint(u.Next), "do", u.Advice, "do not stop a node now", u.Unhealthy)
}

func (a *app) upgradeCommand() *cobra.Command {
	plan := &cobra.Command{
		Use: "plan", Short: "Show which versions run, and what to do next", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				p, err := client.Maintenance.GetUpgradePlan(ctx, &v1.GetUpgradePlanRequest{})
				if err != nil {
					return err
				}
				return a.print(newUpgradePage(p))
			})
		},
	}
	var k confirmation
	apply := &cobra.Command{
		Use: "apply", Short: "Let the cluster use what all nodes know by now, for good", Args: arguments(),
		Long: `Let the cluster use the formats that all nodes know by now. Before that the nodes
keep its state as the version before reads it, so that both run side by side.
There is no way back. Refused (exit code 4) while a node does not answer or does
not know the new level.`,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				p, err := client.Maintenance.GetUpgradePlan(ctx, &v1.GetUpgradePlanRequest{})
				if err != nil {
					return err
				}
				if p.Next <= p.Level || k.dryRun {
					return a.print(newUpgradePage(p))
				}
				if err := a.confirm(k, fmt.Sprintf("The cluster goes from feature level %d to %d. Versions that do not know it cannot run any more; there is no way back.", p.Level, p.Next)); err != nil {
					return err
				}
				again, cancel := context.WithTimeout(c.Context(), a.timeout)
				defer cancel()
				if p, err = client.Maintenance.RaiseLevel(again, &v1.RaiseLevelRequest{Level: p.Next}); err != nil {
					return err
				}
				return a.print(newUpgradePage(p))
			})
		},
	}
	k.flags(apply)
	return noun("upgrade", "From one version to the next while the cluster runs", nil, plan, apply)
}
