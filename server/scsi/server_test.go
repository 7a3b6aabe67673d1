package scsi_test

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

// What a configuration leaves out is the default: 512e.
func TestDefaults(t *testing.T) {
	r := newRig(t, mib, func(c *scsi.LUConfig) { c.LogicalBlock, c.PhysicalBlock = 0, 0 })
	if got := r.good(r.read(readCapacity16(32), 32)).in; got[10] != 2 || got[11] != 0 || got[13] != 3 {
		t.Errorf("READ CAPACITY(16) %x", got)
	}
	s := scsi.New(scsi.Config{Backend: memlu.New(0)})
	defer s.Close()
	c := unitConfig(0, memlu.New(0))
	if err := s.SetLU(c); !errors.Is(err, scsi.ErrInvalidLU) {
		t.Errorf("a volume without blocks: %v", err)
	}
	defer func() {
		if recover() == nil {
			t.Error("no Backend, no panic")
		}
	}()
	scsi.New(scsi.Config{})
}

// Replies come from Execute as from TryExecute, with a unit and without.
func TestRepliesFromExecute(t *testing.T) {
	r := newRig(t, mib, nil)
	for _, lun := range []uint64{0, 1 << 48} {
		p := r.on(r.n, lun)
		tried := r.good(p.run(command{cdb: inq(0, 0, 255), read: true, expected: 255}))
		executed := r.good(p.run(command{cdb: inq(0, 0, 255), read: true, expected: 255, noTry: true}))
		if !tried.tried || executed.tried || !bytes.Equal(tried.in, executed.in) {
			t.Errorf("LUN %x: %x, %x", lun, tried.in, executed.in)
		}
	}
	// A task without a unit that was answered counts as aborted.
	k := r.on(r.n, 1<<48).newTask(command{cdb: inq(0, 0, 255), read: true, expected: 255})
	r.s.Begin(k)
	k.In = make([]byte, k.InLen)
	r.s.TryExecute(k)
	if a := r.manage(r.n, scsi.AbortTask, 1<<48, k); a != scsi.FunctionComplete {
		t.Errorf("answer %d", a)
	}
}

// FUA reads go past what may be volatile.
func TestForceUnitAccess(t *testing.T) {
	for _, volatile := range []bool{false, true} {
		r := newRig(t, 512*mib, func(c *scsi.LUConfig) { c.VolatileCache = volatile })
		var fua []bool
		if res := r.good(r.read(rw10(cdb.Read10, cdb.FUA, 0, 1), 512)); res.tried == volatile {
			t.Errorf("WCE %v: FUA read answered from memory: %v", volatile, res.tried)
		}
		r.lu.SetFail(func(q *scsi.Request) error { fua = append(fua, q.FUA); return nil })
		r.good(r.read(rw10(cdb.Read10, cdb.FUA, 0, 1), 512))
		r.good(r.read(rw10(cdb.Read10, cdb.DPO, 0, 1), 512))
		r.good(r.write(rw16(cdb.Write16, cdb.FUA, 0, 1), pattern(512, 1)))
		r.good(r.write(rw16(cdb.Write16, 0, 0, 1), pattern(512, 1)))
		r.good(r.write([]byte{cdb.Write6, 0x08, 0, 0, 1, 0}, pattern(512, 1))) // an LBA bit, no FUA
		r.good(r.write(rw10(cdb.WriteAndVerify10, 0, 0, 1), pattern(512, 1)))
		want := []bool{true, false, true, false, false, true, true}
		if len(fua) != len(want) {
			t.Fatalf("%d requests", len(fua))
		}
		for i := range want {
			if fua[i] != want[i] {
				t.Errorf("request %d: FUA %v", i, fua[i])
			}
		}
	}
}

// The last step of a command may find the device server closed.
func TestCloseEndsCommands(t *testing.T) {
	lu := memlu.New(16 * mib)
	s := scsi.New(scsi.Config{Backend: lu, TargetName: target})
	r := &rig{t: t, s: s, lu: lu}
	if err := s.SetLU(unitConfig(0, lu)); err != nil {
		t.Fatal(err)
	}
	s.SetAccess(0, scsi.Visibility{Any: true})
	r.n = r.attach(initiator, 1)
	lu.Hold()
	f := r.on(r.n, 0).launch(command{cdb: rw10(cdb.Verify10, 0, 0, 2000)}, true)
	s.Close()
	lu.Release()
	if f.completed != 1 || f.status != cdb.Busy {
		t.Errorf("completed %d times, status %02x", f.completed, f.status)
	}
}

// Latencies come from the clock that was given.
func TestInjectedClock(t *testing.T) {
	var mu sync.Mutex
	now := time.Unix(1000, 0)
	lu := memlu.New(mib)
	s := scsi.New(scsi.Config{Backend: lu, NodePort: 1, PortGroup: 1, Now: func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		now = now.Add(3 * time.Microsecond)
		return now
	}})
	defer s.Close()
	r := &rig{t: t, s: s, lu: lu}
	if err := s.SetLU(unitConfig(0, lu)); err != nil {
		t.Fatal(err)
	}
	s.SetAccess(0, scsi.Visibility{Any: true})
	r.n = r.attach(initiator, 1)
	r.good(r.read(rw10(cdb.Read10, 0, 0, 1), 512))
	c := s.Stats()[0].Classes[scsi.ClassRead]
	if c.Nanoseconds != 3000 || c.Latency[2] != 1 || scsi.LatencyBound(2) != 4*time.Microsecond {
		t.Errorf("%+v", c)
	}
}

// Of path states that are read out of order the one asked for last stays.
func TestPathsAnsweredOutOfOrder(t *testing.T) {
	slow, resume := make(chan struct{}), make(chan struct{})
	var mu sync.Mutex
	state, stall := scsi.ActiveOptimized, false
	r := newRig(t, mib, func(c *scsi.LUConfig) {
		c.Paths = func() []scsi.PortGroup {
			mu.Lock()
			g := []scsi.PortGroup{{ID: 1, Ports: []uint16{2}, State: state}}
			wait := stall
			stall = false
			mu.Unlock()
			if wait {
				close(slow)
				<-resume
			}
			return g
		}
	})
	stall = true
	var wg sync.WaitGroup
	wg.Go(func() { r.s.PathsChanged(0) })
	<-slow
	mu.Lock()
	state = scsi.Standby
	mu.Unlock()
	r.s.PathsChanged(0)
	close(resume)
	wg.Wait()
	r.on(r.n, 0).run(requestSenseIn)
	r.refused(r.on(r.n, 0).run(unitReadyCmd), code{2, 4, 0x0b})
}

// The list of all units that a node can have is complete.
func TestReportManyLUNs(t *testing.T) {
	r := newRig(t, mib, nil)
	v := memlu.New(4096)
	for lun := range uint16(scsi.MaxLUs) {
		if lun == 0 {
			continue
		}
		if err := r.s.SetLU(unitConfig(lun*16, v)); err != nil {
			t.Fatal(err)
		}
		r.s.SetAccess(lun*16, scsi.Visibility{Any: true})
	}
	want := command{cdb: []byte{cdb.ReportLUNs, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0}, read: true, expected: 1 << 31}
	res := r.good(r.do(want))
	if len(res.in) != 8+8*scsi.MaxLUs || res.transfer != uint32(len(res.in)) {
		t.Fatalf("%d bytes", len(res.in))
	}
	for i := range scsi.MaxLUs {
		if lun, ok := cdb.DecodeLUN(be64(res.in[8+8*i:])); !ok || int(lun) != 16*i {
			t.Fatalf("entry %d: %x", i, res.in[8+8*i:][:8])
		}
	}
}
