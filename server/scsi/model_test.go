package scsi_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

// Random commands against a plain byte slice, on every geometry, with the
// volume completing at once or later. A failure prints its seed.
func TestAgainstModel(t *testing.T) {
	for _, g := range []struct{ logical, physical uint32 }{{512, 4096}, {512, 512}, {4096, 4096}} {
		for _, async := range []bool{false, true} {
			for seed := range uint64(4) {
				t.Run(fmt.Sprintf("%d/%d/async=%v/seed=%d", g.logical, g.physical, async, seed), func(t *testing.T) {
					testModel(t, g.logical, g.physical, async, seed)
				})
			}
		}
	}
}

func testModel(t *testing.T, logical, physical uint32, async bool, seed uint64) {
	const size = mib
	r := newRig(t, size, func(c *scsi.LUConfig) { c.LogicalBlock, c.PhysicalBlock = logical, physical })
	if async {
		r.lu.StartAsync(func() {})
		defer r.lu.Close()
	}
	rng := rand.New(rand.NewPCG(seed, uint64(logical)))
	model := make([]byte, size)
	b := int(logical)
	blocks := size / b
	span := func(most int) (lba, n int) {
		n = 1 + rng.IntN(min(most, blocks))
		return rng.IntN(blocks - n + 1), n
	}
	fill := func(n int) []byte {
		d := make([]byte, n)
		if rng.IntN(4) > 0 {
			for i := range d {
				d[i] = byte(rng.Uint32())
			}
		}
		return d
	}
	for step := range 400 {
		r.lu.SetCached(rng.IntN(2) == 0)
		what := rng.IntN(9)
		switch what {
		case 0, 1:
			lba, n := span(64)
			d := fill(n * b)
			f := byte(rng.IntN(2) * cdb.FUA)
			c := [][]byte{rw10(cdb.Write10, f, uint32(lba), uint16(n)), rw12(cdb.Write12, f, uint32(lba), uint32(n)),
				rw16(cdb.Write16, f, uint64(lba), uint32(n)), rw10(cdb.WriteAndVerify10, 2, uint32(lba), uint16(n))}[rng.IntN(4)]
			r.good(r.write(c, d))
			copy(model[lba*b:], d)
		case 2:
			lba, n := span(64)
			e := 1 + rng.IntN(n*b)
			if got := r.good(r.read(rw16(cdb.Read16, 0, uint64(lba), uint32(n)), e)).in; !bytes.Equal(got, model[lba*b:][:e]) {
				t.Fatalf("step %d: partial READ differs", step)
			}
		case 3:
			var list []byte
			var ranges [][2]uint64
			for range rng.IntN(5) {
				lba, n := span(100)
				n *= rng.IntN(4) & 1
				ranges = append(ranges, [2]uint64{uint64(lba), uint64(n)})
				clear(model[lba*b : (lba+n)*b])
			}
			list = cdb.AppendUnmap(nil, ranges...)
			r.good(r.write(unmapCDB(len(list)), list))
		case 4:
			lba, n := span(300)
			d := fill(b)
			f := byte(rng.IntN(2) * 8)
			r.good(r.write(rw16(cdb.WriteSame16, f, uint64(lba), uint32(n)), d))
			for i := range n {
				copy(model[(lba+i)*b:], d)
			}
		case 5, 6:
			lba, n := span(5)
			want := bytes.Clone(model[lba*b : (lba+n)*b])
			at := -1
			if what == 6 {
				at = rng.IntN(len(want))
				want[at] ^= byte(1 + rng.IntN(255))
			}
			d := fill(n * b)
			res := r.write(caw(0, uint64(lba), byte(n)), append(want, d...))
			if at >= 0 {
				if r.refused(res, miscompare); res.sense.Info != uint64(at) {
					t.Fatalf("step %d: miscompare at %d, want %d", step, res.sense.Info, at)
				}
				continue
			}
			r.good(res)
			copy(model[lba*b:], d)
		case 7:
			lba, n := span(64)
			r.good(r.write(rw16(cdb.Verify16, 2, uint64(lba), uint32(n)), model[lba*b:][:n*b]))
		case 8:
			lba, _ := span(64)
			res := r.write(rw10(cdb.Write10, 0, uint32(lba), uint16(blocks-lba+1)), fill(b))
			r.refused(res, badLBA)
		}
		if step%20 == 0 {
			if got := r.good(r.read(rw16(cdb.Read16, 0, 0, uint32(blocks)), size)).in; !bytes.Equal(got, model) {
				t.Fatalf("step %d: the medium differs from the model", step)
			}
		}
	}
	if s := r.s.Stats()[0]; s.InFlight != 0 {
		t.Errorf("%d commands still in flight", s.InFlight)
	}
}

// Many nexuses, resets, changes of access, size and paths at the same time:
// every task is completed exactly once, resets end, and what a nexus wrote last
// in its own part is what it reads.
func TestConcurrent(t *testing.T) {
	lu := memlu.New(16 * mib)
	s := scsi.New(scsi.Config{Backend: lu, NodePort: 1, PortGroup: 1, TargetName: target})
	lu.StartAsync(func() {})
	r := &rig{t: t, s: s, lu: lu}
	if err := s.SetLU(unitConfig(0, lu)); err != nil {
		t.Fatal(err)
	}
	s.SetAccess(0, scsi.Visibility{Any: true})
	const workers, rounds = 4, 300
	var wg, disturb sync.WaitGroup
	stop := make(chan struct{})
	disturb.Go(func() {
		n, err := s.Attach("iqn.2026-11.test:disturber", [6]byte{1})
		if err != nil {
			t.Error(err)
			return
		}
		for i := 0; ; i++ {
			select {
			case <-stop:
				s.Detach(n, true)
				return
			default:
			}
			done := make(chan scsi.TaskResponse, 1)
			switch i % 6 {
			case 0:
				s.TaskManagement(n, scsi.LogicalUnitReset, 0, nil, func(a scsi.TaskResponse) { done <- a })
				<-done
			case 1:
				s.TaskManagement(n, scsi.ClearTaskSet, 0, nil, func(a scsi.TaskResponse) { done <- a })
				<-done
			case 2:
				s.PathsChanged(0)
			case 3:
				lu.Resize(uint64(16+i%2) * mib)
				s.CapacityChanged(0)
			case 4:
				if err := s.SetLU(unitConfig(9, lu)); err != nil {
					t.Error(err)
				}
				s.SetAccess(9, scsi.Visibility{Any: true})
			case 5:
				s.RemoveLU(9)
				s.Stats()
			}
		}
	})
	for w := range workers {
		wg.Go(func() {
			n, err := s.Attach(initiator, [6]byte{byte(w)})
			if err != nil {
				t.Error(err)
				return
			}
			p := r.on(n, 0)
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			base := uint32(w * 4096)
			for i := range rounds {
				data := pattern(2048, byte(i))
				c := command{cdb: rw10(cdb.Write10, 0, base, 4), write: true, expected: 2048, out: data}
				if rng.IntN(4) == 0 {
					c.cdb = rw10(cdb.WriteAndVerify10, 2, base, 4)
				}
				if !p.persist(c) {
					t.Error("write failed")
					return
				}
				list := cdb.AppendUnmap(nil, [2]uint64{uint64(base) + 100, 8}, [2]uint64{uint64(base) + 200, 8})
				p.run(command{cdb: unmapCDB(len(list)), write: true, expected: uint32(len(list)), out: list})
				for {
					res := p.run(command{cdb: rw10(cdb.Read10, 0, base, 4), read: true, expected: 2048, noTry: i%2 == 0})
					if res.status != cdb.Good {
						continue
					}
					if !bytes.Equal(res.in, data) {
						t.Error("read differs from what was written last")
						return
					}
					break
				}
			}
			s.Detach(n, false)
		})
	}
	wg.Wait()
	close(stop)
	disturb.Wait()
	for _, u := range s.Stats() {
		if u.InFlight != 0 {
			t.Errorf("LUN %d: %d in flight", u.LUN, u.InFlight)
		}
	}
	lu.Close()
	s.Close()
}

// persist repeats a command until it is GOOD, through unit attentions and aborts.
func (p port) persist(c command) bool {
	for range 10000 {
		switch res := p.run(c); res.status {
		case cdb.Good:
			return true
		case cdb.TaskAborted:
		case cdb.CheckCondition:
			if res.sense.Key != cdb.UnitAttention {
				return false
			}
		default:
			return false
		}
	}
	return false
}

// Nothing is allocated for a READ or a WRITE.
func TestDataPathDoesNotAllocate(t *testing.T) {
	r := newRig(t, 16*mib, nil)
	r.good(r.write(rw10(cdb.Write10, 0, 0, 8), pattern(4096, 1)))
	buf, out := make([]byte, 4096), pattern(4096, 2)
	k := r.on(r.n, 0).newTask(command{})
	completed := 0
	k.Complete = func(*scsi.Task) { completed++ }
	begin := func(c []byte, read bool) scsi.Verdict {
		copy(k.CDB[:], c)
		k.Read, k.Write, k.Expected = read, !read, 4096
		return r.s.Begin(k)
	}
	readCDB, writeCDB := rw16(cdb.Read16, 0, 0, 8), rw16(cdb.Write16, 0, 0, 8)
	cawCDB, sameCDB := caw(0, 0, 4), rw16(cdb.WriteSame16, 0, 0, 8)
	for name, f := range map[string]func(){
		"TryExecute READ": func() {
			if begin(readCDB, true) != scsi.Ready {
				t.Fatal("not ready")
			}
			k.In = buf[:k.InLen]
			if !r.s.TryExecute(k) {
				t.Fatal("not answered")
			}
		},
		"Execute READ": func() {
			begin(readCDB, true)
			k.In = buf[:k.InLen]
			r.s.Execute(k)
		},
		"WRITE": func() {
			if begin(writeCDB, false) != scsi.WantData {
				t.Fatal("no data wanted")
			}
			k.Out, k.OutBorrowed = out[:k.OutLen], true
			r.s.Execute(k)
			r.s.Kick()
		},
		"COMPARE AND WRITE refused": func() {
			begin(cawCDB, false)
			k.Out, k.OutBorrowed = out[:k.OutLen], true
			r.s.Forget(k)
		},
		"WRITE SAME of a refused length": func() {
			if begin(sameCDB, false) != scsi.Finished {
				t.Fatal("not finished")
			}
		},
	} {
		before := completed
		if n := testing.AllocsPerRun(200, f); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
		if name == "WRITE" && (completed == before || k.Status != cdb.Good) {
			t.Errorf("%s: not completed", name)
		}
	}
}

// Any CDB, any flags, any data: no panic, bounds kept, one completion, and a
// command that was refused leaves the medium as it is.
func FuzzCommand(f *testing.F) {
	for _, c := range [][]byte{
		testUnitReady, requestSense, reportLUNsCDB, readBlock0, inq(1, 0x83, 255), modeSense10(0, 0x3f, 0xff), readCapacity16(32),
		rw10(cdb.Write10, 8, 1, 2), rw16(cdb.Write16, 0, 5, 1), caw(0, 1, 1), rw10(cdb.WriteSame10, 8, 0, 9), rw16(cdb.WriteSame16, 9, 0, 0),
		rw10(cdb.Verify10, 6, 0, 4), rw16(cdb.WriteAndVerify16, 2, 3, 2), rw16(cdb.PreFetch16, 0, 0, 0), rw10(cdb.SynchronizeCache10, 2, 0, 0),
		maintenanceIn(cdb.ActionReportOpcodes, 0x83, cdb.MaintenanceIn, 0x0c, 255), maintenanceIn(cdb.ActionReportTargetPorts|0x20, 0, 0, 0, 255),
		{cdb.SendDiagnostic, 0x10, 0, 0, 4, 0}, rw16(cdb.OrWrite16, 8, 1, 2), atomicCDB(8, 1, 0, 2), lbaStatus(3, 255),
		{cdb.WriteBuffer, 0x0a, 0, 0, 0, 0, 0, 4, 0, 0}, {cdb.ReadBuffer, 0x0a, 0, 0, 0, 0, 0, 4, 0, 0}, logSense(0x0c, 0, 255), logSense(0, 0xff, 255),
		{cdb.LogSelect, 2, 9: 0}, modeSense10(0, 0x1c, 0xff), sanitizeCDB(cdb.ActionSanitizeBlockErase, 0x80, 0), sanitizeCDB(cdb.ActionSanitizeExit, 0x20, 0),
	} {
		f.Add(c, uint64(0), byte(3), uint32(1024), make([]byte, 1024))
	}
	list := cdb.AppendUnmap(nil, [2]uint64{1, 8}, [2]uint64{9, 0}, [2]uint64{20, 3})
	f.Add(unmapCDB(len(list)), uint64(0), byte(2), uint32(len(list)), list)
	list = overwriteList(0x82, []byte{1, 2, 3})
	f.Add(sanitizeCDB(cdb.ActionSanitizeOverwrite, 0, len(list)), uint64(0), byte(2), uint32(len(list)), list)
	list = groupList(0, 2)
	f.Add(setGroups(len(list)), uint64(0), byte(2), uint32(len(list)), list)
	r := newRig(f, mib, func(c *scsi.LUConfig) {
		c.VolatileCache = true
		c.Paths = twoNodes
		c.Optimize = func(_ uint16, done func(error)) { done(nil) }
		c.Space = func() scsi.Space { return scsi.Space{Total: 100 * mib, Free: 50 * mib} }
	})
	state := func() []byte {
		q := scsi.Request{Op: scsi.OpReadState, Done: func(*scsi.Request) {}}
		r.lu.Submit(&q)
		return q.Value
	}
	medium := make([]byte, mib)
	image := func() []byte {
		r.lu.TryRead(0, medium)
		return medium
	}
	f.Fuzz(func(t *testing.T, c []byte, lun uint64, flags byte, expected uint32, out []byte) {
		q := *r
		q.t = t
		if uint32(len(out)) < expected && flags&2 != 0 {
			expected = uint32(len(out))
		}
		before, stated := bytes.Clone(image()), state()
		res := q.on(q.n, lun).run(command{cdb: c, read: flags&1 != 0, write: flags&2 != 0, extended: flags&4 != 0,
			noTry: flags&8 != 0, expected: expected, out: out})
		if res.status != cdb.Good && !bytes.Equal(before, image()) && !(len(c) > 0 && (c[0] == cdb.WriteAndVerify10 || c[0] == cdb.WriteAndVerify12 || c[0] == cdb.WriteAndVerify16)) {
			t.Fatalf("CDB %x was refused with %02x %x and changed the medium", c, res.status, res.code())
		}
		if res.status != cdb.Good && !bytes.Equal(stated, state()) {
			t.Fatalf("CDB %x was refused with %02x %x and changed the state", c, res.status, res.code())
		}
		if len(c) > 0 && c[0] == cdb.Sanitize {
			q.ready() // with IMMED it is answered before the end
		}
		if len(res.in) > int(expected) {
			t.Fatalf("CDB %x: %d bytes for %d expected", c, len(res.in), expected)
		}
	})
}

func BenchmarkTryExecuteRead4K(b *testing.B) {
	r := newRig(b, 16*mib, nil)
	buf := make([]byte, 4096)
	k := r.on(r.n, 0).newTask(command{cdb: rw10(cdb.Read10, 0, 0, 8), read: true, expected: 4096})
	b.ReportAllocs()
	for b.Loop() {
		r.s.Begin(k)
		k.In = buf
		r.s.TryExecute(k)
	}
}

func BenchmarkExecuteWrite4K(b *testing.B) {
	r := newRig(b, 16*mib, nil)
	buf := pattern(4096, 1)
	k := r.on(r.n, 0).newTask(command{cdb: rw10(cdb.Write10, 0, 0, 8), write: true, expected: 4096})
	k.Complete = func(*scsi.Task) {}
	b.ReportAllocs()
	for b.Loop() {
		r.s.Begin(k)
		k.Out, k.OutBorrowed = buf, true
		r.s.Execute(k)
	}
}
