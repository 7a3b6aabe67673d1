package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

// fileText is the text of D/demo.json.
func fileText(f *demoFile) (string, error) {
	f.version1 = v1Header
	text, err := json.MarshalIndent(f, "", "  ")
	return string(text) + "\n", err
}

// url is the iSCSI URL of a volume through a node.
func (f *demoFile) url(node, volume int) string {
	if node >= len(f.Nodes) || volume >= len(f.Volumes) {
		return "iscsi://PORTAL/TARGET/LUN"
	}
	return fmt.Sprintf("iscsi://%s/%s/%d", f.Nodes[node].Portal, f.Target, f.Volumes[volume].LUN)
}

// demoPage is what "demo up" ends with; its JSON is the file's.
type demoPage struct{ *demoFile }

func (d *demoPage) text(p *printer) {
	for i, v := range d.Volumes {
		p.line("volume %s (%s) is exported by every node, all replicas in sync:", v.Name, p.size(v.Bytes))
		for j := range d.Nodes {
			p.line("  %s", d.url(j, i))
		}
	}
	for _, n := range d.Nodes {
		p.line("node %s  pid %d  --api %s  metrics %s", n.Name, n.PID, n.API, n.Metrics)
	}
	if d.Witness != nil {
		p.line("witness %s  pid %d", witnessName, d.Witness.PID)
	}
}

type demoStatusPage struct {
	version1
	Processes []demoProcess `json:"processes"`
	Status    *statusPage   `json:"status"` // null: no node answers
}

type demoProcess struct {
	Name   string `json:"name"`
	PID    int    `json:"pid"`
	State  string `json:"state"`
	Portal string `json:"portal,omitempty"`
	API    string `json:"api"`
}

func (d *demoStatusPage) text(p *printer) {
	rows := [][]string{}
	for _, x := range d.Processes {
		pid := ""
		if x.PID != 0 {
			pid = fmt.Sprint(x.PID)
		}
		rows = append(rows, []string{x.Name, x.State, pid, x.Portal, x.API})
	}
	p.table("NODE PROCESS PID PORTAL API", rows)
	p.line("")
	if d.Status == nil {
		p.line("no node answers")
		return
	}
	d.Status.text(p)
}

// show prints the processes, and the cluster as the first node that answers sees it.
func (d *demo) show(ctx context.Context) error {
	page := &demoStatusPage{version1: v1Header, Processes: []demoProcess{}}
	for i, m := range d.file.members() {
		x := demoProcess{Name: m.name, PID: m.proc.PID, State: string(m.proc.state()), API: m.api}
		if i < len(d.file.Nodes) {
			x.Portal = d.file.Nodes[i].Portal
		}
		page.Processes = append(page.Processes, x)
	}
	if s := d.ask(ctx); s != nil {
		page.Status = newStatusPage(s)
	}
	if err := d.app.print(page); err != nil {
		return err
	}
	for _, x := range page.Processes {
		switch processState(x.State) {
		case processGone:
			d.app.next("twinsan demo start %s%s", x.Name, d.flag())
		case processPaused:
			d.app.next("twinsan demo resume %s%s", x.Name, d.flag())
		}
	}
	if page.Status == nil || page.Status.Health != "healthy" {
		return &failure{exitDegraded, nil}
	}
	return nil
}

// ask gets the status from the first running member that has one, or nil.
func (d *demo) ask(ctx context.Context) *v1.Status {
	for _, m := range d.running() {
		client, err := api.Dial(m.api, "")
		if err != nil {
			continue
		}
		once, cancel := context.WithTimeout(ctx, 5*time.Second)
		s, err := client.Cluster.GetStatus(once, &v1.GetStatusRequest{})
		cancel()
		client.Close()
		if err == nil {
			return s
		}
	}
	return nil
}
