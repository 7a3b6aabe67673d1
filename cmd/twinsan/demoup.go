package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

// demoUp makes or restarts a demo, waits until all of it is in sync, and in the
// foreground stays until ctx ends.
func (a *app) demoUp(ctx context.Context, plan *demoPlan) error {
	if err := os.MkdirAll(plan.dir, 0o700); err != nil {
		return err
	}
	unlock, err := lockDemo(plan.dir)
	if err != nil {
		return err
	}
	unlock = sync.OnceFunc(unlock)
	defer unlock()
	d, err := a.newDemo(plan.dir)
	if err != nil {
		return err
	}
	d.file, err = loadDemo(plan.dir)
	fresh := errors.Is(err, fs.ErrNotExist)
	if fresh {
		d.file, err = layOut(plan)
	}
	if err != nil {
		return err
	}
	defer d.reapIfDown()
	err = d.raise(ctx, plan)
	err = errors.Join(err, d.file.save(d.dir))
	if err != nil {
		return errors.Join(err, d.undo(context.WithoutCancel(ctx)))
	}
	if err := a.print(&demoPage{d.file}); err != nil {
		return err
	}
	a.next("qemu-img convert -p -n -O raw DISK.qcow2 %s", d.file.url(0, 0))
	a.next("twinsan demo status%s; twinsan demo tour%s; twinsan demo kill a%s; twinsan demo start a%s", d.flag(), d.flag(), d.flag(), d.flag())
	if plan.detach {
		a.next("twinsan demo down%s   (or: twinsan demo clean%s)", d.flag(), d.flag())
		return nil
	}
	unlock()
	d.say("The demo runs until Ctrl-C.")
	return d.watch(ctx)
}

// undo ends what a failed "up" started, so that nothing stays behind.
func (d *demo) undo(ctx context.Context) error {
	var failed []error
	for _, m := range d.began {
		_, err := m.proc.end(ctx, stopMax)
		failed = append(failed, err)
	}
	d.file.refresh()
	return errors.Join(append(failed, d.file.save(d.dir))...)
}

// reapIfDown waits for children when none of them should live any more.
func (d *demo) reapIfDown() {
	for _, m := range d.file.members() {
		if m.proc.state() != processGone {
			return
		}
	}
	d.reap.Wait()
}

// raise brings all nodes up, in the order in which a cluster is made by hand.
func (d *demo) raise(ctx context.Context, plan *demoPlan) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	first := d.file.members()[0]
	for i, m := range d.file.members() {
		config, err := server.LoadConfig(m.config())
		if err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(config.DataDir, server.IdentityFile)); errors.Is(err, fs.ErrNotExist) {
			d.say("making node %s", m.name)
			if err := d.found(ctx, m, config, i == 0, first.api); err != nil {
				return fmt.Errorf("make node %s: %w", m.name, err)
			}
		}
		if m.proc.state() != processGone {
			continue
		}
		if err := d.launch(m, config); err != nil {
			return err
		}
		// The first node must answer before others can join; the others of a
		// fresh demo join one by one.
		if err := d.answer(ctx, m); err != nil {
			return err
		}
	}
	client, err := api.Dial(first.api, "")
	if err != nil {
		return err
	}
	defer client.Close()
	if err := d.makeVolumes(ctx, client, plan.volumes); err != nil {
		return err
	}
	return d.settle(ctx, client)
}

// found makes the identity of a node: the first makes the cluster, others join it.
func (d *demo) found(ctx context.Context, m member, config *server.Config, first bool, firstAPI string) error {
	if first {
		_, err := d.hooks.init(ctx, config, server.InitOptions{Cluster: demoCluster})
		return err
	}
	client, err := api.Dial(firstAPI, "")
	if err != nil {
		return err
	}
	defer client.Close()
	role := v1.Role_ROLE_DATA
	if m.name == witnessName {
		role = v1.Role_ROLE_WITNESS
	}
	var token *v1.Token
	if err := retry(ctx, func() error {
		token, err = client.Cluster.CreateToken(ctx, &v1.CreateTokenRequest{Role: role})
		return err
	}); err != nil {
		return err
	}
	if len(token.Addresses) == 0 {
		return errors.New("the first node names no address to join at")
	}
	return d.hooks.join(ctx, config, server.JoinOptions{Address: token.Addresses[0], Token: token.Token, Witness: m.name == witnessName})
}

// launch starts the process of a node and records it.
func (d *demo) launch(m member, config *server.Config) error {
	for _, address := range append([]string{config.Sync.Address, config.API.Address, config.Metrics.Address}, config.ISCSI.Portals...) {
		l, err := net.Listen("tcp", address)
		// A process that was killed may be a zombie by name while its last thread still
		// holds the sockets.
		for deadline := time.Now().Add(2 * time.Second); err != nil && time.Now().Before(deadline); {
			time.Sleep(20 * time.Millisecond)
			l, err = net.Listen("tcp", address)
		}
		if err != nil {
			return fmt.Errorf("node %s: %s is taken: %w\n  choose others: twinsan demo clean%s, then twinsan demo up --base-port N", m.name, address, err, d.flag())
		}
		l.Close()
	}
	args := []string{"serve", "--config", m.config()}
	if m.name == witnessName {
		args = append(args, "--witness")
	}
	if m.debug != "" {
		args = append(args, "--debug-addr", m.debug)
	}
	p, err := spawn(d.hooks.exe, args, d.hooks.env, m.log(), &d.reap)
	if err != nil {
		return fmt.Errorf("start node %s: %w", m.name, err)
	}
	*m.proc = p
	d.began = append(d.began, m)
	return d.file.save(d.dir)
}

// answer waits until the node's API answers, or its process is gone.
func (d *demo) answer(ctx context.Context, m member) error {
	client, err := api.Dial(m.api, "")
	if err != nil {
		return err
	}
	defer client.Close()
	return retry(ctx, func() error {
		if m.proc.state() == processGone {
			return &failure{exitFailed, fmt.Errorf("node %s has ended:\n%s  its log: %s", m.name, logTail(m.log()), m.log())}
		}
		once, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		_, err := client.Cluster.GetCluster(once, &v1.GetClusterRequest{})
		return err
	})
}

func (d *demo) makeVolumes(ctx context.Context, client *api.Client, specs []volumeSpec) error {
	for _, spec := range specs {
		err := retry(ctx, func() error {
			_, err := client.Volumes.CreateVolume(ctx, &v1.CreateVolumeRequest{
				Name: spec.name, SizeBytes: uint64(spec.size), AnyHost: true, RequestId: "demo-volume-" + spec.name,
			})
			return err
		})
		if err != nil && status.Code(err) != codes.AlreadyExists {
			return fmt.Errorf("make volume %s: %w", spec.name, err)
		}
	}
	return nil
}

// settle waits until every volume is served by all data nodes with all replicas
// in sync, and completes the file.
func (d *demo) settle(ctx context.Context, client *api.Client) error {
	var s *v1.Status
	err := retry(ctx, func() error {
		for _, m := range d.file.members() {
			if m.proc.PID != 0 && m.proc.state() == processGone {
				return &failure{exitFailed, fmt.Errorf("node %s has ended:\n%s  its log: %s", m.name, logTail(m.log()), m.log())}
			}
		}
		once, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		var err error
		if s, err = client.Cluster.GetStatus(once, &v1.GetStatusRequest{}); err != nil {
			return err
		}
		return settled(s, len(d.file.Nodes), d.file.Witness != nil)
	})
	if err != nil {
		return fmt.Errorf("wait for the cluster: %w", err)
	}
	info, err := client.Cluster.GetCluster(ctx, &v1.GetClusterRequest{})
	if err != nil {
		return err
	}
	d.file.Target = info.Target
	d.file.Volumes = views(s.Volumes, func(v *v1.Volume) demoVolume { return demoVolume{v.Name, v.Lun, v.SizeBytes} })
	return nil
}

// settled says what a demo of that many data nodes still waits for, or nil.
func settled(s *v1.Status, nodes int, witness bool) error {
	members := nodes
	if witness {
		members++
	}
	if len(s.Nodes) != members {
		return fmt.Errorf("%d of %d nodes have joined", len(s.Nodes), members)
	}
	for _, n := range s.Nodes {
		if n.State != v1.NodeState_NODE_STATE_UP {
			return fmt.Errorf("node %s is %s", n.Name, api.Word(n.State, "NODE_STATE_"))
		}
	}
	if witness && s.Voters != 3 {
		return fmt.Errorf("%d of 3 nodes vote", s.Voters)
	}
	for _, v := range s.Volumes {
		if v.State != v1.VolumeState_VOLUME_STATE_ONLINE {
			return fmt.Errorf("volume %s is %s", v.Name, api.Word(v.State, "VOLUME_STATE_"))
		}
		// With more than two data nodes a volume has two replicas.
		if want := min(nodes, 2); len(v.ServedBy) < want || len(v.Replicas) < want {
			return fmt.Errorf("volume %s is served by %d of %d nodes", v.Name, len(v.ServedBy), want)
		}
	}
	for _, p := range s.Problems {
		// A pool that is full stays so: it is nothing to wait for.
		if p.Severity != v1.Health_HEALTH_HEALTHY && p.Code != "pool-full" {
			return fmt.Errorf("the cluster is %s: %s", api.Word(s.Health, "HEALTH_"), p.Cause)
		}
	}
	return nil
}

// retry calls f until it succeeds or ctx ends. A failure with an exit code ends
// it at once.
func retry(ctx context.Context, f func() error) error {
	for {
		err := f()
		var final *failure
		if err == nil || errors.As(err, &final) {
			return err
		}
		switch status.Code(err) {
		case codes.InvalidArgument, codes.AlreadyExists, codes.FailedPrecondition, codes.PermissionDenied, codes.NotFound, codes.Unimplemented:
			return err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}
