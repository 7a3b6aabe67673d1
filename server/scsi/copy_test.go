package scsi_test

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

var (
	listLen       = code{5, 0x1a, 0}
	inProgress    = code{5, 0x00, 0x16}
	copyAborted   = code{0xa, 0, 0}
	notReachable  = code{0xa, 0x0d, 2}
	wrongCSCD     = code{0xa, 0x0d, 3}
	tooManyCSCD   = code{5, 0x26, 6}
	cscdType      = code{5, 0x26, 7}
	tooManySegs   = code{5, 0x26, 8}
	segmentType   = code{5, 0x26, 9}
	inlineTooLong = code{5, 0x26, 0xb}
)

// copyRig is a rig with three units: LUN 0, LUN 1, and LUN 2, which the rig's
// initiator does not see.
type copyRig struct {
	*rig
	other, hidden *memlu.LU
}

func newCopyRig(t testing.TB, size uint64, change func(*scsi.LUConfig)) *copyRig {
	t.Helper()
	r := &copyRig{rig: newRig(t, size, change), other: memlu.New(size), hidden: memlu.New(size)}
	r.other.SetID(2)
	r.hidden.SetID(3)
	r.lu.SetID(1, r.other, r.hidden)
	r.other.SetID(2, r.lu, r.hidden)
	for lun, v := range map[uint16]*memlu.LU{1: r.other, 2: r.hidden} {
		c := unitConfig(lun, v)
		c.VolumeUUID[15] = byte(lun)
		if change != nil {
			change(&c)
		}
		if err := r.s.SetLU(c); err != nil {
			t.Fatal(err)
		}
	}
	r.s.SetAccess(1, scsi.Visibility{Any: true})
	r.s.SetAccess(2, scsi.Visibility{Initiators: []string{"iqn.2026-11.test:stranger"}})
	r.n = r.attach(initiator, 2)
	return r
}

func naa(lun byte) []byte { return []byte{0x30, 1, 2, 3, 4, 5, 6, lun} }

func ident(lun byte) []byte { return cdb.AppendCSCD(nil, 1, 3, naa(lun), 512) }

// xcopyList is a parameter list.
func xcopyList(id, usage byte, cscds [][]byte, segments ...[]byte) []byte {
	b := make([]byte, 16)
	b[0], b[1] = id, usage<<3
	targets, segs := slices.Concat(cscds...), slices.Concat(segments...)
	binary.BigEndian.PutUint16(b[2:], uint16(len(targets)))
	binary.BigEndian.PutUint32(b[8:], uint32(len(segs)))
	return append(append(b, targets...), segs...)
}

func blocks(from, to uint16, src, dst uint64, n uint32) []byte {
	s := cdb.CopySegment{Type: cdb.SegmentBlocks, Source: from, Destination: to, SourceLBA: src, DestLBA: dst, Count: n}
	return s.Append(nil)
}

func thirdParty(op, action byte, n uint32) []byte {
	c := make([]byte, 16)
	c[0], c[1] = op, action
	binary.BigEndian.PutUint32(c[10:], n)
	return c
}

func (r *copyRig) xcopy(list []byte) result {
	r.t.Helper()
	return r.write(thirdParty(cdb.ThirdPartyCopyOut, cdb.ActionExtendedCopy, uint32(len(list))), list)
}

func (r *copyRig) receive(action, id byte, n int) result {
	r.t.Helper()
	c := thirdParty(cdb.ThirdPartyCopyIn, action, uint32(n))
	c[2] = id
	return r.read(c, n)
}

var bothUnits = [][]byte{ident(0), ident(1)}

// contents reads a volume past the device server.
func contents(t testing.TB, v *memlu.LU, off, n uint64) []byte {
	t.Helper()
	b := make([]byte, n)
	if !v.TryRead(off, b) {
		t.Fatal("TryRead")
	}
	return b
}

func fill(v *memlu.LU, off uint64, b []byte) {
	v.Submit(&scsi.Request{Op: scsi.OpWrite, Off: off, Len: uint64(len(b)), Data: b, Done: func(*scsi.Request) {}})
}

func TestExtendedCopyClones(t *testing.T) {
	r := newCopyRig(t, 256*mib, nil)
	data := pattern(32*mib, 3)
	clear(data[4*mib : 8*mib])
	fill(r.lu, 0, data[:4*mib])
	fill(r.lu, 8*mib, data[8*mib:])
	fill(r.other, 64*mib, pattern(32*mib, 9))
	reads, writes := r.lu.Count(scsi.OpRead), r.other.Count(scsi.OpWrite)
	r.good(r.xcopy(xcopyList(1, 0, bothUnits, (&cdb.CopySegment{Type: cdb.SegmentBytes, Destination: 1, DestLBA: 64 * 2048, Count: 32 * mib}).Append(nil))))
	if !bytes.Equal(contents(t, r.other, 64*mib, 32*mib), data) {
		t.Error("the copy differs")
	}
	if r.lu.Count(scsi.OpRead) != reads || r.other.Count(scsi.OpWrite) != writes || r.other.Count(scsi.OpClone) != 1 {
		t.Error("data was moved")
	}
	if n := r.other.Allocated(); n != 28*mib/4096 {
		t.Errorf("%d blocks allocated: holes were filled", n)
	}
	res := r.good(r.receive(cdb.ActionCopyStatus1, 1, 255))
	if want := []byte{0, 0, 0, 8, 1, 0, 1, 0, 2, 0, 0, 0}; !bytes.Equal(res.in, want) {
		t.Errorf("copy status %x, want %x", res.in, want)
	}
	r.refused(r.receive(cdb.ActionCopyStatus1, 1, 255), badField) // it was read
	if s := r.s.Stats()[0].Classes[scsi.ClassExtendedCopy]; s.Good != 1 || s.Bytes != 32*mib {
		t.Errorf("statistics: %+v", s)
	}
}

// Any offset and length, on one unit or two, by reference or not, copies exactly.
func TestExtendedCopyRanges(t *testing.T) {
	noClone := func(q *scsi.Request) error {
		if q.Op == scsi.OpClone {
			return scsi.ErrNoClone
		}
		return nil
	}
	for _, c := range []struct {
		name      string
		to        uint16
		src, dst  uint64 // sectors
		n         uint32
		clone     bool
		wantClone bool
	}{
		{"aligned", 1, 8, 16, 800, true, true},
		{"ragged alike", 1, 3, 11, 900, true, true},
		{"ragged alike, short", 1, 3, 11, 9, true, false},
		{"within a block", 1, 3, 11, 2, true, false},
		{"ragged", 1, 3, 12, 900, true, false},
		{"aligned by data", 1, 8, 16, 9000, false, false},
		{"long, ragged", 1, 5, 22, 9001, true, false},
		{"upwards over itself", 0, 0, 8, 4000, true, true},
		{"upwards over itself, ragged", 0, 1, 4, 5001, true, false},
		{"upwards over itself, ragged alike", 0, 1, 9, 5001, true, true},
		{"upwards over itself by data", 0, 8, 16, 9000, false, false},
		{"downwards over itself", 0, 16, 8, 4000, true, true},
		{"downwards over itself, ragged", 0, 4, 1, 9001, true, false},
		{"downwards over itself by data", 0, 24, 16, 9000, false, false},
		{"onto itself", 0, 5, 5, 77, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newCopyRig(t, 64*mib, nil)
			targets := []*memlu.LU{r.lu, r.other}
			image := make([]byte, 8*mib)
			for i := 0; i < len(image); i += 64 << 10 { // holes between
				copy(image[i:], pattern(24<<10, byte(i>>16)))
				fill(r.lu, uint64(i), image[i:i+24<<10])
			}
			old := pattern(8*mib, 99)
			fill(r.other, 0, old)
			want := old
			if c.to == 0 {
				want = slices.Clone(image)
			}
			n := uint64(c.n) * 512
			copy(want[c.dst*512:], slices.Clone(image[c.src*512:c.src*512+n]))
			dst := targets[c.to]
			if !c.clone {
				dst.SetFail(noClone)
			}
			r.good(r.xcopy(xcopyList(0, 3, bothUnits, blocks(0, c.to, c.src, c.dst, c.n))))
			dst.SetFail(nil)
			if got := contents(t, dst, 0, 8*mib); !bytes.Equal(got, want) {
				at, _ := firstDiff(got, want)
				t.Errorf("differs at byte %d", at)
			}
			if (dst.Count(scsi.OpClone) != 0) != (c.wantClone || !c.clone) {
				t.Errorf("%d clones", dst.Count(scsi.OpClone))
			}
		})
	}
}

// A write that was forwarded can have taken effect and be BUSY. Then the same is written
// again: what the source holds by then may be the copy's own.
func TestExtendedCopyOverItselfWhileBusy(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	image := pattern(mib, 7)
	fill(r.lu, 0, image)
	effect := make(chan func(), 1)
	seen := false
	r.lu.SetFail(func(q *scsi.Request) error {
		if q.Op != scsi.OpWrite || seen {
			return nil
		}
		seen = true
		off, data := q.Off, slices.Clone(q.Data)
		effect <- func() { fill(r.lu, off, data) }
		return scsi.ErrBusy
	})
	want := slices.Clone(image)
	copy(want[3*512:], image[:300*512]) // ragged: by data
	done := make(chan result, 1)
	go func() { done <- r.xcopy(xcopyList(0, 3, bothUnits, blocks(0, 0, 0, 3, 300))) }()
	var res result
	eventually(t, "the end of the copy", func() bool {
		select {
		case f := <-effect:
			f()
		case res = <-done:
			return true
		default:
		}
		r.s.Tick()
		return false
	})
	r.lu.SetFail(nil)
	r.good(res)
	if got := contents(t, r.lu, 0, mib); !bytes.Equal(got, want) || !seen {
		at, _ := firstDiff(got, want)
		t.Errorf("differs at byte %d", at)
	}
}

func firstDiff(a, b []byte) (int, bool) {
	for i := range a {
		if a[i] != b[i] {
			return i, true
		}
	}
	return 0, false
}

func TestExtendedCopyKeepsHolesWithoutClones(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	fill(r.lu, 2*mib, pattern(64<<10, 1))
	fill(r.other, 16*mib, pattern(8*mib, 2))
	r.other.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpClone {
			return scsi.ErrNoClone
		}
		return nil
	})
	reads := r.lu.Count(scsi.OpRead)
	r.good(r.xcopy(xcopyList(0, 3, bothUnits, blocks(0, 1, 0, 16*2048, 8*2048))))
	if got := r.other.Allocated(); got != 16 {
		t.Errorf("%d blocks allocated, want 16", got)
	}
	if n := r.lu.Count(scsi.OpRead) - reads; n != 1 {
		t.Errorf("%d reads of a source with one mapped run", n)
	}
}

func TestExtendedCopyBlocksOf4KiB(t *testing.T) {
	r := newCopyRig(t, 64*mib, func(c *scsi.LUConfig) { c.LogicalBlock = 4096 })
	data := pattern(mib, 5)
	fill(r.lu, 4096, data)
	both := [][]byte{cdb.AppendCSCD(nil, 1, 3, naa(0), 4096), cdb.AppendCSCD(nil, 1, 3, naa(1), 0)}
	r.good(r.xcopy(xcopyList(0, 3, both, blocks(0, 1, 1, 7, 256))))
	if !bytes.Equal(contents(t, r.other, 7*4096, mib), data) {
		t.Error("the copy differs")
	}
	seg := cdb.CopySegment{Type: cdb.SegmentBytes, Source: 0, Destination: 1, SourceLBA: 1, DestLBA: 0, Count: 8192, SourceByte: 4096}
	r.good(r.xcopy(xcopyList(0, 3, both, seg.Append(nil))))
	if !bytes.Equal(contents(t, r.other, 0, 8192), data[4096:12288]) {
		t.Error("the copy with a byte offset differs")
	}
	seg.Count = 512
	r.refused(r.xcopy(xcopyList(0, 3, both, seg.Append(nil))), copyAborted)
}

// The checks of a parameter list, each list also wrong in what is checked later.
func TestExtendedCopyRefusals(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	seg := blocks(0, 1, 0, 2048, 8)
	badSeg := slices.Clone(seg)
	badSeg[0] = 0x13
	badCSCD := slices.Clone(ident(0))
	badCSCD[0] = 0xe5
	repeat := func(b []byte, n int) (all [][]byte) {
		for range n {
			all = append(all, b)
		}
		return all
	}
	cut := xcopyList(1, 0, bothUnits, seg)
	inline := xcopyList(1, 0, bothUnits, seg)
	inline[15] = 4
	inline = append(inline, 0, 0, 0, 0)
	ignored := slices.Clone(ident(0))
	ignored[1] |= 0xe0 // LU ID TYPE and NUL
	tape := slices.Clone(ident(0))
	tape[1] |= 1
	port := slices.Clone(ident(0))
	port[5] |= 0x10
	long := xcopyList(1, 0, repeat(ident(0), 20), repeat(badSeg, 140)...)
	shortSeg := slices.Clone(seg)
	shortSeg[3]--
	for _, c := range []struct {
		name string
		list []byte
		want code
	}{
		{"list shorter than it says", cut[:len(cut)-1], listLen},
		{"lists above the maximum", long, listLen},
		{"CSCDs cut", xcopyList(1, 0, [][]byte{ident(0)[:31]}, seg), listLen},
		{"too many CSCDs", xcopyList(1, 0, repeat(badCSCD, 17), repeat(badSeg, 65)...), tooManyCSCD},
		{"too many segments", xcopyList(1, 0, repeat(badCSCD, 16), repeat(badSeg, 65)...), tooManySegs},
		{"type of CSCD", xcopyList(1, 0, [][]byte{ident(0), badCSCD}, badSeg), cscdType},
		{"type of segment", xcopyList(1, 0, bothUnits, seg, badSeg), segmentType},
		{"length of segment", xcopyList(1, 0, bothUnits, shortSeg), listLen},
		{"inline data", inline, inlineTooLong},
		{"list id without use", xcopyList(1, 3, bothUnits, seg), badParam},
		{"reserved usage", xcopyList(1, 1, bothUnits, seg), badParam},
		{"segment too long", xcopyList(0, 3, bothUnits, (&cdb.CopySegment{Type: cdb.SegmentBytes, Count: 64*mib + 512}).Append(nil)), badParam},
		{"no such CSCD", xcopyList(0, 3, bothUnits, blocks(0, 2, 0, 0, 1)), notReachable},
		{"designator of a port", xcopyList(0, 3, [][]byte{port}, blocks(0, 0, 0, 8, 1)), notReachable},
		{"unit not visible", xcopyList(0, 3, [][]byte{ident(0), ident(2)}, blocks(1, 0, 0, 0, 1)), notReachable},
		{"unit not visible as destination", xcopyList(0, 3, [][]byte{ident(0), ident(2)}, blocks(0, 1, 0, 0, 1)), notReachable},
		{"unit that does not exist", xcopyList(0, 3, [][]byte{ident(0), ident(9)}, blocks(1, 0, 0, 0, 1)), notReachable},
		{"device type", xcopyList(0, 3, [][]byte{tape}, blocks(0, 0, 0, 8, 1)), wrongCSCD},
		{"block length", xcopyList(0, 3, [][]byte{cdb.AppendCSCD(nil, 1, 3, naa(0), 4096)}, blocks(0, 0, 0, 8, 1)), wrongCSCD},
		{"source beyond the end", xcopyList(0, 3, bothUnits, blocks(0, 1, 131072, 0, 1)), copyAborted},
		{"destination beyond the end", xcopyList(0, 3, bothUnits, blocks(0, 1, 0, 131071, 2)), copyAborted},
		{"address wraps", xcopyList(0, 3, bothUnits, blocks(0, 1, 1<<64-1, 0, 2)), copyAborted},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.t = t
			r.refused(r.xcopy(c.list), c.want)
		})
	}
	r.t = t
	if n := r.lu.Count(scsi.OpClone) + r.other.Count(scsi.OpClone) + r.hidden.Count(scsi.OpRead) + r.hidden.Count(scsi.OpExtents); n != 0 {
		t.Errorf("%d requests of refused copies", n)
	}
	r.good(r.xcopy(xcopyList(0, 3, [][]byte{ignored}, blocks(0, 0, 0, 8, 8))))
	r.good(r.xcopy(nil))                                                                    // no list
	r.good(r.xcopy(xcopyList(0, 3, nil)))                                                   // empty lists
	r.good(r.xcopy(xcopyList(0, 3, bothUnits, blocks(0, 1, 5, 5, 0))))                      // count 0
	r.good(r.xcopy(xcopyList(0, 3, nil, blocks(0xffff, 0xffff, 0, 8, 8))))                  // the unit itself
	r.refused(r.xcopy(xcopyList(0, 3, bothUnits, blocks(0, 1, 0, 131072, 0))), copyAborted) // checked for count 0 too
	short := thirdParty(cdb.ThirdPartyCopyOut, cdb.ActionExtendedCopy, 100)
	r.refused(r.write(short, make([]byte, 99)), listLen)
	r.refused(r.write(thirdParty(cdb.ThirdPartyCopyOut, cdb.ActionExtendedCopy, 15), make([]byte, 15)), listLen)
}

// Every designator of page 83 names the unit, as far as it fits.
func TestExtendedCopyDesignators(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	uuid := append([]byte{0x10, 0, 1, 2, 3, 1}, make([]byte, 12)...)
	uuid[17] = 1
	r.good(r.xcopy(xcopyList(0, 3, [][]byte{ident(0), cdb.AppendCSCD(nil, 1, 0xa, uuid, 0)}, blocks(0, 1, 0, 0, 8))))
	if r.other.Count(scsi.OpClone) != 1 {
		t.Error("the UUID does not name the unit")
	}
	r.refused(r.xcopy(xcopyList(0, 3, [][]byte{ident(0), cdb.AppendCSCD(nil, 2, 3, naa(1), 0)}, blocks(0, 1, 0, 0, 8))), notReachable)
	r.refused(r.xcopy(xcopyList(0, 3, [][]byte{ident(0), cdb.AppendCSCD(nil, 1, 3, naa(1)[:7], 0)}, blocks(0, 1, 0, 0, 8))), notReachable)
}

// What a segment meets is forwarded; the segments before it stay done, and the
// details can be asked for.
func TestExtendedCopyForwards(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	data := pattern(4096, 1)
	fill(r.lu, 0, data)
	list := xcopyList(7, 0, bothUnits, blocks(0, 1, 0, 0, 8), blocks(0, 1, 0, 1<<20, 8))
	task := r.on(r.n, 0).newTask(command{cdb: thirdParty(cdb.ThirdPartyCopyOut, 0, uint32(len(list))), write: true, expected: uint32(len(list))})
	done := make(chan struct{})
	task.Complete = func(*scsi.Task) { close(done) }
	if r.s.Begin(task) != scsi.WantData {
		t.Fatal("no data wanted")
	}
	task.Out = list
	r.s.Execute(task)
	<-done
	want := []byte{0x70, 0, 0x0a, 0, 0, 0, 0, 29, 0, 18, 0, 1, 0, 0, 0, 0, 0, 0,
		cdb.CheckCondition, 0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x21, 0, 0, 0, 0, 0}
	if got := task.Sense[:task.SenseLen]; task.Status != cdb.CheckCondition || !bytes.Equal(got, want) {
		t.Errorf("sense\n got %x\nwant %x", got, want)
	}
	if !bytes.Equal(contents(t, r.other, 0, 4096), data) {
		t.Error("the first segment was undone")
	}
	res := r.good(r.receive(cdb.ActionCopyStatus1, 7, 12))
	if want := []byte{0, 0, 0, 8, 2, 0, 1, 0, 0, 0, 0x10, 0}; !bytes.Equal(res.in, want) {
		t.Errorf("status %x, want %x", res.in, want)
	}
	res = r.good(r.receive(cdb.ActionCopyFailureDetails, 7, 255))
	if res.in[3] != byte(56+37) || res.in[56] != cdb.CheckCondition || res.in[59] != 37 || !bytes.Equal(res.in[60:], want) {
		t.Errorf("failure details %x", res.in)
	}
	r.refused(r.receive(cdb.ActionCopyFailureDetails, 7, 255), badField)
	r.refused(r.receive(cdb.ActionCopyStatus1, 7, 255), badField)

	for _, c := range []struct {
		name string
		lu   *memlu.LU
		op   scsi.RequestOp
		err  error
		side int
		want []byte // forwarded, status first
		main code
	}{
		{"source conflict", r.lu, scsi.OpExtents, scsi.ErrReserved, 8, []byte{cdb.ReservationConflict}, copyAborted},
		{"source unreadable", r.lu, scsi.OpRead, scsi.ErrMedium, 8, []byte{cdb.CheckCondition, 0x70, 0, 3}, copyAborted},
		{"destination conflict", r.other, scsi.OpWrite, scsi.ErrReserved, 9, []byte{cdb.ReservationConflict}, copyAborted},
		{"destination conflict at a clone", r.other, scsi.OpClone, scsi.ErrReserved, 9, []byte{cdb.ReservationConflict}, copyAborted},
		{"no space", r.other, scsi.OpWrite, scsi.ErrNoSpace, 9, []byte{cdb.CheckCondition, 0x70, 0, 7}, copyAborted},
		{"unreachable", r.other, scsi.OpWrite, scsi.ErrUnavailable, 8, nil, notReachable},
		{"gone", r.lu, scsi.OpRead, scsi.ErrDeleted, 8, nil, notReachable},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.t = t
			c.lu.SetFail(func(q *scsi.Request) error {
				switch {
				case q.Op == c.op:
					return c.err
				case q.Op == scsi.OpClone:
					return scsi.ErrNoClone
				}
				return nil
			})
			if c.lu == r.lu {
				r.other.SetFail(func(q *scsi.Request) error {
					if q.Op == scsi.OpClone {
						return scsi.ErrNoClone
					}
					return nil
				})
			}
			r.refused(r.xcopy(xcopyList(9, 0, bothUnits, blocks(0, 1, 0, 8, 8))), c.main)
			c.lu.SetFail(nil)
			r.other.SetFail(nil)
			d := r.good(r.receive(cdb.ActionCopyFailureDetails, 9, 255)).in[60:]
			if c.want == nil {
				if d[8] != 0 || d[9] != 0 {
					t.Errorf("something is forwarded: %x", d)
				}
				return
			}
			if at := int(d[c.side]); at == 0 || d[8]+d[9] != byte(at) || !bytes.HasPrefix(d[at:], c.want) {
				t.Errorf("forwarded in %x, want %x of byte %d", d, c.want, c.side)
			}
		})
	}
}

func TestExtendedCopyWriteProtection(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	r.s.SetAccess(1, scsi.Visibility{Any: true, ReadOnly: []string{initiator}})
	r.n = r.attach(initiator, 3)
	r.refused(r.xcopy(xcopyList(0, 3, bothUnits, blocks(0, 1, 0, 0, 8))), copyAborted)
	r.good(r.xcopy(xcopyList(0, 3, bothUnits, blocks(1, 0, 0, 0, 8))))
	if r.other.Count(scsi.OpClone) != 0 {
		t.Error("a read-only unit was written")
	}

	// The ordered state says so, before the copy or between its segments.
	protected := []byte{1, 4, 0, 1, 1} // SWP
	r = newCopyRig(t, 64*mib, nil)
	r.other.SetState(protected)
	r.refused(r.xcopy(xcopyList(0, 3, bothUnits, blocks(0, 1, 0, 0, 8))), copyAborted)
	r.good(r.xcopy(xcopyList(0, 3, bothUnits, blocks(1, 0, 0, 0, 8))))
	r.other.SetState(nil)
	r.other.Hold()
	task, done := r.on(r.n, 0).pending(r.xcopyCommand(xcopyList(1, 0, bothUnits, blocks(0, 1, 0, 0, 8))))
	waitQueued(t, r.other, 1)
	allocated := r.other.Allocated()
	fill(r.lu, 0, pattern(4096, 1))
	r.other.SetState(protected)
	r.other.Release()
	<-done
	if at := task.Sense[9]; task.Status != cdb.CheckCondition || task.Sense[2] != cdb.CopyAborted || task.Sense[at+1+2] != cdb.DataProtect {
		t.Errorf("status %02x, sense %x", task.Status, task.Sense[:task.SenseLen])
	}
	if r.other.Allocated() != allocated {
		t.Error("a protected unit was written")
	}
}

func TestExtendedCopyUnitThatIsNotActive(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	c := unitConfig(1, r.other)
	c.VolumeUUID[15] = 1
	c.Paths = func() []scsi.PortGroup {
		return []scsi.PortGroup{{ID: 1, Ports: []uint16{2}, State: scsi.Transitioning}}
	}
	if err := r.s.SetLU(c); err != nil {
		t.Fatal(err)
	}
	res := r.refused(r.xcopy(xcopyList(1, 0, bothUnits, blocks(0, 1, 0, 0, 8))), copyAborted)
	d := r.good(r.receive(cdb.ActionCopyFailureDetails, 1, 255)).in[60:]
	if d[9] != 18 || d[18] != cdb.CheckCondition || d[21] != cdb.NotReady || d[31] != 4 || d[32] != 0x0a {
		t.Errorf("forwarded sense %x, main %x", d, res.code())
	}
}

// pending starts a command that its volume holds.
func (p port) pending(c command) (*scsi.Task, chan struct{}) {
	p.t.Helper()
	t := p.newTask(c)
	done := make(chan struct{})
	t.Complete = func(*scsi.Task) { close(done) }
	switch p.s.Begin(t) {
	case scsi.WantData:
		t.Out = c.out
	case scsi.Ready:
		t.In = make([]byte, t.InLen)
	default:
		p.t.Fatalf("finished with %02x", t.Status)
	}
	p.s.Execute(t)
	return t, done
}

func (r *copyRig) xcopyCommand(list []byte) command {
	n := uint32(len(list))
	return command{cdb: thirdParty(cdb.ThirdPartyCopyOut, cdb.ActionExtendedCopy, n), write: true, expected: n, out: list}
}

// waitQueued waits until a held volume has so many requests.
func waitQueued(t testing.TB, v *memlu.LU, n int) {
	t.Helper()
	eventually(t, "requests are held", func() bool { return v.Queued() == n })
}

func TestListIdentifiers(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	list := func(id, usage byte) []byte { return xcopyList(id, usage, bothUnits, blocks(0, 1, 0, 0, 8)) }
	for id := range byte(20) {
		r.good(r.xcopy(list(id, 0)))
	}
	for id := range byte(4) { // the oldest are forgotten
		r.refused(r.receive(cdb.ActionCopyStatus1, id, 12), badField)
	}
	for id := byte(4); id < 20; id++ {
		r.good(r.receive(cdb.ActionCopyStatus1, id, 12))
	}
	r.good(r.xcopy(list(30, 2)))
	r.refused(r.receive(cdb.ActionCopyStatus1, 30, 12), badField) // not kept
	r.good(r.xcopy(list(31, 0)))
	r.refused(r.xcopy(xcopyList(31, 0, bothUnits, blocks(0, 1, 0, 1<<30, 8))), copyAborted) // replaces the finished one
	if got := r.good(r.receive(cdb.ActionCopyStatus1, 31, 12)).in[4]; got != 2 {
		t.Errorf("status %d of the replacing copy", got)
	}

	r.good(r.xcopy(list(40, 0)))
	other := copyRig{rig: &rig{t: t, s: r.s, lu: r.lu}}
	other.n = r.attach(initiator, 9)
	other.refused(other.receive(cdb.ActionCopyStatus1, 40, 12), badField) // another nexus's
	r.other.Hold()
	task, done := r.on(r.n, 0).pending(r.xcopyCommand(list(40, 0)))
	waitQueued(t, r.other, 1)
	r.refused(r.xcopy(list(40, 0)), inProgress)
	if res := r.good(r.receive(cdb.ActionCopyStatus1, 40, 12)); res.in[4] != 0 {
		t.Errorf("status %x while it runs", res.in)
	}
	if res := r.good(r.receive(cdb.ActionCopyStatus1, 40, 4)); !bytes.Equal(res.in, []byte{0, 0, 0, 8}) {
		t.Errorf("cut status %x", res.in)
	}
	c := thirdParty(cdb.ThirdPartyCopyIn, cdb.ActionCopyStatus4, 255)
	c[5] = 40
	if res := r.good(r.read(c, 255)); len(res.in) != 32 || res.in[3] != 28 || res.in[5] != 0x11 {
		t.Errorf("LID4 status %x", res.in)
	}
	r.other.Release()
	<-done
	if task.Status != cdb.Good {
		t.Errorf("status %02x", task.Status)
	}
}

func TestCopyOperationAbort(t *testing.T) {
	r := newCopyRig(t, 256*mib, nil)
	list := xcopyList(5, 0, bothUnits, blocks(0, 1, 0, 0, 8), blocks(0, 1, 8, 8, 8))
	abort := thirdParty(cdb.ThirdPartyCopyOut, cdb.ActionCopyAbort, 0)
	abort[5] = 5
	r.refused(r.none(abort...), badField)
	r.other.Hold()
	task, done := r.on(r.n, 0).pending(r.xcopyCommand(list))
	waitQueued(t, r.other, 1)
	aborter, aborted := r.on(r.n, 0).pending(command{cdb: abort})
	select {
	case <-aborted:
		t.Fatal("the abort did not wait")
	default:
	}
	r.other.Release()
	<-done
	<-aborted
	if task.Status != cdb.CheckCondition || aborter.Status != cdb.Good {
		t.Errorf("copy %02x, abort %02x", task.Status, aborter.Status)
	}
	if n := r.other.Count(scsi.OpClone); n != 1 {
		t.Errorf("%d clones", n)
	}
	c := thirdParty(cdb.ThirdPartyCopyIn, cdb.ActionCopyStatus4, 255)
	c[5] = 5
	if res := r.good(r.read(c, 255)); res.in[5] != 0x60 {
		t.Errorf("status %x", res.in)
	}
	r.refused(r.none(abort...), badField)
}

// A task management function ends a copy at its next request, and answers when
// that is sure.
func TestExtendedCopyTaskAbort(t *testing.T) {
	for _, clone := range []bool{true, false} {
		r := newCopyRig(t, 64*mib, nil)
		fill(r.lu, 0, pattern(8*mib, 1))
		if !clone {
			r.other.SetFail(func(q *scsi.Request) error {
				if q.Op == scsi.OpClone {
					return scsi.ErrNoClone
				}
				return nil
			})
		}
		r.other.Hold()
		task, done := r.on(r.n, 0).pending(r.xcopyCommand(xcopyList(5, 0, bothUnits, blocks(0, 1, 0, 0, 8192), blocks(0, 1, 8192, 8192, 8192))))
		waitQueued(t, r.other, 1)
		response := make(chan scsi.TaskResponse, 1)
		r.s.TaskManagement(r.n, scsi.AbortTask, 0, task, func(f scsi.TaskResponse) { response <- f })
		if len(response) != 0 {
			t.Fatal("answered while a request was with the volume")
		}
		r.other.Release()
		<-done
		if f := <-response; f != scsi.FunctionComplete || !task.Aborted.Load() {
			t.Errorf("response %d", f)
		}
		if r.other.Count(scsi.OpClone) != 1 || r.other.Count(scsi.OpWrite) != 0 {
			t.Errorf("%d clones and %d writes", r.other.Count(scsi.OpClone), r.other.Count(scsi.OpWrite))
		}
	}
}

// More copies by data than there are buffers wait for them; more copies than are
// admitted are sent away.
func TestManyCopies(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	fill(r.lu, 0, pattern(mib, 1))
	r.other.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpClone {
			return scsi.ErrNoClone
		}
		return nil
	})
	r.lu.Hold()
	var tasks []*scsi.Task
	var done []chan struct{}
	for i := range 64 {
		task, d := r.on(r.n, 1<<48).pending(r.xcopyCommand(xcopyList(0, 3, bothUnits, blocks(0, 1, uint64(i)*8, uint64(i)*8+8192, 8))))
		tasks, done = append(tasks, task), append(done, d)
	}
	if n := r.lu.Queued() + int(r.other.Count(scsi.OpClone)); n == 0 {
		t.Error("nothing was started")
	}
	res := r.on(r.n, 1<<48).run(r.xcopyCommand(xcopyList(0, 3, bothUnits, blocks(0, 1, 0, 0, 8))))
	if res.status != cdb.TaskSetFull {
		t.Errorf("status %02x", res.status)
	}
	waitQueued(t, r.lu, 16) // one for each buffer
	r.lu.Release()
	eventually(t, "the copy has ended", func() bool {
		r.lu.Release()
		for _, d := range done {
			select {
			case <-d:
			default:
				return false
			}
		}
		return true
	})
	for i, task := range tasks {
		if task.Status != cdb.Good {
			t.Errorf("copy %d: status %02x", i, task.Status)
		}
	}
	r.other.SetFail(nil)
	if !bytes.Equal(contents(t, r.other, 4*mib, 64*4096), pattern(mib, 1)[:64*4096]) {
		t.Error("the copies differ")
	}
}

func TestCopyOperatingParameters(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	res := r.good(r.receive(cdb.ActionCopyParameters, 0, 255))
	want := make([]byte, 47)
	copy(want, []byte{0, 0, 0, 43, 1, 0, 0, 0, 0, 16, 0, 64, 0, 0, 0x10, 0, 4, 0, 0, 0})
	copy(want[34:], []byte{0, 64, 32, 9, 9, 9, 0, 0, 0, 3, 0x02, 0x0a, 0xe4})
	if !bytes.Equal(res.in, want) {
		t.Errorf("\n got %x\nwant %x", res.in, want)
	}
	if cut := r.good(r.receive(cdb.ActionCopyParameters, 0, 3)); !bytes.Equal(cut.in, want[:3]) {
		t.Errorf("cut: %x", cut.in)
	}
}

// Page 8F says what the command table and the limits say.
func TestThirdPartyPage(t *testing.T) {
	r := newCopyRig(t, 64*mib, nil)
	page := r.good(r.read(inq(1, 0x8f, 4096), 4096)).in
	if page[1] != 0x8f || int(binary.BigEndian.Uint16(page[2:])) != len(page)-4 || len(page)-4 < 0x24 {
		t.Fatalf("header %x of %d bytes", page[:4], len(page))
	}
	limits := make([]byte, 36)
	copy(limits, []byte{0, 0, 0, 0x20})
	copy(limits[10:], []byte{0, 64, 0, 0, 2, 88, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0})
	if !bytes.Equal(page[4:40], limits) {
		t.Errorf("limits\n got %x\nwant %x", page[4:40], limits)
	}
	var kinds []uint16
	for d := page[4:]; len(d) > 0; {
		kind, n := binary.BigEndian.Uint16(d), 4+int(binary.BigEndian.Uint16(d[2:]))
		if n%4 != 0 || n > len(d) {
			t.Fatalf("descriptor %04x of %d bytes", kind, n)
		}
		kinds = append(kinds, kind)
		if kind == 1 {
			list := d[5 : 5+int(d[4])]
			if want := []byte{0x83, 4, 0, 0x10, 0x11, 0x1c, 0x84, 6, 0, 3, 4, 5, 7, 8}; !bytes.Equal(list, want) {
				t.Errorf("commands %x, want %x", list, want)
			}
		}
		d = d[n:]
	}
	if want := []uint16{0, 1, 4, 8, 0xc, 0x106, 0x108, 0x8001}; !slices.Equal(kinds, want) {
		t.Errorf("descriptors %x, want %x", kinds, want)
	}
}

// TestCopyReservations: a copy is checked in the name of its sender: reading the
// source, writing the destination, whatever reservations both have.
func TestCopyReservations(t *testing.T) {
	for _, c := range []struct {
		name string
		kind byte
		lun  uint64 // of the unit that another nexus has reserved
		side int    // where the place of the forwarded status stands; 0: the copy works
	}{
		{"source, exclusive access", 3, 0, 8},
		{"source, write exclusive", 1, 0, 0},
		{"destination, write exclusive", 1, 1, 9},
		{"destination, exclusive access, registrants only", 6, 1, 9},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newCopyRig(t, mib, nil)
			fill(r.lu, 0, pattern(4096, 1))
			holder := r.on(r.attach("iqn.2026-11.test:holder", 7), c.lun<<48)
			holder.good(holder.run(prOut(registerIgnore, 0, 0, 5, 0)))
			holder.good(holder.run(prOut(reserve, c.kind, 5, 0, 0)))
			cmd := xcopyList(9, 0, bothUnits, blocks(0, 1, 0, 8, 8))
			if c.side == 0 {
				r.good(r.xcopy(cmd))
				return
			}
			r.refused(r.xcopy(cmd), copyAborted)
			d := r.good(r.receive(cdb.ActionCopyFailureDetails, 9, 255)).in[60:]
			if at := int(d[c.side]); at == 0 || d[at] != cdb.ReservationConflict {
				t.Errorf("forwarded in %x, want RESERVATION CONFLICT", d)
			}
			if r.other.Allocated() != 0 {
				t.Error("something was written")
			}
		})
	}
}
