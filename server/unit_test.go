package server

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
	"github.com/twinsan/twinsan/server/scsi"
)

func TestReasons(t *testing.T) {
	for _, test := range []struct {
		r                 Refusal
		code, label, want string
	}{
		{Refusal{Status: 2, Key: 7, ASC: 0x27, ASCQ: 7}, "07/27/07", "pool_full", "pool full"},
		{Refusal{Status: 2, Key: 7, ASC: 0x27, ASCQ: 2}, "07/27/02", "write_protected", "read-only"},
		{Refusal{Status: 2, Key: 7}, "07/00/00", "write_protected", "protected"},
		{Refusal{Status: 0x18}, "18h", "reservation_conflict", "reservation conflict"},
		{Refusal{Status: 8}, "08h", "busy", "busy"},
		{Refusal{Status: 0x28}, "28h", "busy", "task set full"},
		{Refusal{Status: 0x40}, "40h", "aborted", "aborted"},
		{Refusal{}, "--", "other", "other reasons"},
		{Refusal{Status: 0x30}, "30h", "other", "another status"},
		{Refusal{Status: 2}, "02h", "check_condition", "sense"},
		{Refusal{Status: 2, Key: 0xe, ASC: 0x1d}, "0E/1D/00", "miscompare", "another host"},
		{Refusal{Status: 2, Key: 5, ASC: 0x20}, "05/20/00", "not_supported", "not supported"},
		{Refusal{Status: 2, Key: 5, ASC: 0x23, ASCQ: 9}, "05/23/09", "bad_token", "token"},
		{Refusal{Status: 2, Key: 5, ASC: 0x26, ASCQ: 8}, "05/26/08", "copy_limits", "segments"},
		{Refusal{Status: 2, Key: 5, ASC: 0x26, ASCQ: 2}, "05/26/02", "bad_parameters", "parameter list"},
		{Refusal{Status: 2, Key: 5, ASC: 0x55, ASCQ: 4}, "05/55/04", "too_many_registrations", "registration"},
		{Refusal{Status: 2, Key: 5, ASC: 0x99}, "05/99/00", "illegal_request", "illegal"},
		{Refusal{Status: 2, Key: 0xa, ASC: 0x0d, ASCQ: 2}, "0A/0D/02", "copy_unreachable", "not reachable"},
		{Refusal{Status: 2, Key: 2, ASC: 4, ASCQ: 0xa}, "02/04/0A", "path_transition", "transition"},
		{Refusal{Status: 2, Key: 0xf, ASC: 1}, "0F/01/00", "other", "another reason"},
	} {
		label, words := test.r.Reason()
		if test.r.Code() != test.code || label != test.label || !strings.Contains(words, test.want) {
			t.Errorf("%+v: %s %s %q", test.r, test.r.Code(), label, words)
		}
	}
	// No row hides behind a family that stands before it.
	for i, row := range senseReasons {
		for _, before := range senseReasons[:i] {
			if before.key == row.key && (before.asc == any8 || before.asc == row.asc && (before.ascq == any8 || before.ascq == row.ascq)) {
				t.Errorf("row %+v is never found: %+v comes first", row, before)
			}
		}
	}
	if got := byReason([]Refusal{{Status: 8, Count: 2}, {Status: 0x28, Count: 3}, {Status: 0x18, Count: 1}}); !slices.Equal(got, []labelled{{"busy", 5}, {"reservation_conflict", 1}}) {
		t.Errorf("by reason %+v", got)
	}
}

func TestCountsAddUp(t *testing.T) {
	full, conflict := Refusal{Status: 2, Key: 7, ASC: 0x27, ASCQ: 7, Count: 1}, Refusal{Status: 0x18, Count: 2}
	a := []ClassCount{{Class: "write", Commands: 10, Good: 7, Bytes: 100, Nanoseconds: 5, Refused: []Refusal{full, conflict}}}
	b := []ClassCount{{Class: "caw", Commands: 1, Good: 1}, {Class: "write", Commands: 4, Good: 1, Bytes: 1, Nanoseconds: 1, Refused: []Refusal{{Status: 2, Key: 7, ASC: 0x27, ASCQ: 7, Count: 3}}}}
	sum := addCounts(addCounts(nil, a), b)
	want := []ClassCount{
		{Class: "write", Commands: 14, Good: 8, Bytes: 101, Nanoseconds: 6, Refused: []Refusal{{Status: 2, Key: 7, ASC: 0x27, ASCQ: 7, Count: 4}, conflict}},
		{Class: "caw", Commands: 1, Good: 1},
	}
	if !reflect.DeepEqual(sum, want) {
		t.Errorf("sum %+v", sum)
	}
	if a[0].Commands != 10 || a[0].Refused[0].Count != 1 {
		t.Errorf("a summand was changed: %+v", a)
	}
	offloads := Offloads(append(sum, ClassCount{Class: "odx_write", Commands: 2, Refused: []Refusal{{Status: 8, Count: 1}, {Status: 2, Key: 6, Count: 1}}}, ClassCount{Class: "odx_populate", Commands: 1, Good: 1}))
	if want := []Offload{{"ATS", true, 0}, {"WRITE SAME", false, 0}, {"UNMAP", false, 0}, {"XCOPY", false, 0}, {"ODX", true, 1}}; !slices.Equal(offloads, want) {
		t.Errorf("offloads %+v", offloads)
	}
}

func TestClassCounts(t *testing.T) {
	var u scsi.LUStats
	u.Classes[scsi.ClassWrite] = scsi.ClassStats{Good: 5, Conflicts: 2, Busy: 1, Aborted: 1, CheckConditions: 3, Bytes: 9, Nanoseconds: 8,
		Refused: []scsi.Refusal{{Status: 0x18, Count: 2}, {Status: 8, Count: 1}, {Status: 2, Key: 7, ASC: 0x27, ASCQ: 7, Count: 1}, {Count: 1}}}
	got := classCounts(&u)
	if len(got) != 1 || got[0].Class != "write" || got[0].Commands != 12 || got[0].Good != 5 || got[0].Bytes != 9 || got[0].Nanoseconds != 8 {
		t.Errorf("counts %+v", got)
	}
	want := []Refusal{{Status: 0x18, Count: 2}, {Status: 8, Count: 1}, {Status: 2, Key: 7, ASC: 0x27, ASCQ: 7, Count: 1}, {Count: 1}, {Status: 2, Key: 6, Count: 2}}
	if !slices.Equal(got[0].Refused, want) {
		t.Errorf("refused %+v", got[0].Refused)
	}
}

func TestFillAlarm(t *testing.T) {
	var a fillAlarm
	type news struct {
		mark int
		up   bool
	}
	for i, step := range []struct {
		percent int
		want    news
	}{
		{10, news{}}, {70, news{70, true}}, {75, news{}}, {69, news{}}, {71, news{}}, {68, news{70, false}}, {70, news{70, true}},
		{95, news{90, true}}, {89, news{}}, {85, news{90, false}}, {79, news{}}, {80, news{}}, {90, news{90, true}}, {0, news{90, false}},
	} {
		mark, up := a.step(step.percent)
		if (news{mark, up}) != step.want {
			t.Errorf("step %d, %d %%: %d %v", i, step.percent, mark, up)
		}
	}
}

func TestWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ran atomic.Int32
		w := newWorker(time.Minute, func(ctx context.Context) {
			if ran.Add(1) == 3 {
				<-ctx.Done() // it ends with its context
			}
		})
		w.poke()
		synctest.Wait()
		if ran.Load() != 1 {
			t.Errorf("woken once, ran %d times", ran.Load())
		}
		<-time.After(time.Minute)
		synctest.Wait()
		if ran.Load() != 2 {
			t.Errorf("after its period it ran %d times", ran.Load())
		}
		for range 10 {
			w.poke()
		}
		synctest.Wait()
		w.close()
		if ran.Load() != 3 {
			t.Errorf("woken together, ran %d times", ran.Load())
		}
		(*worker)(nil).close()
	})
}

func TestReservationsTranslated(t *testing.T) {
	state := &cluster.State{
		Nodes: []*cluster.Node{{ID: 1, Name: "a", Role: cluster.RoleData}, {ID: 2, Name: "b", Role: cluster.RoleData}},
		Hosts: []*cluster.Host{{Name: "hv1", Initiators: []string{"iqn.x"}}},
	}
	if r := reservationsOf(state, &scsi.ReservationReport{Generation: 7}); r != nil || !r.Empty() {
		t.Errorf("nothing is %+v", r)
	}
	r := reservationsOf(state, &scsi.ReservationReport{Generation: 7, Type: 5, Registrations: []scsi.Registration{{Initiator: "iqn.x", Port: 2, Key: 9, Holder: true}, {Initiator: "iqn.y", Port: 5}}})
	want := &Reservations{Generation: 7, Type: "write exclusive, registrants only", Registrations: []Registration{
		{Host: "hv1", Initiator: "iqn.x", Node: "b", Key: 9, Holder: true}, {Initiator: "iqn.y", Node: "port 5"}}}
	if !reflect.DeepEqual(r, want) {
		t.Errorf("got %+v", r)
	}
	if r := reservationsOf(state, &scsi.ReservationReport{Type: 2, Reserve: &scsi.Registration{Initiator: "iqn.x", Port: 1}}); r.Type != "type 2" || r.Reserve.Node != "a" || r.Empty() {
		t.Errorf("got %+v", r)
	}
}

func TestStuck(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*Status)
		want   string
	}{
		{"healthy", func(*Status) {}, ""},
		{"stale", func(s *Status) { s.Volumes[0].Replicas[1].State = ReplicaStale }, "volume vm would have nowhere to go: the copy on node b is not in sync"},
		{"down", func(s *Status) { s.Volumes[0].Replicas[1].State = ReplicaDown }, "node b does not answer"},
		{"drained", func(s *Status) { s.Nodes[1].Draining = true }, "node b is drained or starting"},
		{"starting", func(s *Status) { s.Nodes[1].State = NodeStarting }, "node b is drained or starting"},
		{"one copy", func(s *Status) { s.Volumes[0].Replicas = s.Volumes[0].Replicas[:1] }, "it has no other copy"},
		{"deleting", func(s *Status) { s.Volumes[0].State, s.Volumes[0].Replicas[1].State = VolumeDeleting, ReplicaDown }, ""},
		{"not here", func(s *Status) { s.Volumes[0].Replicas = s.Volumes[0].Replicas[1:] }, ""},
	} {
		s := picture()
		for i := range s.Nodes {
			s.Nodes[i].State = NodeUp
		}
		s.Volumes[0].Replicas[0].Owner = true
		test.change(s)
		if got := stuck(s, "a"); (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%s: %q", test.name, got)
		}
	}
}

func TestMergeUnit(t *testing.T) {
	s, r := picture(), answers()
	v := &s.Volumes[0]
	v.Hosts = []string{"hv1"}
	v.Paths = []Path{{Node: "a", State: PathOptimized}, {Node: "b", State: PathNonOptimized}}
	held := &Reservations{Type: "write exclusive"}
	r[1].report.Volumes[0].Room, r[1].report.Volumes[0].Reservations = 77, held
	r[1].report.Volumes[0].Counts = []ClassCount{{Class: "read", Commands: 1, Good: 1}}
	r[2].report.Volumes[0].Room, r[2].report.Volumes[0].Reservations = 55, &Reservations{Type: "old"}
	r[2].report.Volumes[0].Counts = []ClassCount{{Class: "read", Commands: 2, Good: 2}}
	r[2].report.Volumes[0].Served = false
	r[1].report.Sessions = []Session{{Host: "hv1"}, {Host: "hv2"}, {}}
	r[2].report.Sessions = []Session{{Host: "hv1"}}
	s.Nodes[1].Draining = true
	merge(s, r)
	if v.Room != 77 || v.Reservations != held || len(v.Counts) != 1 || v.Counts[0].Commands != 3 {
		t.Errorf("volume %+v", v)
	}
	if want := []Path{{Node: "a", State: PathOptimized, Sessions: 1}, {Node: "b", State: PathUnavailable, Sessions: 1}}; !reflect.DeepEqual(v.Paths, want) {
		t.Errorf("paths %+v", v.Paths)
	}
	if !slices.ContainsFunc(s.Problems, func(p Problem) bool {
		return p.Code == "node-draining" && p.Severity == Healthy && p.Remedy == "twinsan node resume b"
	}) {
		t.Errorf("problems %+v", s.Problems)
	}
}

func TestMayMove(t *testing.T) {
	a, b, w := &cluster.Node{ID: 1, Name: "a", Role: cluster.RoleData}, &cluster.Node{ID: 2, Name: "b", Role: cluster.RoleData}, &cluster.Node{ID: 3, Name: "w", Role: cluster.RoleWitness}
	c := &cluster.Node{ID: 4, Name: "c", Role: cluster.RoleData}
	drained := &cluster.Node{ID: 2, Name: "b", Role: cluster.RoleData, Draining: true}
	for _, test := range []struct {
		name   string
		to     *cluster.Node
		inSync []replication.NodeID
		want   error
		text   string
	}{
		{"good", b, []replication.NodeID{1, 2}, nil, ""},
		{"the owner", a, []replication.NodeID{1}, nil, ""},
		{"unknown", nil, []replication.NodeID{1, 2}, ErrNotFound, `node "x"`},
		{"witness", w, []replication.NodeID{1, 2}, ErrInvalid, "witness"},
		{"no copy", c, []replication.NodeID{1, 2}, ErrRefused, "has no copy"},
		{"stale", b, []replication.NodeID{1}, ErrRefused, "not in sync"},
		{"drained", drained, []replication.NodeID{1, 2}, ErrRefused, "twinsan node resume b"},
	} {
		v := &cluster.Volume{Name: "vm", Record: replication.Record{Owner: 1, InSync: test.inSync, Replicas: []replication.Replica{{Node: 1}, {Node: 2}}}}
		err := mayMove(&cluster.State{}, v, test.to, "x")
		if !errors.Is(err, test.want) || err != nil && !strings.Contains(err.Error(), test.text) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}
