package cdb

import (
	"bytes"
	"testing"
)

func TestCSCD(t *testing.T) {
	naa := []byte{0x30, 1, 2, 3, 4, 5, 6, 7}
	b := AppendCSCD(nil, 1, 3, naa, 4096)
	c, ok := ParseCSCD(b)
	if !ok || c.CodeSet != 1 || c.Kind != 3 || !bytes.Equal(c.Designator, naa) || c.BlockBytes != 4096 {
		t.Errorf("%+v %v", c, ok)
	}
	b[1] = 0xe5
	if c, _ := ParseCSCD(b); c.DeviceType != 5 {
		t.Errorf("device type: %+v", c)
	}
	for _, n := range []byte{0, 21, 255} {
		b[7] = n
		if c, ok := ParseCSCD(b); !ok || c.Designator != nil {
			t.Errorf("designator of %d bytes: %x", n, c.Designator)
		}
	}
	if _, ok := ParseCSCD(b[:31]); ok {
		t.Error("a descriptor cut short is ok")
	}
	b[0] = 0xe0
	if _, ok := ParseCSCD(b); ok {
		t.Error("another type is ok")
	}
}

func TestSegments(t *testing.T) {
	for _, s := range []CopySegment{
		{Type: SegmentBlocks, Source: 1, Destination: 0xffff, Count: 0xffff, SourceLBA: 1 << 60, DestLBA: 7, CountsDest: true},
		{Type: SegmentBytes, Source: 2, Destination: 3, Count: 1<<32 - 1, SourceLBA: 5, DestLBA: 1<<64 - 1, SourceByte: 512, DestByte: 1024},
	} {
		b := s.Append(nil)
		if got, ok := ParseSegment(b); !ok || got != s || SegmentSize(b) != len(b) {
			t.Errorf("%+v, %v, want %+v", got, ok, s)
		}
		if _, ok := ParseSegment(b[:len(b)-1]); ok {
			t.Error("a segment cut short is ok")
		}
		b[3]++
		if _, ok := ParseSegment(append(b, 0)); ok {
			t.Error("a segment of another length is ok")
		}
	}
}

func TestTokenLists(t *testing.T) {
	list := append([]byte{0, 30, 3, 0, 0, 0, 0, 9, 0, 0x80, 0, 0, 0, 0, 0, 16}, AppendRanges(nil, [2]uint64{1 << 40, 77})...)
	p, _, ok := ParsePopulateToken(list)
	if !ok || !p.TypeValid || !p.Immediate || p.Timeout != 9 || p.Type != RODPointInTime || p.Ranges.Len() != 1 {
		t.Fatalf("%+v %v", p, ok)
	}
	if lba, n := p.Ranges.At(0); lba != 1<<40 || n != 77 {
		t.Errorf("range %d+%d", lba, n)
	}
	list[1]--
	if _, _, ok := ParsePopulateToken(list); ok {
		t.Error("a data length below the list is ok")
	}
	if p, _, _ := ParsePopulateToken(list[:31]); p.Claimed != 16 || p.Ranges.Len() != 0 {
		t.Errorf("cut: %d bytes claimed, %d ranges", p.Claimed, p.Ranges.Len())
	}
	for _, name := range []string{"iqn", "iqn.2026-11.io.twinsan:test", "iqn4567"} {
		want := Token{Type: RODPointInTime, LengthOK: true, ID: 1 << 63, NAA: []byte{0x30, 1, 2, 3, 4, 5, 6, 7}, Bytes: 1 << 30,
			BlockBytes: 512, Target: []byte(name), Secret: [32]byte{1, 31: 2}}
		var b [TokenBytes]byte
		want.Encode(&b)
		got := ParseToken(b[:])
		if got.ID != want.ID || got.Bytes != want.Bytes || !got.LengthOK || got.Secret != want.Secret ||
			string(got.Target) != name || !bytes.Equal(got.NAA, want.NAA) || got.BlockBytes != 512 {
			t.Errorf("%+v, want %+v", got, want)
		}
		if b[6] != 0x01 || b[7] != 0xf8 || b[131]%4 != 0 {
			t.Errorf("lengths: %x %x", b[6:8], b[128:132])
		}
	}
}

func FuzzCopyLists(f *testing.F) {
	seg := CopySegment{Type: SegmentBytes, Count: 4096}
	f.Add(seg.Append(AppendCSCD(make([]byte, CopyHeaderBytes), 1, 3, []byte{0x30, 1, 2, 3, 4, 5, 6, 7}, 512)))
	f.Add(append(make([]byte, WriteUsingTokenHeaderBytes), AppendRanges(nil, [2]uint64{1, 2})...))
	f.Add([]byte{0, 30, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		ParseCopyHeader(b)
		if c, ok := ParseCSCD(b); ok && len(c.Designator) > designatorBytesMax {
			t.Fatal("designator too long")
		}
		if s, ok := ParseSegment(b); ok {
			again, ok := ParseSegment(s.Append(nil))
			if !ok || again != s {
				t.Fatalf("segment does not survive the round trip: %+v, %+v", s, again)
			}
		}
		for _, l := range lists(b) {
			if len(l) > len(b) {
				t.Fatal("ranges beyond the list")
			}
			for i := range l.Len() {
				l.At(i)
			}
		}
		if len(b) >= TokenBytes {
			tok := ParseToken(b)
			if len(tok.Target) <= 223 {
				var enc [TokenBytes]byte
				tok.Encode(&enc)
				if again := ParseToken(enc[:]); again.ID != tok.ID || again.Secret != tok.Secret || !bytes.Equal(again.NAA, tok.NAA) {
					t.Fatal("token does not survive the round trip")
				}
			}
		}
	})
}

func lists(b []byte) []RangeList {
	p, _, _ := ParsePopulateToken(b)
	w, _, _ := ParseWriteUsingToken(b)
	return []RangeList{p.Ranges, w.Ranges}
}
