package scsi_test

import (
	"errors"
	"reflect"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
)

// clearReservations runs an administrator's CLEAR and waits for it.
func (r *rig) clearReservations(lun uint16) error {
	r.t.Helper()
	done := make(chan error, 1)
	r.s.ClearReservations(lun, func(err error) { done <- err })
	return <-done
}

// What an administrator sees is the same through every node, and what he clears is
// gone on every node; those who had registered are told.
func TestReservationReport(t *testing.T) {
	c := newCluster(t)
	a, b, w := c.a.host("iqn.a", 1), c.b.host("iqn.b", 2), c.b.host("iqn.w", 3)
	a.pr(register, 0, 0, 0xa1)
	b.good(b.run(prOut(register, 0, 0, 0xb1, 1))) // APTPL
	b.pr(reserve, 5, 0xb1, 0)
	want := scsi.ReservationReport{Generation: 2, Persist: true, Type: 5, Registrations: []scsi.Registration{
		{Initiator: "iqn.a", ISID: a.nexus.ISID, Port: 1, Key: 0xa1},
		{Initiator: "iqn.b", ISID: b.nexus.ISID, Port: 128, Key: 0xb1, Holder: true},
	}}
	for _, r := range []*rig{c.a, c.b} {
		if got := r.s.Reservations(0); !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v", got)
		}
	}
	w.conflicts(writeBlock0)
	if err := c.a.clearReservations(0); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*rig{c.a, c.b} {
		if got := r.s.Reservations(0); got.Type != 0 || len(got.Registrations) != 0 || got.Reserve != nil || got.Generation != 3 {
			t.Errorf("after it: %+v", got)
		}
	}
	a.expect(uaCleared)
	b.expect(uaCleared)
	w.good(w.run(writeBlock0))
	if err := c.b.clearReservations(0); err != nil { // there is nothing left
		t.Error(err)
	}

	w.good(w.run(reserve6))
	if got := c.a.s.Reservations(0).Reserve; got == nil || got.Initiator != "iqn.w" || got.Port != 128 {
		t.Errorf("RESERVE: %+v", got)
	}
	a.conflicts(writeBlock0)
	if err := c.a.clearReservations(0); err != nil {
		t.Fatal(err)
	}
	a.good(a.run(writeBlock0))

	if got := c.a.s.Reservations(9); !reflect.DeepEqual(got, scsi.ReservationReport{}) {
		t.Errorf("unknown LUN: %+v", got)
	}
	if err := c.a.clearReservations(9); !errors.Is(err, scsi.ErrUnavailable) {
		t.Errorf("unknown LUN: %v", err)
	}
	third := scsi.New(scsi.Config{Backend: c.lu, NodePort: 3, PortGroup: 3, TargetName: target})
	if err := third.SetLU(unitConfig(0, c.lu.Path())); err != nil {
		t.Fatal(err)
	}
	third.Close()
	if err := (&rig{t: t, s: third}).clearReservations(0); !errors.Is(err, scsi.ErrUnavailable) {
		t.Errorf("closed: %v", err)
	}
}
