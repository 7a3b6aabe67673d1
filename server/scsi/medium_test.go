package scsi_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

func atomicCDB(flags byte, lba uint64, boundary, blocks uint16) []byte {
	return rw16(cdb.WriteAtomic16, flags, lba, uint32(boundary)<<16|uint32(blocks))
}

func TestOrWrite(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		r := newRig(t, 16*mib, func(c *scsi.LUConfig) { c.LogicalBlock = block })
		b := int(block)
		old, or := pattern(3*b, 1), pattern(3*b, 0x52)
		r.good(r.write(rw16(cdb.Write16, 0, 7, 3), old))
		r.good(r.write(rw16(cdb.OrWrite16, 0x18, 7, 3), or))
		for i := range old {
			old[i] |= or[i]
		}
		if got := r.read(rw16(cdb.Read16, 0, 7, 3), 3*b).in; !bytes.Equal(got, old) {
			t.Errorf("block %d: not the OR", b)
		}
		if n := r.lu.Count(scsi.OpOrWrite); n != 1 {
			t.Errorf("%d requests: the volume does it as one step", n)
		}
		last := uint64(16*mib/b - 1)
		r.refused(r.write(rw16(cdb.OrWrite16, 0, last, 2), make([]byte, 2*b)), badLBA)
		r.refused(r.write(rw16(cdb.OrWrite16, 0, last+1, 0), nil), badLBA)
		r.refused(r.write(rw16(cdb.OrWrite16, 0x20, 0, 1), make([]byte, b)), badField)
		r.refused(r.write(rw16(cdb.OrWrite16, 0, 0, uint32(8*mib/b)+1), make([]byte, b)), badField)
		r.refused(r.write(rw16(cdb.OrWrite16, 0, 0, 1), make([]byte, b-1)), badUnit)
		r.good(r.write(rw16(cdb.OrWrite16, 0, 0, uint32(8*mib/b)), make([]byte, 8*mib)))
	}
}

func TestWriteAtomic(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		r := newRig(t, 16*mib, func(c *scsi.LUConfig) { c.LogicalBlock = block })
		b, limit := int(block), uint16(mib/block)
		marked := 0
		r.lu.SetFail(func(q *scsi.Request) error {
			if q.Op == scsi.OpWrite && q.Atomic {
				marked++
			}
			return nil
		})
		data := pattern(mib, 3)
		r.good(r.write(atomicCDB(0x18, 5, 0, limit), data))
		if got := r.read(rw16(cdb.Read16, 0, 5, uint32(limit)), mib).in; !bytes.Equal(got, data) || marked != 1 {
			t.Errorf("block %d: data differ, or %d requests are marked", b, marked)
		}
		r.good(r.write(rw16(cdb.Write16, 0, 5, 1), data[:b]))
		if marked != 1 {
			t.Error("an ordinary write is marked atomic")
		}
		n := r.lu.Count(scsi.OpWrite)
		last := uint64(16*mib/b - 1)
		// The range comes before the boundary and the length.
		r.refused(r.write(atomicCDB(0, last, 1, limit+1), data), badLBA)
		r.refused(r.write(atomicCDB(0, 1<<64-1, 0, 0), nil), badLBA)
		for _, c := range []struct {
			boundary, blocks, field uint16
		}{{0, limit + 1, 12}, {1, 8, 10}} {
			if res := r.refused(r.write(atomicCDB(0, 0, c.boundary, c.blocks), data), badField); res.sense.Field != c.field {
				t.Errorf("field pointer %d, want %d", res.sense.Field, c.field)
			}
		}
		r.refused(r.write(atomicCDB(0x40, 0, 0, 1), data[:b]), badField)
		// A part is never written.
		r.refused(r.write(atomicCDB(0, 0, 0, 2), data[:b]), badUnit)
		r.refused(r.write(atomicCDB(0, 0, 0, 2), nil), badUnit)
		if r.lu.Count(scsi.OpWrite) != n {
			t.Error("a refused command reached the volume")
		}
		if res := r.good(r.write(atomicCDB(0, 0, 0, 1), data[:2*b])); res.transfer != block {
			t.Errorf("transfer %d", res.transfer)
		}
	}
}

// descriptors are those of a GET LBA STATUS reply: LBA, blocks, status.
func descriptors(t *testing.T, reply []byte) (all [][3]uint64) {
	t.Helper()
	if n := binary.BigEndian.Uint32(reply); int(n) != len(reply)-4 || len(reply)%16 != 8 {
		t.Fatalf("parameter data length %d of %d bytes", n, len(reply))
	}
	for d := reply[8:]; len(d) > 0; d = d[16:] {
		all = append(all, [3]uint64{be64(d), uint64(binary.BigEndian.Uint32(d[8:])), uint64(d[12])})
	}
	return all
}

func TestLBAStatus(t *testing.T) {
	r := newRig(t, 16*mib, nil)
	const blocks = 16 * mib / 512
	at := func(lba uint64, alloc uint32) [][3]uint64 {
		t.Helper()
		return descriptors(t, r.good(r.read(lbaStatus(lba, alloc), int(alloc))).in)
	}
	same := func(got [][3]uint64, want ...[3]uint64) {
		t.Helper()
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("got %v\nwant %v", got, want)
		}
	}
	same(at(0, 255), [3]uint64{0, blocks, 1})
	r.good(r.write(rw16(cdb.Write16, 0, 16, 24), pattern(24*512, 1)))
	same(at(0, 255), [3]uint64{0, 16, 1}, [3]uint64{16, 24, 0}, [3]uint64{40, blocks - 40, 1})
	// The first descriptor begins at the LBA that was asked for.
	same(at(19, 255), [3]uint64{19, 21, 0}, [3]uint64{40, blocks - 40, 1})
	same(at(blocks-1, 255), [3]uint64{blocks - 1, 1, 1})
	// Room for one or two.
	same(at(0, 24), [3]uint64{0, 16, 1})
	same(at(0, 55), [3]uint64{0, 16, 1}, [3]uint64{16, 24, 0})
	// It follows UNMAP, and is not fooled by zeros written.
	r.good(r.write(unmapCDB(24), cdb.AppendUnmap(nil, [2]uint64{24, 8})))
	same(at(16, 255), [3]uint64{16, 8, 0}, [3]uint64{24, 8, 1}, [3]uint64{32, 8, 0}, [3]uint64{40, blocks - 40, 1})
	// More extents than one request returns, merged over its border.
	for i := range uint64(300) {
		r.good(r.write(rw16(cdb.Write16, 0, 16*i, 8), pattern(4096, 2)))
	}
	got := at(0, 65535)
	if len(got) < 600 || got[599] != [3]uint64{16*299 + 8, blocks - 16*299 - 8, 1} {
		t.Errorf("%d descriptors", len(got))
	}
	if n := r.lu.Count(scsi.OpExtents); n < 5 {
		t.Errorf("%d requests", n)
	}
	r.lu.SetFail(func(*scsi.Request) error { return scsi.ErrMedium })
	r.refused(r.read(lbaStatus(0, 255), 255), code{3, 0x11, 0})

	// More blocks than a descriptor holds, and more bytes than a request looks at.
	big := newRig(t, 3<<41, func(c *scsi.LUConfig) { c.Volume = &hugeVolume{memlu.New(3 << 41)} })
	all := descriptors(t, big.good(big.read(lbaStatus(8, 255), 255)).in)
	total := uint64(0)
	for _, d := range all {
		if d[0] != 8+total || d[2] != 0 {
			t.Errorf("descriptor %v after %d blocks", d, total)
		}
		total += d[1]
	}
	if total != 3<<41/512-8 || len(all) != 4 {
		t.Errorf("%d blocks in %d descriptors", total, len(all))
	}
}

// hugeVolume is mapped all over.
type hugeVolume struct{ *memlu.LU }

func (v *hugeVolume) Submit(r *scsi.Request) {
	if r.Op != scsi.OpExtents {
		v.LU.Submit(r)
		return
	}
	r.Extents = append(r.Extents[:0], scsi.Extent{Bytes: r.Len, Mapped: true})
	r.Done(r)
}

func TestEchoBuffer(t *testing.T) {
	r := newRig(t, mib, nil)
	if err := r.s.SetLU(unitConfig(1, r.lu)); err != nil {
		t.Fatal(err)
	}
	r.s.SetAccess(1, scsi.Visibility{Any: true})
	one, two := r.attach("iqn.2026-11.test:one", 2), r.attach("iqn.2026-11.test:two", 3)
	writeEcho := func(n int) []byte { return []byte{cdb.WriteBuffer, 0x0a, 0, 0, 0, 0, 0, byte(n >> 8), byte(n), 0} }
	readEcho := command{cdb: []byte{cdb.ReadBuffer, 0x0a, 0, 0, 0, 0, 0, 0x20, 0, 0}, read: true, expected: 8192}
	data := pattern(4096, 9)
	put := command{cdb: writeEcho(4096), write: true, expected: 4096, out: data}
	r.good(r.on(one, 0).run(put))
	r.good(r.on(two, 0).run(command{cdb: writeEcho(7), write: true, expected: 7, out: data[100:107]}))
	if got := r.good(r.on(one, 0).run(readEcho)).in; !bytes.Equal(got, data) {
		t.Errorf("echo of %d bytes differs", len(got))
	}
	if got := r.good(r.on(two, 0).run(readEcho)).in; !bytes.Equal(got, data[100:107]) {
		t.Errorf("the nexuses share an echo buffer: %d bytes", len(got))
	}
	r.refused(r.on(one, 1<<48).run(readEcho), code{5, 0x2c, 0})
	r.good(r.on(one, 0).run(command{cdb: writeEcho(0)}))
	put.expected = 4095
	r.refused(r.on(one, 0).run(put), badListLen)
}

// Every command of no length ends with GOOD and nothing moved; at the end of
// the unit it is out of range.
func TestZeroLength(t *testing.T) {
	for _, p := range profiles() {
		t.Run(p.name, func(t *testing.T) {
			r := newRig(t, mib, p.change)
			blocks := uint64(mib) / uint64(p.block)
			for _, op := range []byte{
				cdb.Read10, cdb.Write10, cdb.Read12, cdb.Write12, cdb.Read16, cdb.Write16, cdb.OrWrite16, cdb.WriteAtomic16,
				cdb.Verify10, cdb.Verify12, cdb.Verify16, cdb.WriteAndVerify10, cdb.WriteAndVerify12, cdb.WriteAndVerify16,
				cdb.PreFetch10, cdb.PreFetch16, cdb.SynchronizeCache10, cdb.SynchronizeCache16, cdb.CompareAndWrite,
			} {
				for _, flags := range []byte{0, 2} {
					if flags != 0 && op != cdb.Verify10 && op != cdb.Verify12 && op != cdb.Verify16 {
						continue
					}
					at := func(lba uint64) []byte {
						switch cdb.Size(op) {
						case 10:
							return rw10(op, flags, uint32(lba), 0)
						case 12:
							return rw12(op, flags, uint32(lba), 0)
						default:
							return rw16(op, flags, lba, 0)
						}
					}
					if res := r.good(r.none(at(0)...)); res.transfer != 0 {
						t.Errorf("%02x: transfer %d", op, res.transfer)
					}
					r.good(r.none(at(blocks - 1)...))
					r.refused(r.none(at(blocks)...), badLBA)
					r.refused(r.none(at(blocks+1)...), badLBA)
				}
			}
			for _, c := range [][]byte{
				inq(0, 0, 0), modeSense10(0, 0x3f, 0)[:7], logSense(0, 0, 0), readCapacity16(0), lbaStatus(0, 0),
				{cdb.ReadBuffer, 3, 9: 0}, {cdb.WriteBuffer, 0x0a, 9: 0}, {cdb.RequestSense, 5: 0}, {cdb.LogSelect, 9: 0},
				maintenanceIn(cdb.ActionReportTargetPorts, 0, 0, 0, 0), maintenanceIn(cdb.ActionReportOpcodes, 0, 0, 0, 0),
				{cdb.SendDiagnostic, 5: 0}, {cdb.ReceiveDiagnosticResults, 5: 0},
			} {
				c = append(bytes.Clone(c), make([]byte, 16-len(c))...)
				if res := r.good(r.none(c...)); res.transfer != 0 {
					t.Errorf("%x: transfer %d", c, res.transfer)
				}
			}
			if p.thin {
				r.good(r.none(unmapCDB(0)...))
			}
		})
	}
}

// profile is a kind of unit.
type profile struct {
	name   string
	block  uint32
	thin   bool
	change func(*scsi.LUConfig)
}

func profiles() (all []profile) {
	for _, g := range []struct {
		name              string
		logical, physical uint32
	}{{"512e", 512, 4096}, {"512n", 512, 512}, {"4Kn", 4096, 4096}} {
		for _, isThin := range []bool{true, false} {
			name := g.name + " thick"
			if isThin {
				name = g.name + " thin"
			}
			all = append(all, profile{name: name, block: g.logical, thin: isThin, change: func(c *scsi.LUConfig) {
				c.LogicalBlock, c.PhysicalBlock, c.Thin = g.logical, g.physical, isThin
			}})
		}
	}
	return all
}

// All that tells the profile of a unit tells the same story.
func TestProfiles(t *testing.T) {
	for _, p := range profiles() {
		t.Run(p.name, func(t *testing.T) {
			r := newRig(t, 16*mib, func(c *scsi.LUConfig) {
				p.change(c)
				c.Space = func() scsi.Space { return scsi.Space{Total: 100 * mib, Free: 100 * mib} }
			})
			vpd := func(page byte) []byte { return r.good(r.read(inq(1, page, 255), 255)).in }
			capacity := r.good(r.read(readCapacity16(32), 32)).in
			limits, provisioning, characteristics := vpd(0xb0), vpd(0xb2), vpd(0xb1)
			b := uint64(p.block)
			if be64(capacity) != 16*mib/b-1 || uint64(binary.BigEndian.Uint32(capacity[8:])) != b {
				t.Errorf("READ CAPACITY %x", capacity)
			}
			lbpme, lbpu := capacity[14]&0x80 != 0, provisioning[5]&0x80 != 0
			unmapMax, erase := binary.BigEndian.Uint32(limits[20:]), characteristics[7]>>6
			if lbpme != p.thin || lbpu != p.thin || (unmapMax != 0) != p.thin || (erase == 1) != p.thin || (provisioning[6] == 2) != p.thin {
				t.Errorf("thin: LBPME %v, LBPU %v, MAXIMUM UNMAP %d, WABEREQ %d", lbpme, lbpu, unmapMax, erase)
			}
			// What page B0 allows works, one more does not.
			n := int(binary.BigEndian.Uint32(limits[8:]))
			r.good(r.write(rw16(cdb.Write16, 0, 0, uint32(n)), make([]byte, n*int(b))))
			r.refused(r.write(rw16(cdb.Write16, 0, 0, uint32(n)+1), make([]byte, (n+1)*int(b))), badField)
			n = int(binary.BigEndian.Uint32(limits[44:]))
			r.good(r.write(atomicCDB(0, 0, 0, uint16(n)), make([]byte, n*int(b))))
			r.refused(r.write(atomicCDB(0, 0, 0, uint16(n)+1), make([]byte, (n+1)*int(b))), badField)
			n = int(limits[5])
			r.good(r.write(caw(0, 0, byte(n)), make([]byte, 2*n*int(b))))
			r.good(r.write(rw16(cdb.WriteSame16, 0, 0, uint32(be64(limits[36:]))), make([]byte, b)))
			same := r.write(rw16(cdb.WriteSame16, 8, 0, 1), make([]byte, b))
			unmap := r.write(unmapCDB(24), cdb.AppendUnmap(nil, [2]uint64{0, 1}))
			sanitize := r.none(sanitizeCDB(cdb.ActionSanitizeBlockErase, 0, 0)...)
			if p.thin {
				r.good(same)
				r.good(unmap)
				r.good(sanitize)
			} else {
				r.refused(same, badField)
				r.refused(unmap, badOpcode)
				r.refused(sanitize, badField)
				r.refused(r.read(logSense(0x0c, 0, 255), 255), badField)
			}
			r.good(r.write(sanitizeCDB(cdb.ActionSanitizeOverwrite, 0, 5), []byte{1, 0, 0, 1, 0xa5}))
			if got := r.read(rw16(cdb.Read16, 0, 16*mib/b-1, 1), int(b)).in; !bytes.Equal(got, bytes.Repeat([]byte{0xa5}, int(b))) {
				t.Error("not overwritten")
			}
		})
	}
}

// An unreadable block is named by its LBA, inside the range of the command.
func TestMediumErrorTellsWhere(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		r := newRig(t, 16*mib, func(c *scsi.LUConfig) { c.LogicalBlock = block })
		b := int(block)
		r.lu.SetFail(func(q *scsi.Request) error {
			if q.Off <= 0x7fff && q.Off+q.Len > 0x7000 {
				q.Bad = 0x7000
				return scsi.ErrMedium
			}
			return nil
		})
		lba := uint32(0x7000 / b)
		for _, c := range []struct {
			res  result
			want code
			at   uint64
		}{
			{r.read(rw10(cdb.Read10, 0, 0, 64), 64*b), code{3, 0x11, 0}, uint64(lba)},
			{r.none(rw10(cdb.Verify10, 0, 0, 64)...), code{3, 0x11, 0}, uint64(lba)},
			{r.write(rw10(cdb.Write10, 0, lba, 1), make([]byte, b)), code{3, 0x0c, 0}, uint64(lba)},
			{r.write(rw10(cdb.WriteAndVerify10, 0, 0, 64), make([]byte, 64*b)), code{3, 0x0c, 0}, uint64(lba)},
		} {
			if r.refused(c.res, c.want); !c.res.sense.HasInfo || c.res.sense.Info != c.at {
				t.Errorf("INFORMATION %+v, want %d", c.res.sense, c.at)
			}
		}
		if b == 512 { // inside of the bad block
			if res := r.refused(r.read(rw10(cdb.Read10, 0, lba+3, 1), 512), code{3, 0x11, 0}); res.sense.Info != uint64(lba+3) {
				t.Errorf("INFORMATION %d, want %d", res.sense.Info, lba+3)
			}
		}
	}
}

// A stop of the unit makes stable what was acknowledged, and does nothing else.
func TestStopFlushes(t *testing.T) {
	for _, volatile := range []bool{false, true} {
		r := newRig(t, mib, func(c *scsi.LUConfig) { c.VolatileCache = volatile })
		for _, c := range []struct {
			flags byte
			flush bool
		}{{0, true}, {1, false}, {4, false}} {
			before := r.lu.Count(scsi.OpFlush)
			r.good(r.none(cdb.StartStopUnit, 0, 0, 0, c.flags, 0))
			if got := r.lu.Count(scsi.OpFlush) != before; got != (c.flush && volatile) {
				t.Errorf("WCE %v, flags %x: flushed %v", volatile, c.flags, got)
			}
		}
	}
}
