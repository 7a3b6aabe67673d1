package server

import (
	"context"
	"fmt"

	"github.com/twinsan/twinsan/server/cluster"
	"github.com/twinsan/twinsan/server/scsi"
)

// Reservations is who has registered with and reserved a volume.
type Reservations struct {
	Generation    uint32
	Persist       bool   // asked to survive the loss of power; they do in any case
	Type          string // of the persistent reservation, in words; empty: none
	Registrations []Registration
	Reserve       *Registration // holder by RESERVE, without a key; nil: none
}

// Empty says that there is nothing to clear.
func (r *Reservations) Empty() bool {
	return r == nil || r.Type == "" && len(r.Registrations) == 0 && r.Reserve == nil
}

// Registration is one path of an initiator that is registered.
type Registration struct {
	Host      string // empty: an initiator of no host
	Initiator string
	ISID      [6]byte
	Node      string // whose port it is
	Key       uint64
	Holder    bool
}

// reservationTypes are the types of persistent reservations (SPC-4).
var reservationTypes = map[byte]string{
	1: "write exclusive", 3: "exclusive access", 5: "write exclusive, registrants only", 6: "exclusive access, registrants only",
	7: "write exclusive, all registrants", 8: "exclusive access, all registrants",
}

// reservationsOf translates what the device server knows of a volume; nil when it
// knows nothing.
func reservationsOf(state *cluster.State, r *scsi.ReservationReport) *Reservations {
	translate := func(x *scsi.Registration) Registration {
		out := Registration{Initiator: x.Initiator, ISID: x.ISID, Node: fmt.Sprintf("port %d", x.Port), Key: x.Key, Holder: x.Holder}
		for _, n := range state.Nodes {
			if n.Role == cluster.RoleData && n.RelativePort() == x.Port {
				out.Node = n.Name
			}
		}
		if h := state.HostOf(x.Initiator); h != nil {
			out.Host = h.Name
		}
		return out
	}
	out := &Reservations{Generation: r.Generation, Persist: r.Persist}
	if r.Type != 0 {
		if out.Type = reservationTypes[r.Type]; out.Type == "" {
			out.Type = fmt.Sprintf("type %d", r.Type)
		}
	}
	for i := range r.Registrations {
		out.Registrations = append(out.Registrations, translate(&r.Registrations[i]))
	}
	if r.Reserve != nil {
		x := translate(r.Reserve)
		out.Reserve = &x
	}
	if out.Empty() {
		return nil
	}
	return out
}

// ClearReservations drops all reservations and registrations of a volume, on its
// owner. What was there is returned; with dryRun nothing changes. A node that is
// not the owner asks it, unless ownerOnly.
func (n *Node) ClearReservations(ctx context.Context, name string, dryRun, ownerOnly bool) (*Volume, *Reservations, error) {
	state, v, err := n.volumeNamed(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	out, err := n.described(ctx, v.ID)
	if err != nil {
		return nil, nil, err
	}
	before := out.Reservations
	if dryRun {
		return out, before, nil
	}
	if err := n.atOwner(state, v, ownerOnly,
		func(parts *serving) error { return n.clearHere(ctx, parts, v, before) },
		func(p Peers, owner *cluster.Node) error {
			return p.ClearReservations(ctx, owner.ID, n.api(owner), v.UUID.String())
		}); err != nil {
		return nil, nil, err
	}
	out.Reservations = nil
	return out, before, nil
}

func (n *Node) clearHere(ctx context.Context, parts *serving, v *cluster.Volume, before *Reservations) error {
	done := make(chan error, 1)
	parts.scsi.ClearReservations(v.LUN, func(err error) { done <- err })
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("clear the reservations of volume %s: %w: %w", v.Name, ErrNotReady, err)
		}
	case <-ctx.Done():
		return fmt.Errorf("clear the reservations of volume %s: %w: %w", v.Name, ErrOutcomeUnknown, ctx.Err())
	}
	text := "there was none"
	if !before.Empty() {
		text = fmt.Sprintf("%d registrations, reserved: %s", len(before.Registrations), orNothing(before.Type))
	}
	return n.cluster.AddEvent(ctx, cluster.Warning, "reservations-cleared", fmt.Sprintf("an administrator cleared the reservations of volume %s (%s)", v.Name, text))
}

func orNothing(s string) string {
	if s == "" {
		return "no"
	}
	return s
}

// atOwner calls here on the node that owns a volume: this one, or through peers.
func (n *Node) atOwner(state *cluster.State, v *cluster.Volume, ownerOnly bool, here func(*serving) error, there func(Peers, *cluster.Node) error) error {
	owner := state.Node(v.Record.Owner)
	switch {
	case owner == nil:
		return fmt.Errorf("volume %s has no owner: %w", v.Name, ErrNotReady)
	case owner.ID == n.cluster.Self():
		parts := n.serving.Load()
		if parts == nil {
			return fmt.Errorf("node %s is starting: %w", n.id.Name, ErrNotReady)
		}
		return here(parts)
	case ownerOnly:
		return fmt.Errorf("node %s owns volume %s: %w", owner.Name, v.Name, ErrNotReady)
	}
	peers := n.peers.Load()
	if peers == nil || owner.API == "" {
		return fmt.Errorf("node %s owns volume %s and cannot be asked: %w", owner.Name, v.Name, ErrNotReady)
	}
	return there(*peers, owner)
}
