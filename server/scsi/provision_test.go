package scsi_test

import (
	"bytes"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

func TestUnmap(t *testing.T) {
	r := newRig(t, 16*mib, nil)
	const last = 16*mib/512 - 1
	unmap := func(ranges ...[2]uint64) result {
		b := cdb.AppendUnmap(nil, ranges...)
		return r.write(unmapCDB(len(b)), b)
	}
	r.good(r.write(rw10(cdb.Write10, 0, 0, 64), pattern(64*512, 1)))
	r.good(unmap([2]uint64{16, 3}, [2]uint64{0, 8}, [2]uint64{100, 0}, [2]uint64{17, 8}))
	if n := r.lu.Count(scsi.OpUnmap); n != 3 {
		t.Errorf("%d requests, want 3", n)
	}
	want := pattern(64*512, 1)
	clear(want[:8*512])
	clear(want[16*512 : 25*512])
	if got := r.read(rw10(cdb.Read10, 0, 0, 64), 64*512).in; !bytes.Equal(got, want) {
		t.Error("wrong blocks unmapped")
	}
	// Nothing is unmapped when one range is bad.
	n := r.lu.Count(scsi.OpUnmap)
	r.refused(unmap([2]uint64{40, 8}, [2]uint64{last, 2}), badLBA)
	r.refused(unmap([2]uint64{40, 8}, [2]uint64{1<<64 - 1, 1}), badLBA)
	if r.lu.Count(scsi.OpUnmap) != n {
		t.Error("a refused UNMAP reached the volume")
	}
	r.good(unmap([2]uint64{last, 1}))
	r.good(unmap([2]uint64{last + 1, 0}, [2]uint64{1<<64 - 1, 0})) // no blocks: no check
	r.good(unmap())
	many := make([][2]uint64, 257)
	for i := range many {
		many[i] = [2]uint64{uint64(i), 1}
	}
	n = r.lu.Count(scsi.OpUnmap)
	r.good(unmap(many[:256]...))
	r.good(unmap([2]uint64{0, 8}, [2]uint64{8, 1}, [2]uint64{9, 0}, [2]uint64{4, 8}, [2]uint64{13, 2}, [2]uint64{15, 1}))
	if n = r.lu.Count(scsi.OpUnmap) - n; n != 3 {
		t.Errorf("ranges that follow on one another took %d requests, want 1 + 2", n)
	}
	if res := r.refused(unmap(many...), badParam); !res.sense.InData {
		t.Error("field pointer is not into the list")
	}
	r.good(r.write(unmapCDB(0), nil))
	r.refused(r.write(unmapCDB(7), make([]byte, 7)), badListLen)
	r.refused(r.write(unmapCDB(24), make([]byte, 23)), badListLen)
	c := unmapCDB(24)
	c[1] = 1 // ANCHOR
	r.refused(r.write(c, make([]byte, 24)), badField)

	big := newRig(t, 1<<40, nil)
	b := cdb.AppendUnmap(nil, [2]uint64{0, 1 << 19}, [2]uint64{1 << 30, 1 << 19})
	big.good(big.write(unmapCDB(len(b)), b))
	b = cdb.AppendUnmap(nil, [2]uint64{0, 1 << 19}, [2]uint64{1 << 30, 1<<19 + 1})
	big.refused(big.write(unmapCDB(len(b)), b), badParam)

	thick := newRig(t, mib, func(c *scsi.LUConfig) { c.Thin = false })
	thick.refused(thick.write(unmapCDB(24), make([]byte, 24)), badOpcode)
}

// The error of one range ends the command.
func TestUnmapFails(t *testing.T) {
	r := newRig(t, mib, nil)
	n := 0
	r.lu.SetFail(func(*scsi.Request) error {
		if n++; n == 2 {
			return scsi.ErrNoSpace
		}
		return nil
	})
	b := cdb.AppendUnmap(nil, [2]uint64{0, 8}, [2]uint64{16, 8}, [2]uint64{32, 8})
	r.refused(r.write(unmapCDB(len(b)), b), code{7, 0x27, 7})
	if n != 2 {
		t.Errorf("%d requests after the failure of the second", n)
	}
}

func TestWriteSame(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		r := newRig(t, 32*mib, func(c *scsi.LUConfig) { c.LogicalBlock = block })
		b := int(block)
		one, zero := pattern(b, 3), make([]byte, b)
		limit := uint32(16 * mib / b)
		for _, c := range [][]byte{rw10(cdb.WriteSame10, 0, 3, 5), rw16(cdb.WriteSame16, 0, 3, 5), rw16(cdb.WriteSame16, 8, 3, 5)} {
			r.good(r.write(rw10(cdb.Write10, 0, 0, 16), pattern(16*b, 8)))
			r.good(r.write(c, one)) // UNMAP=1 with other data is a plain write
			want := pattern(16*b, 8)
			copy(want[3*b:], bytes.Repeat(one, 5))
			if got := r.read(rw10(cdb.Read10, 0, 0, 16), 16*b).in; !bytes.Equal(got, want) {
				t.Errorf("CDB %x: wrong blocks", c)
			}
		}
		if n := r.lu.Count(scsi.OpWriteSame); n != 3 {
			t.Errorf("%d write same requests", n)
		}
		for i, c := range []struct {
			cdb []byte
			out []byte
		}{
			{rw10(cdb.WriteSame10, 0, 3, 5), zero}, {rw10(cdb.WriteSame10, 8, 3, 5), zero}, {rw10(cdb.WriteSame10, 8, 3, 5), nil},
			{rw16(cdb.WriteSame16, 0, 3, 5), zero}, {rw16(cdb.WriteSame16, 8, 3, 5), zero}, {rw16(cdb.WriteSame16, 8, 3, 5), nil},
			{rw16(cdb.WriteSame16, 1, 3, 5), nil}, {rw16(cdb.WriteSame16, 9, 3, 5), nil}, {rw16(cdb.WriteSame16, 9, 3, 5), one},
		} {
			r.good(r.write(rw10(cdb.Write10, 0, 0, 16), pattern(16*b, 8)))
			r.good(r.write(c.cdb, c.out))
			want := pattern(16*b, 8)
			clear(want[3*b : 8*b])
			if got := r.read(rw10(cdb.Read10, 0, 0, 16), 16*b).in; !bytes.Equal(got, want) {
				t.Errorf("case %d: wrong blocks zeroed", i)
			}
		}
		if n := r.lu.Count(scsi.OpUnmap); n != 9 {
			t.Errorf("%d unmap requests, want 9", n)
		}
		for _, c := range [][]byte{rw10(cdb.WriteSame10, 0, 3, 5), rw16(cdb.WriteSame16, 0, 3, 5)} {
			for _, n := range []int{0, 1, b / 2, b - 1} {
				r.refused(r.write(c, one[:n]), badUnit)
			}
			r.refused(r.write(c, make([]byte, 2*b)), badUnit)
		}
		for _, f := range []byte{0x02, 0x04, 0x10, 0x20} { // LBDATA, PBDATA, ANCHOR, WRPROTECT
			r.refused(r.write(rw16(cdb.WriteSame16, f, 3, 5), one), badField)
			r.refused(r.write(rw10(cdb.WriteSame10, f, 3, 5), one), badField)
		}
		r.good(r.write(rw16(cdb.WriteSame16, 0, 0, limit), one))
		r.refused(r.write(rw16(cdb.WriteSame16, 0, 0, limit+1), one), badField)
		r.refused(r.write(rw16(cdb.WriteSame16, 0, 0, 0), one), badField) // to the end: too long
		last := uint64(32*mib/b - 1)
		r.good(r.write(rw16(cdb.WriteSame16, 0, last-1, 0), one))
		if got := r.read(rw16(cdb.Read16, 0, last-1, 2), 2*b).in; !bytes.Equal(got, append(bytes.Clone(one), one...)) {
			t.Error("length 0 is not to the end")
		}
		r.refused(r.write(rw16(cdb.WriteSame16, 0, last+1, 0), one), badLBA)
		r.refused(r.write(rw16(cdb.WriteSame16, 0, last, 2), one), badLBA)
	}
	thick := newRig(t, mib, func(c *scsi.LUConfig) { c.Thin = false })
	thick.refused(thick.write(rw16(cdb.WriteSame16, 8, 0, 1), make([]byte, 512)), badField)
	thick.good(thick.write(rw16(cdb.WriteSame16, 0, 0, 1), make([]byte, 512)))
}
