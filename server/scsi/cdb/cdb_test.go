package cdb

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func TestSizeFollowsGroupCode(t *testing.T) {
	for op, want := range map[byte]int{
		TestUnitReady: 6, Write6: 6, Read10: 10, Unmap: 10, ModeSense10: 10, PersistentReserveIn: 10,
		Read16: 16, ServiceActionIn16: 16, ReportLUNs: 12, Read12: 12, 0x7f: 0, 0xc0: 0, 0xff: 0,
	} {
		if got := Size(op); got != want {
			t.Errorf("Size(%02x) = %d, want %d", op, got, want)
		}
	}
}

func TestRange(t *testing.T) {
	for _, c := range []struct {
		name   string
		cdb    [16]byte
		lba    uint64
		blocks uint32
	}{
		{"READ(6)", [16]byte{Read6, 0xff, 0x34, 0x56, 7}, 0x1f3456, 7},
		{"READ(6) of 256", [16]byte{Read6, 0, 0, 1, 0}, 1, 256},
		{"READ(10)", [16]byte{Read10, 0, 0xff, 0xfe, 0xfd, 0xfc, 9, 0x12, 0x34}, 0xfffefdfc, 0x1234},
		{"WRITE SAME(10)", [16]byte{WriteSame10, 8, 0, 0, 1, 0, 0, 0, 0}, 256, 0},
		{"READ(12)", [16]byte{Read12, 0, 1, 2, 3, 4, 5, 6, 7, 8}, 0x01020304, 0x05060708},
		{"READ(16)", [16]byte{Read16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, 0x0102030405060708, 0x090a0b0c},
		{"variable length", [16]byte{0x7f, 0xff, 0xff, 0xff, 0xff}, 0, 0},
	} {
		if lba, n := Range(&c.cdb); lba != c.lba || n != c.blocks {
			t.Errorf("%s: Range = %x, %x, want %x, %x", c.name, lba, n, c.lba, c.blocks)
		}
	}
}

func TestFirstBit(t *testing.T) {
	m := Mask{0, 0xe7, 0, 0, 0, 0, 0x80}
	if _, _, found := m.FirstBit(&[16]byte{0xff, 0x18, 0xff}); found {
		t.Error("bits outside of the mask were found")
	}
	for _, c := range []struct {
		cdb   [16]byte
		field uint16
		bit   uint8
	}{
		{[16]byte{0, 0x20}, 1, 5},
		{[16]byte{0, 0x05, 0, 0, 0, 0, 0xff}, 1, 2},
		{[16]byte{0, 0, 0, 0, 0, 0, 0xff}, 6, 7},
	} {
		field, bit, found := m.FirstBit(&c.cdb)
		if !found || field != c.field || bit != c.bit {
			t.Errorf("FirstBit(%x) = %d.%d %v, want %d.%d", c.cdb, field, bit, found, c.field, c.bit)
		}
	}
}

func TestLUN(t *testing.T) {
	for _, lun := range []uint16{0, 1, 255, 256, 4095, MaxLUN} {
		v := EncodeLUN(lun)
		if got, ok := DecodeLUN(v); !ok || got != lun {
			t.Errorf("DecodeLUN(EncodeLUN(%d)=%016x) = %d, %v", lun, v, got, ok)
		}
	}
	if EncodeLUN(255) != 0x00ff<<48 || EncodeLUN(256) != 0x4100<<48 {
		t.Error("wrong addressing method at the border of 256")
	}
	if lun, ok := DecodeLUN(0x4003 << 48); !ok || lun != 3 {
		t.Error("flat space addressing below 256 is legal")
	}
	for _, v := range []uint64{1, 0x0001_0001_0000_0000, 0x0100 << 48, 0x8001 << 48, WellKnownReportLUNs, 0xd200 << 48} {
		if _, ok := DecodeLUN(v); ok {
			t.Errorf("DecodeLUN(%016x) is ok", v)
		}
	}
}

func TestSenseFormats(t *testing.T) {
	var b [MaxSenseBytes]byte
	s := Sense{Key: Miscompare, ASC: 0x1d, Info: 0x102, HasInfo: true}
	n := s.Encode(b[:], false)
	want := []byte{0xf0, 0, 0x0e, 0, 0, 1, 2, 0x0a, 0, 0, 0, 0, 0x1d, 0, 0, 0, 0, 0}
	if !bytes.Equal(b[:n], want) {
		t.Errorf("fixed\n got %x\nwant %x", b[:n], want)
	}
	s = Sense{Key: IllegalRequest, ASC: 0x24, Field: 1, HasField: true, Bit: 5, HasBit: true}
	n = s.Encode(b[:], false)
	want = []byte{0x70, 0, 5, 0, 0, 0, 0, 0x0a, 0, 0, 0, 0, 0x24, 0, 0, 0xcd, 0, 1}
	if !bytes.Equal(b[:n], want) {
		t.Errorf("fixed with field pointer\n got %x\nwant %x", b[:n], want)
	}
	n = s.Encode(b[:], true)
	want = []byte{0x72, 5, 0x24, 0, 0, 0, 0, 8, 2, 6, 0, 0, 0xcd, 0, 1, 0}
	if !bytes.Equal(b[:n], want) {
		t.Errorf("descriptor with field pointer\n got %x\nwant %x", b[:n], want)
	}
	for _, s := range []Sense{
		{Key: NotReady, ASC: 0x04, ASCQ: 0x1b, Progress: 0x8001, HasProgress: true},
		{Key: NoSense, Progress: 0, HasProgress: true},
		{Key: 0xa, ASC: 0x0d, ASCQ: 2, Command: 0x01020304, HasCommand: true, Info: 9, HasInfo: true},
	} {
		for _, descriptor := range []bool{false, true} {
			n := s.Encode(b[:], descriptor)
			if got, _, ok := ParseSense(b[:n]); !ok || got != s {
				t.Errorf("descriptor %v: %+v became %+v", descriptor, s, got)
			}
		}
	}
	long := Sense{Key: 0xa, Command: 1 << 40, HasCommand: true}
	n = long.Encode(b[:], false)
	if got, _, _ := ParseSense(b[:n]); got.HasCommand {
		t.Errorf("a value of 64 bits in fixed format: %+v", got)
	}
	s = Sense{Key: MediumError, ASC: 0x11, Info: 1 << 40, HasInfo: true}
	n = s.Encode(b[:], false)
	if got, _, _ := ParseSense(b[:n]); got.HasInfo {
		t.Error("INFORMATION above 32 bits must not be VALID in fixed format")
	}
	n = s.Encode(b[:], true)
	if got, desc, ok := ParseSense(b[:n]); !ok || !desc || got != s {
		t.Errorf("descriptor round trip: %+v", got)
	}
}

func TestUnmapList(t *testing.T) {
	b := AppendUnmap(nil, [2]uint64{5, 6}, [2]uint64{1 << 40, 0})
	list, ok := ParseUnmap(b)
	if !ok || list.Len() != 2 {
		t.Fatalf("ParseUnmap: %d descriptors, %v", list.Len(), ok)
	}
	if lba, n := list.At(0); lba != 5 || n != 6 {
		t.Errorf("descriptor 0 = %d+%d", lba, n)
	}
	if lba, n := list.At(1); lba != 1<<40 || n != 0 || list.Offset(1) != 24 {
		t.Errorf("descriptor 1 = %d+%d at %d", lba, n, list.Offset(1))
	}
	for n, want := range map[int]int{8: 0, 23: 0, 24: 1, 39: 1, 40: 2} {
		if list, ok := ParseUnmap(b[:n]); !ok || list.Len() != want {
			t.Errorf("cut to %d bytes: %d descriptors, want %d", n, list.Len(), want)
		}
	}
	if _, ok := ParseUnmap(b[:7]); ok {
		t.Error("a list without a whole header is ok")
	}
	binary.BigEndian.PutUint16(b[2:], 20) // no multiple of 16: the whole ones count
	if list, _ := ParseUnmap(b); list.Len() != 1 {
		t.Errorf("length 20: %d descriptors, want 1", list.Len())
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{Read6, 1, 2, 3, 0, 0}, uint64(0))
	f.Add([]byte{Read16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0}, uint64(0x4001<<48))
	f.Add(AppendUnmap(nil, [2]uint64{1, 2}, [2]uint64{3, 4}), WellKnownReportLUNs)
	f.Add([]byte{0x72, 5, 0x24, 0, 0, 0, 0, 8, 2, 6, 0, 0, 0xcd, 0, 1, 0}, uint64(1))
	f.Add([]byte{0xf0, 0, 0x0e, 0, 0, 1, 2, 0x0a, 0, 0, 0, 0, 0x1d, 0, 0, 0, 0, 0}, uint64(2))
	f.Fuzz(func(t *testing.T, b []byte, lun uint64) {
		var c [16]byte
		copy(c[:], b)
		lba, blocks := Range(&c)
		if Size(c[0]) == 0 && (lba != 0 || blocks != 0) {
			t.Fatal("a CDB of unknown layout has a range")
		}
		var m Mask
		copy(m[:], b[min(len(b), 16):])
		if field, bit, found := m.FirstBit(&c); found && c[field]&m[field]&(1<<bit) == 0 {
			t.Fatal("FirstBit points at a bit that is not set")
		}
		if n, ok := DecodeLUN(lun); ok {
			if again, ok := DecodeLUN(EncodeLUN(n)); !ok || again != n {
				t.Fatal("LUN does not survive the round trip")
			}
		}
		if list, ok := ParseUnmap(b); ok {
			for i := range list.Len() {
				list.At(i)
				if int(list.Offset(i))+unmapDescriptorBytes > len(b) {
					t.Fatal("descriptor beyond the parameter list")
				}
			}
		}
		if s, desc, ok := ParseSense(b); ok {
			var buf [MaxSenseBytes]byte
			n := s.Encode(buf[:], desc)
			if again, d, ok := ParseSense(buf[:n]); !ok || d != desc || again != s {
				t.Fatalf("sense does not survive the round trip: %+v, %+v", s, again)
			}
		}
	})
}
