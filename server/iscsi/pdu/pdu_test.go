package pdu

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
)

// codec is what every PDU type has.
type codec interface {
	Decode(*Header)
	Encode(*Header)
}

var codecs = map[Opcode]func() codec{
	OpSCSICommand:    func() codec { return new(SCSICommand) },
	OpSCSIResponse:   func() codec { return new(SCSIResponse) },
	OpDataOut:        func() codec { return new(DataOut) },
	OpDataIn:         func() codec { return new(DataIn) },
	OpR2T:            func() codec { return new(R2T) },
	OpTaskRequest:    func() codec { return new(TaskRequest) },
	OpTaskResponse:   func() codec { return new(TaskResponse) },
	OpLoginRequest:   func() codec { return new(LoginRequest) },
	OpLoginResponse:  func() codec { return new(LoginResponse) },
	OpTextRequest:    func() codec { return new(TextRequest) },
	OpTextResponse:   func() codec { return new(TextResponse) },
	OpLogout:         func() codec { return new(Logout) },
	OpLogoutResponse: func() codec { return new(LogoutResponse) },
	OpNopOut:         func() codec { return new(NopOut) },
	OpNopIn:          func() codec { return new(NopIn) },
	OpAsync:          func() codec { return new(Async) },
	OpReject:         func() codec { return new(Reject) },
	OpSNACK:          func() codec { return new(SNACK) },
}

// roundTrip checks that what was decoded encodes to a header that decodes to
// the same, and that encoding is stable.
func roundTrip(t *testing.T, op Opcode, h *Header) {
	t.Helper()
	first := codecs[op]()
	first.Decode(h)
	var once, twice Header
	first.Encode(&once)
	if once.Opcode() != op {
		t.Fatalf("opcode %#x encodes as %#x", op, once.Opcode())
	}
	second := codecs[op]()
	second.Decode(&once)
	if !reflect.DeepEqual(first, second) {
		t.Fatalf("opcode %#x: decoded %+v, after a round trip %+v", op, first, second)
	}
	second.Encode(&twice)
	if once != twice {
		t.Fatalf("opcode %#x: two encodings of one value", op)
	}
}

func TestRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for op := range codecs {
		for range 200 {
			var h Header
			for i := range h {
				h[i] = byte(r.Uint32())
			}
			roundTrip(t, op, &h)
		}
	}
}

// TestFieldPositions compares a few headers with the byte pictures of RFC 7143.
func TestFieldPositions(t *testing.T) {
	num := Numbers{0x41424344, 0x51525354, 0x61626364}
	tests := []struct {
		name string
		pdu  codec
		want string
	}{
		{"SCSI Command", &SCSICommand{Immediate: true, Final: true, Read: true, Attr: 1, LUN: 0x0102030405060708, ITT: 0x11121314,
			Expected: 0x21222324, CmdSN: 0x31323334, ExpStatSN: 0x41424344, CDB: [16]byte{0x28, 15: 0xff}},
			"41c1000000000000 0102030405060708 11121314 21222324 31323334 41424344 28000000000000000000000000 0000ff"},
		{"SCSI Response", &SCSIResponse{Underflow: true, Status: 2, ITT: 0x11121314, Numbers: num, ExpDataSN: 7, Residual: 9},
			"2182000200000000 0000000000000000 11121314 00000000 41424344 51525354 61626364 00000007 00000000 00000009"},
		{"Data-In", &DataIn{Final: true, HasStatus: true, Overflow: true, ITT: 1, TTT: NoTag, Numbers: num, DataSN: 2, Offset: 3, Residual: 4},
			"2585000000000000 0000000000000000 00000001 ffffffff 41424344 51525354 61626364 00000002 00000003 00000004"},
		{"Data-Out", &DataOut{Final: true, LUN: 5, ITT: 1, TTT: 2, ExpStatSN: 3, DataSN: 4, Offset: 0x100},
			"0580000000000000 0000000000000005 00000001 00000002 00000000 00000003 00000000 00000004 00000100 00000000"},
		{"R2T", &R2T{LUN: 5, ITT: 1, TTT: 2, Numbers: num, R2TSN: 3, Offset: 4, Length: 5},
			"3180000000000000 0000000000000005 00000001 00000002 41424344 51525354 61626364 00000003 00000004 00000005"},
		{"Login Request", &LoginRequest{Transit: true, CSG: 1, NSG: 3, ISID: [6]byte{1, 2, 3, 4, 5, 6}, TSIH: 0x0708, ITT: 1, CID: 2, CmdSN: 3, ExpStatSN: 4},
			"4387000000000000 0102030405060708 00000001 00020000 00000003 00000004 00000000000000000000000000000000"},
		{"Login Response", &LoginResponse{Transit: true, CSG: 1, NSG: 3, TSIH: 0x0708, ITT: 1, Numbers: num, Status: 0x0203},
			"2387000000000000 0000000000000708 00000001 00000000 41424344 51525354 61626364 02030000 00000000 00000000"},
		{"Task Request", &TaskRequest{Immediate: true, Function: 1, LUN: 5, ITT: 1, RefTag: 2, CmdSN: 3, ExpStatSN: 4, RefCmdSN: 6, ExpDataSN: 7},
			"4281000000000000 0000000000000005 00000001 00000002 00000003 00000004 00000006 00000007 00000000 00000000"},
		{"Logout Response", &LogoutResponse{Response: 1, ITT: 1, Numbers: num, Time2Wait: 2, Time2Retain: 20},
			"2680010000000000 0000000000000000 00000001 00000000 41424344 51525354 61626364 00000000 00020014 00000000"},
		{"Async", &Async{Numbers: num, Event: 1, Parameter3: 10},
			"3280000000000000 0000000000000000 ffffffff 00000000 41424344 51525354 61626364 01000000 0000000a 00000000"},
		{"Reject", &Reject{Reason: 4, Numbers: num},
			"3f80040000000000 0000000000000000 ffffffff 00000000 41424344 51525354 61626364 00000000 00000000 00000000"},
	}
	for _, tt := range tests {
		var h Header
		tt.pdu.Encode(&h)
		const digits = "0123456789abcdef"
		var got strings.Builder
		for _, b := range h {
			got.WriteByte(digits[b>>4])
			got.WriteByte(digits[b&15])
		}
		if want := strings.ReplaceAll(tt.want, " ", ""); got.String() != want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got.String(), want)
		}
	}
}

// TestDigest uses the examples of RFC 7143 appendix A.4, as they stand on the wire.
func TestDigest(t *testing.T) {
	up, down := make([]byte, 32), make([]byte, 32)
	for i := range up {
		up[i], down[i] = byte(i), byte(31-i)
	}
	tests := []struct {
		data []byte
		wire []byte
	}{
		{make([]byte, 32), []byte{0xaa, 0x36, 0x91, 0x8a}},
		{bytes.Repeat([]byte{0xff}, 32), []byte{0x43, 0xab, 0xa8, 0x62}},
		{up, []byte{0x4e, 0x79, 0xdd, 0x46}},
		{down, []byte{0x5c, 0xdb, 0x3f, 0x11}},
	}
	for _, tt := range tests {
		if got := AppendDigest(nil, Digest(tt.data)); !bytes.Equal(got, tt.wire) {
			t.Errorf("digest of % x is % x, want % x", tt.data, got, tt.wire)
		}
	}
	if DataDigest([]byte{1}) != Digest([]byte{1, 0, 0, 0}) {
		t.Error("padding is not part of the data digest")
	}
}

func TestLayout(t *testing.T) {
	var h Header
	h[4] = 2
	h.SetDataLen(0x010203)
	if h.AHSLen() != 8 || h.DataLen() != 0x010203 {
		t.Fatalf("lengths %d, %d", h.AHSLen(), h.DataLen())
	}
	for _, tt := range []struct {
		layout      Layout
		data        int
		start, size int
	}{
		{Layout{}, 0, 56, 56},
		{Layout{}, 5, 56, 64},
		{Layout{HeaderDigest: true}, 4, 60, 64},
		{Layout{HeaderDigest: true, DataDigest: true}, 5, 60, 72},
		{Layout{HeaderDigest: true, DataDigest: true}, 0, 60, 60},
		{Layout{DataDigest: true}, MaxDataLen, 56, 56 + MaxDataLen + 1 + 4},
	} {
		h.SetDataLen(tt.data)
		if start, size := tt.layout.DataStart(&h), tt.layout.Size(&h); start != tt.start || size != tt.size {
			t.Errorf("%+v with %d bytes: start %d, size %d, want %d, %d", tt.layout, tt.data, start, size, tt.start, tt.size)
		}
	}
}

func TestSerialLess(t *testing.T) {
	for _, tt := range []struct {
		a, b uint32
		less bool
	}{{1, 2, true}, {2, 1, false}, {1, 1, false}, {0xffffffff, 0, true}, {0, 0xffffffff, false}, {0xfffffff0, 0x10, true}} {
		if SerialLess(tt.a, tt.b) != tt.less {
			t.Errorf("%#x before %#x: want %v", tt.a, tt.b, tt.less)
		}
	}
}

func TestAHS(t *testing.T) {
	extended := []byte{0, 5, 1, 0, 'a', 'b', 'c', 'd'}
	bidi := []byte{0, 5, 2, 0, 0, 0, 2, 0}
	a, err := ParseAHS(append(append([]byte(nil), extended...), bidi...))
	if err != nil || string(a.ExtendedCDB) != "abcd" || !a.HasBidi || a.BidiExpected != 512 {
		t.Fatalf("%+v, %v", a, err)
	}
	if a, err := ParseAHS(nil); err != nil || a.ExtendedCDB != nil {
		t.Fatalf("none: %+v, %v", a, err)
	}
	for name, bad := range map[string][]byte{
		"cut":          {0, 5, 1},
		"beyond end":   {0, 9, 1, 0, 0, 0, 0, 0},
		"length 0":     {0, 0, 1, 0},
		"empty CDB":    {0, 1, 1, 0},
		"unknown type": {0, 5, 9, 0, 0, 0, 0, 0},
		"bidi length":  {0, 6, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"twice":        append(append([]byte(nil), extended...), extended...),
	} {
		if _, err := ParseAHS(bad); !errors.Is(err, ErrAHS) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestParseText(t *testing.T) {
	got, err := ParseText([]byte("A=1\x00B=\x00C=x=y\x00"), 3)
	want := []Pair{{"A", "1"}, {"B", ""}, {"C", "x=y"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v, %v", got, err)
	}
	for name, bad := range map[string]string{
		"no NUL": "A=1", "no equals": "A\x00", "empty key": "=1\x00", "empty pair": "\x00", "space in key": "A B=1\x00",
		"long key": strings.Repeat("k", 64) + "=1\x00",
	} {
		if _, err := ParseText([]byte(bad), 9); !errors.Is(err, ErrText) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	if _, err := ParseText([]byte("A=1\x00B=2\x00"), 1); !errors.Is(err, ErrTooManyKeys) {
		t.Errorf("limit: error %v", err)
	}
}

func TestParseNumber(t *testing.T) {
	for value, want := range map[string]uint64{"0": 0, "262144": 262144, "0x10": 16, "0Xff": 255} {
		if n, err := ParseNumber(value); err != nil || n != want {
			t.Errorf("%q: %d, %v", value, n, err)
		}
	}
	for _, bad := range []string{"", "0x", "-1", "+1", "0x+1", "1k", "18446744073709551616", "1_0", "0b01"} {
		if n, err := ParseNumber(bad); err == nil {
			t.Errorf("%q reads as %d", bad, n)
		}
	}
}

func TestParseBinary(t *testing.T) {
	for value, want := range map[string]string{"0x00ff": "\x00\xff", "0XAb": "\xab", "0xabc": "\x0a\xbc", "0bAQI=": "\x01\x02", "0BAQID": "\x01\x02\x03"} {
		if b, err := ParseBinary(value, 3); err != nil || string(b) != want {
			t.Errorf("%q: % x, %v", value, b, err)
		}
	}
	for _, bad := range []string{"", "0x", "0b", "00ff", "0xgg", "0x01020304", "0bAQIDBA==", "0b===", "0bAQI"} {
		if b, err := ParseBinary(bad, 3); err == nil {
			t.Errorf("%q reads as % x", bad, b)
		}
	}
	if got := FormatBinary([]byte{0, 0xff}); got != "0x00ff" {
		t.Errorf("formatted %q", got)
	}
}

// TestNoAllocation proves the codec fit for the data path.
func TestNoAllocation(t *testing.T) {
	buf := make([]byte, HeaderLen)
	if n := testing.AllocsPerRun(100, func() {
		h := (*Header)(buf)
		c := SCSICommand{ITT: 1, Expected: 4096}
		c.Encode(h)
		c.Decode(h)
		d := DataIn{ITT: c.ITT, HasStatus: true}
		d.Encode(h)
		_ = Layout{true, true}.Size(h)
		_, _ = ParseAHS(buf[:8])
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzHeader(f *testing.F) {
	f.Add([]byte{0x41, 0xc1}, true)
	f.Add(bytes.Repeat([]byte{0xff}, 100), false)
	f.Fuzz(func(t *testing.T, b []byte, digests bool) {
		var h Header
		ahs := b[copy(h[:], b):]
		if decode := codecs[h.Opcode()]; decode != nil {
			roundTrip(t, h.Opcode(), &h)
		}
		l := Layout{digests, digests}
		if start, size := l.DataStart(&h), l.Size(&h); start < HeaderLen || size < start+h.DataLen() || (size-HeaderLen)%4 != 0 {
			t.Fatalf("layout: start %d, size %d", start, size)
		}
		if a, err := ParseAHS(ahs); err == nil && len(a.ExtendedCDB) > len(ahs) {
			t.Fatal("extended CDB longer than its segment")
		}
	})
}

func FuzzText(f *testing.F) {
	f.Add([]byte("InitiatorName=iqn.x\x00SessionType=Discovery\x00"))
	f.Add([]byte("CHAP_C=0xabc\x00CHAP_R=0bAQI=\x00CHAP_I=0x10\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		pairs, err := ParseText(b, 32)
		if err != nil {
			return
		}
		var again []byte
		for _, p := range pairs {
			again = AppendText(again, p.Key, p.Value)
			if n, err := ParseNumber(p.Value); err == nil && p.Value == "" {
				t.Fatalf("nothing reads as %d", n)
			}
			if v, err := ParseBinary(p.Value, 16); err == nil && (len(v) == 0 || len(v) > 16) {
				t.Fatalf("binary value of %d bytes", len(v))
			}
		}
		if !bytes.Equal(again, b) {
			t.Fatalf("%q comes back as %q", b, again)
		}
	})
}
