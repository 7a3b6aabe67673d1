package scsi_test

import (
	"bytes"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// Every READ and WRITE, each with its way to address and count.
var readWrites = []struct {
	name        string
	read, write func(flags byte, lba, blocks uint32) []byte
}{
	{"6", func(_ byte, lba, n uint32) []byte {
		return []byte{cdb.Read6, byte(lba >> 16), byte(lba >> 8), byte(lba), byte(n), 0}
	}, func(_ byte, lba, n uint32) []byte {
		return []byte{cdb.Write6, byte(lba >> 16), byte(lba >> 8), byte(lba), byte(n), 0}
	}},
	{"10", func(f byte, lba, n uint32) []byte { return rw10(cdb.Read10, f, lba, uint16(n)) },
		func(f byte, lba, n uint32) []byte { return rw10(cdb.Write10, f, lba, uint16(n)) }},
	{"12", func(f byte, lba, n uint32) []byte { return rw12(cdb.Read12, f, lba, n) },
		func(f byte, lba, n uint32) []byte { return rw12(cdb.Write12, f, lba, n) }},
	{"16", func(f byte, lba, n uint32) []byte { return rw16(cdb.Read16, f, uint64(lba), n) },
		func(f byte, lba, n uint32) []byte { return rw16(cdb.Write16, f, uint64(lba), n) }},
}

func TestReadWrite(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		r := newRig(t, 16*mib, func(c *scsi.LUConfig) { c.LogicalBlock = block })
		blocks := uint32(16 * mib / block)
		for i, rw := range readWrites {
			data := pattern(3*int(block), byte(i))
			if res := r.good(r.write(rw.write(0x18, 5, 3), data)); res.transfer != uint32(len(data)) {
				t.Errorf("WRITE(%s): transfer %d", rw.name, res.transfer)
			}
			for _, noTry := range []bool{false, true} {
				res := r.good(r.do(command{cdb: rw.read(0x18, 5, 3), read: true, expected: uint32(len(data)), noTry: noTry}))
				if !bytes.Equal(res.in, data) || res.tried == noTry {
					t.Errorf("READ(%s), noTry %v: data differ or TryExecute did not answer", rw.name, noTry)
				}
			}
			// The last block, and one beyond.
			r.good(r.write(rw.write(0, blocks-1, 1), data[:block]))
			r.good(r.read(rw.read(0, blocks-1, 1), int(block)))
			r.refused(r.write(rw.write(0, blocks-1, 2), data[:2*block]), badLBA)
			r.refused(r.read(rw.read(0, blocks, 1), int(block)), badLBA)
			if rw.name == "6" {
				if res := r.good(r.read(rw.read(0, 0, 0), 256*int(block))); res.transfer != 256*block {
					t.Errorf("READ(6) of 0: transfer %d", res.transfer)
				}
				continue
			}
			r.good(r.read(rw.read(0, 0, 0), 0))
			r.good(r.write(rw.write(0, 0, 0), nil))
			r.refused(r.read(rw.read(0, blocks, 0), 0), badLBA)
			for _, f := range []byte{0x20, 0x40, 0x80} { // RDPROTECT, WRPROTECT
				res := r.refused(r.read(rw.read(f, 0, 1), int(block)), badField)
				if s := res.sense; !s.HasField || s.InData || s.Field != 1 || !s.HasBit || 1<<s.Bit != f {
					t.Errorf("READ(%s): field pointer %+v for bit %02x", rw.name, s, f)
				}
				r.refused(r.write(rw.write(f, 0, 1), data[:block]), badField)
			}
			// Hints are let pass.
			c := rw.read(0x07, 0, 1)
			c[len(c)-2] |= 0x1f // GROUP NUMBER
			if rw.name != "10" {
				r.good(r.read(c, int(block)))
			}
			c = rw.read(0, 0, 1)
			c[len(c)-1] = 0x04 // NACA
			r.refused(r.read(c, int(block)), badField)
		}
		r.refused(r.read(rw16(cdb.Read16, 0, 1<<64-1, 1), int(block)), badLBA)
		r.refused(r.read(rw16(cdb.Read16, 0, 1<<64-1, 0), 0), badLBA)
		r.refused(r.read(rw16(cdb.Read16, 0, 1, 1<<32-1), 512), badLBA)
	}
}

// Length limits come after the range.
func TestTransferLimit(t *testing.T) {
	r := newRig(t, 64*mib, nil)
	const limit = 8 * mib / 512
	res := r.refused(r.read(rw16(cdb.Read16, 0, 0, limit+1), 512), badField)
	if res.sense.Field != 10 {
		t.Errorf("field pointer %d", res.sense.Field)
	}
	r.refused(r.write(rw12(cdb.Write12, 0, 0, limit+1), make([]byte, 512)), badField)
	r.refused(r.read(rw16(cdb.Read16, 0, 64*mib/512-1, limit+1), 512), badLBA)
	r.refused(r.do(command{cdb: rw16(cdb.Verify16, 0, 0, limit+1)}), badField)
	r.good(r.read(rw16(cdb.Read16, 0, 3, limit), 8*mib))
	data := pattern(8*mib, 3)
	r.good(r.write(rw16(cdb.Write16, 0, 3, limit), data))
	if got := r.good(r.read(rw16(cdb.Read16, 0, 3, limit), 8*mib)).in; !bytes.Equal(got, data) {
		t.Error("8 MiB differ")
	}
	if n := r.lu.Count(scsi.OpWrite); n != 1 {
		t.Errorf("one WRITE made %d requests", n)
	}
}

// E is what the initiator expects, S what the CDB asks for (RFC 7143 "Residual").
func TestResiduals(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		r := newRig(t, mib, func(c *scsi.LUConfig) { c.LogicalBlock = block })
		b := int(block)
		old := pattern(4*b, 1)
		r.good(r.write(rw10(cdb.Write10, 0, 0, 4), old))
		for _, e := range []int{0, 1, 100, 511, 512, 513, b, b + 7, 2*b - 1, 2 * b, 2*b + 1, 3 * b} {
			res := r.good(r.read(rw10(cdb.Read10, 0, 0, 2), e))
			if res.transfer != 2*block || !bytes.Equal(res.in, old[:min(e, 2*b)]) {
				t.Errorf("READ of 2 blocks of %d, E=%d: transfer %d, %d bytes", b, e, res.transfer, len(res.in))
			}
		}
		for _, e := range []int{0, 1, b - 1, b, b + 1, 2*b - 1, 2 * b, 2*b + 1, 3 * b} {
			r.good(r.write(rw10(cdb.Write10, 0, 0, 4), old))
			fresh := pattern(3*b, 77)
			res := r.write(rw10(cdb.Write10, 0, 0, 2), fresh[:e])
			want := bytes.Clone(old)
			if res.transfer != 2*block {
				t.Errorf("WRITE, E=%d: transfer %d", e, res.transfer)
			}
			if n := min(e, 2*b); n%b == 0 {
				r.good(res)
				copy(want, fresh[:n])
			} else {
				r.refused(res, badUnit)
			}
			if got := r.read(rw10(cdb.Read10, 0, 0, 4), 4*b).in; !bytes.Equal(got, want) {
				t.Errorf("WRITE, E=%d: wrong blocks on the medium", e)
			}
		}
		// Direction bits that do not match: nothing moves.
		res := r.good(r.do(command{cdb: rw10(cdb.Read10, 0, 0, 2), write: true, expected: 2 * block}))
		if res.transfer != 2*block || len(res.in) != 0 {
			t.Error("READ with the W bit moved data")
		}
		res = r.good(r.do(command{cdb: rw10(cdb.Write10, 0, 0, 2), read: true, expected: 2 * block}))
		if res.transfer != 2*block {
			t.Error("WRITE with the R bit")
		}
		r.refused(r.do(command{cdb: rw10(cdb.Write10, 0, 0, 2), read: true, write: true, expected: 2 * block}), badOpcode)
	}
}

func TestCompareAndWrite(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		r := newRig(t, 4*mib, func(c *scsi.LUConfig) { c.LogicalBlock = block })
		b := int(block)
		old, fresh := make([]byte, b), pattern(b, 9)
		r.good(r.write(caw(0x18, 7, 1), append(bytes.Clone(old), fresh...)))
		if got := r.read(rw10(cdb.Read10, 0, 7, 1), b).in; !bytes.Equal(got, fresh) {
			t.Error("equal, but not written")
		}
		wrong := bytes.Clone(fresh)
		wrong[b-3] ^= 1
		res := r.refused(r.write(caw(0, 7, 1), append(wrong, old...)), miscompare)
		if !res.sense.HasInfo || res.sense.Info != uint64(b-3) {
			t.Errorf("INFORMATION %+v, want %d", res.sense, b-3)
		}
		if got := r.read(rw10(cdb.Read10, 0, 7, 1), b).in; !bytes.Equal(got, fresh) {
			t.Error("a miscompare changed the medium")
		}
		r.good(r.write(caw(0, 16, 255), make([]byte, 2*255*b)))
		// E must be exactly 2 n b.
		for _, n := range []int{0, 1, b, 2*b - 1, 2*b + 1, 3 * b, 4 * b} {
			r.refused(r.write(caw(0, 7, 1), make([]byte, n)), badField)
		}
		r.good(r.write(caw(0, 7, 0), nil))
		r.refused(r.write(caw(0, 7, 0), make([]byte, 2*b)), badField)
		last := uint64(4*mib/b - 1)
		r.refused(r.write(caw(0, last, 2), make([]byte, 4*b)), badLBA)
		r.refused(r.write(caw(0x20, 7, 1), make([]byte, 2*b)), badField)
		if n := r.lu.Count(scsi.OpCompareAndWrite); n != 3 {
			t.Errorf("%d requests, want 3", n)
		}
	}
}

func TestSynchronizeCache(t *testing.T) {
	for _, volatile := range []bool{false, true} {
		r := newRig(t, mib, func(c *scsi.LUConfig) { c.VolatileCache = volatile })
		want := uint64(0)
		for _, c := range [][]byte{
			rw10(cdb.SynchronizeCache10, 0, 0, 0), rw10(cdb.SynchronizeCache10, 0x04, 5, 9),
			rw16(cdb.SynchronizeCache16, 0, 0, 0), rw16(cdb.SynchronizeCache16, 0, 2047, 1),
		} {
			r.good(r.none(c...))
			if want++; r.lu.Count(scsi.OpFlush) != want {
				t.Errorf("CDB %x: no flush", c)
			}
		}
		r.refused(r.none(rw10(cdb.SynchronizeCache10, 0, 2048, 0)...), badLBA)
		r.refused(r.none(rw16(cdb.SynchronizeCache16, 0, 2047, 2)...), badLBA)

		// IMMED=1 is answered before the flush, and one runs at a time.
		r.lu.Hold()
		r.good(r.none(rw10(cdb.SynchronizeCache10, 2, 0, 0)...))
		if got := r.lu.Queued() != 0; got != volatile {
			t.Errorf("WCE %v: immediate flush started: %v", volatile, got)
		}
		r.lu.Release()
		r.good(r.none(rw10(cdb.SynchronizeCache10, 2, 0, 0)...))
	}
}

func TestVerify(t *testing.T) {
	r := newRig(t, 8*mib, nil)
	const blocks = 1200 // more than two pieces
	data := pattern(blocks*512, 5)
	r.good(r.write(rw16(cdb.Write16, 0, 9, blocks), data))
	make3 := func(f byte, n uint32) [][]byte {
		return [][]byte{rw10(cdb.Verify10, f, 9, uint16(n)), rw12(cdb.Verify12, f, 9, n), rw16(cdb.Verify16, f, 9, n)}
	}
	for _, c := range make3(0, blocks) { // readable
		r.good(r.none(c...))
	}
	for _, c := range make3(0, 0) {
		r.good(r.none(c...))
	}
	for _, c := range make3(0x02, blocks) { // compare
		r.good(r.write(c, data))
		for _, at := range []int{0, 256 << 10, blocks*512 - 1} {
			wrong := bytes.Clone(data)
			wrong[at] ^= 0x80
			if res := r.refused(r.write(c, wrong), miscompare); res.sense.Info != uint64(at) {
				t.Errorf("INFORMATION %d, want %d", res.sense.Info, at)
			}
		}
		r.refused(r.write(c, data[:len(data)-512]), badUnit)
		r.good(r.write(c, append(bytes.Clone(data), 1, 2, 3)))
	}
	for _, c := range make3(0x04, 1) {
		r.refused(r.write(c, data[:512]), badField)
	}
	same := bytes.Repeat(data[:512], blocks)
	r.good(r.write(rw16(cdb.Write16, 0, 9, blocks), same))
	for _, c := range make3(0x06, blocks) { // one block against all
		r.good(r.write(c, data[:512]))
		wrong := bytes.Clone(data[:512])
		wrong[99] ^= 1
		if res := r.refused(r.write(c, wrong), miscompare); res.sense.Info != 99 {
			t.Errorf("INFORMATION %d, want 99", res.sense.Info)
		}
		r.refused(r.write(c, data[:511]), badUnit)
	}
	r.good(r.write(unmapCDB(24), cdb.AppendUnmap(nil, [2]uint64{8, 2048})))
	r.good(r.write(rw10(cdb.Verify10, 0x06, 9, blocks), make([]byte, 512))) // unmapped: zeros
	r.lu.SetFail(func(*scsi.Request) error { return scsi.ErrMedium })
	r.refused(r.none(make3(0, 1)[0]...), code{3, 0x11, 0})
}

func TestWriteAndVerify(t *testing.T) {
	r := newRig(t, 8*mib, nil)
	data := pattern(700*512, 5)
	for _, flags := range []byte{0, 0x02} {
		for i, c := range [][]byte{rw10(cdb.WriteAndVerify10, flags, 3, 700), rw12(cdb.WriteAndVerify12, flags, 3, 700), rw16(cdb.WriteAndVerify16, flags, 3, 700)} {
			data[0] = byte(i)
			r.good(r.write(c, data))
			if got := r.read(rw10(cdb.Read10, 0, 3, 700), len(data)).in; !bytes.Equal(got, data) {
				t.Errorf("CDB %x: data differ", c)
			}
		}
	}
	r.refused(r.write(rw10(cdb.WriteAndVerify10, 6, 3, 1), data[:512]), badField)
	// The medium lies: what is read back is another block.
	n := 0
	r.lu.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpWrite {
			q.Off += 512
		}
		n++
		return nil
	})
	r.good(r.write(rw10(cdb.WriteAndVerify10, 0, 3, 1), data[512:1024]))
	r.refused(r.write(rw10(cdb.WriteAndVerify10, 2, 3, 1), data[1024:1536]), miscompare)
	if n != 4 {
		t.Errorf("%d requests, want write and read twice", n)
	}
}

func TestPreFetch(t *testing.T) {
	r := newRig(t, 16*mib, nil)
	r.good(r.none(rw10(cdb.PreFetch10, 0, 0, 1024)...))
	if n := r.lu.Count(scsi.OpRead); n != 2 {
		t.Errorf("%d reads, want 2 pieces", n)
	}
	r.good(r.none(rw16(cdb.PreFetch16, 2, 0, 1024)...)) // IMMED
	r.good(r.none(rw16(cdb.PreFetch16, 0, 32767, 0)...))
	r.refused(r.none(rw16(cdb.PreFetch16, 0, 32768, 0)...), badLBA)
	r.refused(r.none(rw10(cdb.PreFetch10, 0, 32767, 2)...), badLBA)
	r.lu.SetFail(func(*scsi.Request) error { return scsi.ErrMedium })
	r.good(r.none(rw10(cdb.PreFetch10, 0, 0, 8)...)) // a hint does not fail
}

// Buffers of commands that read in pieces are bounded; at the bound the
// initiator is pushed back.
func TestScratchIsBounded(t *testing.T) {
	r := newRig(t, mib, nil)
	r.lu.Hold()
	full := 0
	done := make(chan byte, 200)
	for range 100 {
		p := r.on(r.n, 0)
		k := p.newTask(command{cdb: rw10(cdb.Verify10, 0, 0, 8)})
		k.Complete = func(k *scsi.Task) { done <- k.Status }
		if v := r.s.Begin(k); v != scsi.Ready {
			t.Fatal(v)
		}
		r.s.Execute(k)
	}
	r.lu.Release()
	for range 100 {
		if <-done == cdb.TaskSetFull {
			full++
		}
	}
	if full != 36 {
		t.Errorf("%d commands got TASK SET FULL, want 36", full)
	}
	r.good(r.none(rw10(cdb.Verify10, 0, 0, 8)...))
}
