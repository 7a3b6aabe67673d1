package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/tests/lab"
)

// linkRows is the name of linkTable.
const linkRows = "ha-links"

// linkTable measures resyncs where the link is the limit and not this machine: each node
// is in a network namespace, and the kernel lets it send so much. Beside it is what one
// TLS connection between the same namespaces gets.
func (b *bench) linkTable(ctx context.Context) (_ string, err error) {
	if err := lab.CanNetwork(ctx); err != nil {
		b.say("SKIPPED: resyncs over bounded links: %v", err)
		return fmt.Sprintf("\nResync over bounded links: skipped, %v\n", err), nil
	}
	o := lab.NetworkOptions{Binary: b.binary, Dir: filepath.Join(b.dir, "net"), DeviceSize: "6G", Nodes: []string{"a", "b"}, Volumes: []string{volumeName + ":1G"}}
	n, err := lab.UpNetwork(ctx, o)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, n.Close(), os.RemoveAll(o.Dir)) }()
	x := &bench{root: b.root, binary: b.binary, dir: b.dir, cluster: n.Cluster}
	if x.iscsiload, err = n.Inside(b.iscsiload); err != nil {
		return "", err
	}
	const changed = 1 << 30
	var t strings.Builder
	t.WriteString("\nResync over a bounded link, each node in a namespace of this machine; the replica was away while all of it was rewritten, nobody else works\n\n" +
		"| link | changed MiB | sent MiB | sent / changed | took s | MiB/s | TLS stream MiB/s | of it | owner CPU s/GiB | replica CPU s/GiB |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, l := range []struct {
		name string
		rate int // bytes a second, with all headers
	}{{"1 Gbit/s", 125e6}, {"2.5 Gbit/s", 312.5e6}} {
		if x.volume, err = n.Volume(ctx, volumeName); err != nil {
			return "", err
		}
		owner, away := x.volume.Owner, x.volume.Other()
		bound := func(rate int) error {
			return errors.Join(n.Slow(ctx, owner, rate), n.Slow(ctx, away, rate))
		}
		if err := bound(l.rate); err != nil {
			return "", err
		}
		stream, err := b.streamBetween(n, owner, away, changed/2)
		if err == nil {
			err = bound(0)
		}
		if err == nil {
			err = n.Kill(ctx, away)
		}
		if err == nil {
			// Contents are of the seed: what the other row wrote would be there already.
			_, err = lab.RunLoad(ctx, x.iscsiload, "--rw", "write", "--once", "--bs", "1m", "--iodepth", "8", "--size", fmt.Sprint(changed), "--seed", fmt.Sprint(l.rate),
				x.cluster.URL(owner, x.volume.LUN))
		}
		if err == nil {
			err = bound(l.rate)
		}
		if err != nil {
			return "", fmt.Errorf("%s: %w", l.name, err)
		}
		_, _, _, before, err := x.lastResync(ctx)
		if err != nil {
			return "", err
		}
		used := lab.CPU(n.Node(owner).PID)
		if err := n.Start(ctx, away); err != nil {
			return "", err
		}
		var sent int64
		var took time.Duration
		if err := lab.Until(ctx, 5*time.Minute, func() error {
			var count int
			var e error
			if _, sent, took, count, e = x.lastResync(ctx); e == nil && count <= before {
				e = errors.New("no resync has ended")
			}
			return e
		}); err != nil {
			return "", fmt.Errorf("%s: %w", l.name, err)
		}
		gib := float64(sent) / (1 << 30)
		cpu := [2]float64{(lab.CPU(n.Node(owner).PID) - used).Seconds() / gib, lab.CPU(n.Node(away).PID).Seconds() / gib}
		if err := errors.Join(n.WaitHealthy(ctx, time.Minute), bound(0)); err != nil {
			return "", err
		}
		rate := 1024 * gib / took.Seconds()
		row := fmt.Sprintf("| %s | %d | %d | %.2f | %.2f | %.0f | %.0f | %.0f %% | %.1f | %.1f |\n", l.name, changed>>20, sent>>20,
			float64(sent)/changed, took.Seconds(), rate, stream.MiBps, 100*rate/stream.MiBps, cpu[0], cpu[1])
		b.say("%s", strings.TrimSpace(row))
		t.WriteString(row)
	}
	t.WriteString("\nBefore each row 512 MiB go through one TLS connection over the same link. The replica's processor time has its start in it.\n")
	return t.String(), nil
}

// streamBetween is what a TLS connection from one member's machine to another's gets.
func (b *bench) streamBetween(n *lab.Network, from, to string, size int64) (lab.Rate, error) {
	var ln net.Listener
	var failed error
	if err := n.DoOn(to, func() { ln, failed = net.Listen("tcp", net.JoinHostPort(n.Address(to, lab.Data), "0")) }); err != nil || failed != nil {
		return lab.Rate{}, errors.Join(err, failed)
	}
	defer ln.Close()
	return lab.StreamLimit(size, ln, func() (c net.Conn, err error) {
		in := n.DoOn(from, func() { c, err = net.Dial("tcp", ln.Addr().String()) })
		return c, errors.Join(err, in)
	}, replication.Records)
}
