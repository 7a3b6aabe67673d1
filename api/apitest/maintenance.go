package apitest

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/twinsan/twinsan/server"
)

func (b *Backend) node(name string) (*server.Member, error) {
	for i := range b.State.Nodes {
		if n := &b.State.Nodes[i]; n.Name == name {
			return n, nil
		}
	}
	return nil, fmt.Errorf("node %q: %w", name, server.ErrNotFound)
}

// AddReplica begins an operation that is half done.
func (b *Backend) AddReplica(_ context.Context, volume, node, replaces string) (*server.Operation, error) {
	if err := b.begin(fmt.Sprintf("AddReplica %s %s %s", volume, node, replaces)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(volume)
	if err != nil {
		return nil, err
	}
	if _, err := b.node(node); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(v.Replicas, func(r server.Replica) bool { return r.Node == node }) {
		return nil, fmt.Errorf("%w: volume %s has a replica on %s already", server.ErrExists, v.Name, node)
	}
	v.Replicas = append(slices.Clone(v.Replicas), server.Replica{Node: node, State: server.ReplicaSyncing, ResyncDone: 1 << 30, ResyncTotal: 2 << 30, ResyncLeft: 8 * time.Second})
	o := server.Operation{ID: uint64(len(b.State.Operations) + 1), Kind: server.OperationAddReplica, State: server.OperationRunning, Volume: v.Name, From: replaces, To: node,
		Started: Epoch, Done: 1 << 30, Total: 2 << 30, Left: 8 * time.Second}
	if replaces != "" {
		o.Kind = server.OperationMoveReplica
	}
	b.State.Operations = append(b.State.Operations, o)
	return &o, nil
}

// RemoveReplica takes a copy away.
func (b *Backend) RemoveReplica(_ context.Context, volume, node string, force, dryRun bool) (*server.Volume, error) {
	if err := b.begin(fmt.Sprintf("RemoveReplica %s %s force=%v dry=%v", volume, node, force, dryRun)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(volume)
	if err != nil {
		return nil, err
	}
	good := 0
	for _, r := range v.Replicas {
		if r.Node != node && r.State == server.ReplicaInSync {
			good++
		}
	}
	if good == 0 || good == 1 && !force {
		return nil, fmt.Errorf("%w: volume %s would have %d good copies left", server.ErrRefused, v.Name, good)
	}
	out := *v
	if !dryRun {
		v.Replicas = slices.DeleteFunc(slices.Clone(v.Replicas), func(r server.Replica) bool { return r.Node == node })
		out = *v
	}
	return &out, nil
}

// Promote refuses while another copy is in sync.
func (b *Backend) Promote(_ context.Context, spec server.PromoteSpec) (*server.Promotion, error) {
	if err := b.begin(fmt.Sprintf("Promote %s %s epoch=%d dry=%v", spec.Volume, spec.Node, spec.Epoch, spec.DryRun)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(spec.Volume)
	if err != nil {
		return nil, err
	}
	p := &server.Promotion{Epoch: v.Epoch, Facts: []string{fmt.Sprintf("the copy on node %s ends with operation 41 of epoch 3; the volume is in epoch %d", spec.Node, v.Epoch)}}
	for _, r := range v.Replicas {
		if r.Node != spec.Node && r.State == server.ReplicaInSync {
			p.Refuse = "node " + r.Node + " has a good copy and is up"
		}
	}
	switch {
	case spec.DryRun:
	case p.Refuse != "":
		return nil, fmt.Errorf("%w: %s", server.ErrRefused, p.Refuse)
	default:
		v.Owner, v.Lineage = spec.Node, "33333333-0000-4000-8000-000000000000"
	}
	out := *v
	p.Volume = &out
	return p, nil
}

// Operations lists State.Operations.
func (b *Backend) Operations(context.Context) ([]server.Operation, error) {
	if err := b.begin("Operations"); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	return slices.Clone(b.State.Operations), nil
}

// CancelOperation ends an operation that runs.
func (b *Backend) CancelOperation(_ context.Context, id uint64) (*server.Operation, error) {
	if err := b.begin(fmt.Sprintf("CancelOperation %d", id)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	for i := range b.State.Operations {
		o := &b.State.Operations[i]
		if o.ID != id {
			continue
		}
		if o.State != server.OperationRunning {
			return nil, fmt.Errorf("%w: operation %d has ended", server.ErrRefused, id)
		}
		o.State, o.Ended = server.OperationCancelled, Epoch.Add(time.Minute)
		if v, err := b.volume(o.Volume); err == nil {
			v.Replicas = slices.DeleteFunc(slices.Clone(v.Replicas), func(r server.Replica) bool { return r.Node == o.To })
		}
		out := *o
		return &out, nil
	}
	return nil, fmt.Errorf("operation %d: %w", id, server.ErrNotFound)
}

// SetMaintenance moves all volumes of the node at once; copies elsewhere that are
// not in sync are hurt.
func (b *Backend) SetMaintenance(_ context.Context, name string, enter, force, dryRun bool) (*server.Member, []string, error) {
	if err := b.begin(fmt.Sprintf("SetMaintenance %s %v force=%v dry=%v", name, enter, force, dryRun)); err != nil {
		return nil, nil, err
	}
	defer b.Mu.Unlock()
	n, err := b.node(name)
	if err != nil {
		return nil, nil, err
	}
	var hurt []string
	for _, v := range b.State.Volumes {
		for _, r := range v.Replicas {
			if enter && r.Node != name && r.State != server.ReplicaInSync {
				hurt = append(hurt, fmt.Sprintf("volume %s would have nowhere to go: the copy on node %s is not in sync", v.Name, r.Node))
			}
		}
	}
	out := *n
	switch {
	case dryRun:
		return &out, hurt, nil
	case len(hurt) > 0 && !force:
		return nil, hurt, fmt.Errorf("%w: when node %s stops, %s", server.ErrRefused, name, hurt[0])
	}
	n.Mode, n.Draining = server.ModeServing, enter
	if enter {
		n.Mode, n.Owns = server.ModeMaintenance, 0
	}
	out = *n
	return &out, hurt, nil
}

// EvacuateNode empties the node at once.
func (b *Backend) EvacuateNode(_ context.Context, name, to string, stop bool) (*server.Member, error) {
	if err := b.begin(fmt.Sprintf("EvacuateNode %s %s %v", name, to, stop)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	n, err := b.node(name)
	if err != nil {
		return nil, err
	}
	n.Mode, n.EvacuateTo, n.Replicas, n.InSync, n.Owns = server.ModeEvacuating, to, 0, 0, 0
	if stop {
		n.Mode = server.ModeServing
	}
	out := *n
	return &out, nil
}

// RemoveNode refuses a node with replicas that is up.
func (b *Backend) RemoveNode(_ context.Context, name string, lost, dryRun bool) ([]string, error) {
	if err := b.begin(fmt.Sprintf("RemoveNode %s lost=%v dry=%v", name, lost, dryRun)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	n, err := b.node(name)
	if err != nil {
		return nil, err
	}
	if n.Replicas > 0 && !(lost && n.State == server.NodeDown) {
		return nil, fmt.Errorf("%w: node %s has replicas", server.ErrRefused, name)
	}
	if !dryRun {
		b.State.Nodes = slices.DeleteFunc(slices.Clone(b.State.Nodes), func(m server.Member) bool { return m.Name == name })
	}
	return nil, nil
}

// SetResyncRate does nothing more.
func (b *Backend) SetResyncRate(_ context.Context, rate uint32) error {
	if err := b.begin(fmt.Sprintf("SetResyncRate %d", rate)); err != nil {
		return err
	}
	defer b.Mu.Unlock()
	b.ResyncRate = rate
	return nil
}

// SetBalance does nothing more.
func (b *Backend) SetBalance(_ context.Context, on bool, after time.Duration) error {
	if err := b.begin(fmt.Sprintf("SetBalance %v %s", on, after)); err != nil {
		return err
	}
	defer b.Mu.Unlock()
	b.Balance = on
	return nil
}

// SetQuorum wants a witness for the mode of that name.
func (b *Backend) SetQuorum(_ context.Context, mode server.QuorumMode, preferred string) error {
	if err := b.begin(fmt.Sprintf("SetQuorum %s %s", mode, preferred)); err != nil {
		return err
	}
	defer b.Mu.Unlock()
	if mode == server.QuorumMajority {
		return fmt.Errorf("%w: of 2 data nodes alone no majority survives the loss of half", server.ErrRefused)
	}
	b.Quorum, b.Preferred = mode, preferred
	return nil
}

// UpgradePlan lists the nodes; all know level 2.
func (b *Backend) UpgradePlan(context.Context) (*server.UpgradePlan, error) {
	if err := b.begin("UpgradePlan"); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	p := &server.UpgradePlan{Level: b.Level, Next: 2, Ready: b.Level < 2, Advice: "nothing to do"}
	if p.Ready {
		p.Advice = "twinsan upgrade apply"
	}
	for _, n := range b.State.Nodes {
		p.Nodes = append(p.Nodes, server.UpgradeNode{Name: n.Name, Version: n.Version, Level: 2})
	}
	return p, nil
}

// RaiseLevel sets Level.
func (b *Backend) RaiseLevel(_ context.Context, level int) error {
	if err := b.begin(fmt.Sprintf("RaiseLevel %d", level)); err != nil {
		return err
	}
	defer b.Mu.Unlock()
	b.Level = level
	return nil
}
