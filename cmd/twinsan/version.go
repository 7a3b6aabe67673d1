package main

import (
	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/server"
)

type versionPage struct {
	version1
	Software string `json:"software"`
	Go       string `json:"go"`
	Revision string `json:"revision"`
}

func (v *versionPage) text(p *printer) {
	p.line("twinsan %s (%s, %s)", v.Software, v.Revision, v.Go)
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the version of this program", Args: arguments(),
		RunE: func(*cobra.Command, []string) error {
			b := server.Build()
			return a.print(&versionPage{v1Header, b.Version, b.Go, b.Revision})
		},
	}
}
