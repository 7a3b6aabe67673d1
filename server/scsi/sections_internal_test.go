package scsi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

func roomy(thresholds ...uint8) *unitConfig {
	return &unitConfig{shift: 9, LUConfig: LUConfig{
		Thin: true, Thresholds: thresholds, Space: func() Space { return Space{Total: 1000 << 20} },
	}}
}

func TestSelectThresholds(t *testing.T) {
	u := roomy(70, 80)
	old := &luState{protected: true}
	page := appendThresholdPage(u, old, modeCurrent, nil)
	if next, err := old.selectThresholds(u, page); err != nil || !next.protected || len(next.thresholds) != 2 {
		t.Fatalf("the current page is refused: %v", err)
	}
	page[16] = 0
	binary.BigEndian.PutUint32(page[28:], 77)
	next, err := old.selectThresholds(u, page)
	if err != nil || next.thresholds[0] != (thresholdSetting{false, 300}) || next.thresholds[1] != (thresholdSetting{true, 77}) {
		t.Fatalf("%+v, %v", next, err)
	}
	if len(old.thresholds) != 0 {
		t.Error("the old state was modified")
	}
	// It is what MODE SENSE says then, and survives the codec; defaults stay.
	if got := appendThresholdPage(u, next, modeCurrent, nil); !bytes.Equal(got, page) {
		t.Errorf("page %x, want %x", got, page)
	}
	if got := appendThresholdPage(u, next, modeDefault, nil); !bytes.Equal(got, appendThresholdPage(u, old, modeCurrent, nil)) {
		t.Errorf("defaults %x", got)
	}
	again, err := decodeState(StateID{}, next.encode(nil))
	if err != nil || !bytes.Equal(appendThresholdPage(u, again, modeCurrent, nil), page) {
		t.Errorf("%+v, %v", again, err)
	}
	// What was set for two thresholds says nothing of three.
	if all := next.thresholdsOf(roomy(10, 20, 30), 1000<<20); all[0] != (thresholdSetting{true, 900}) {
		t.Errorf("%+v", all)
	}
	for at := range page {
		bad := bytes.Clone(page)
		bad[at] ^= 0x40
		_, err := old.selectThresholds(u, bad)
		var r *refusal
		changeable := at >= 16 && (at-16)%8 >= 4
		if changeable != (err == nil) || err != nil && (!errors.As(err, &r) || int(r.sense.Field) != at || !r.sense.InData) {
			t.Errorf("byte %d: %v", at, err)
		}
	}
	// In the parameter list of MODE SELECT, behind another page.
	list := append(make([]byte, 20), page...)
	fieldOf := func(err error) int {
		var r *refusal
		if errors.As(err, &r) && r.sense.ASC == 0x26 {
			return int(r.sense.Field)
		}
		return -1
	}
	if next, n, err := old.modeThresholds(u, list, 20); err != nil || n != len(page) || next.thresholds[1].count != 77 {
		t.Errorf("%+v, %d bytes, %v", next, n, err)
	}
	if same, n, err := next.modeThresholds(u, list, 20); err != nil || n != len(page) || same != next {
		t.Errorf("nothing changes, yet %+v, %d bytes, %v", same, n, err)
	}
	for at := range 20 {
		if _, n, err := old.modeThresholds(u, list, at); n != 0 || err != nil {
			t.Errorf("a page at %d of %d bytes: %v", at, n, err)
		}
	}
	if _, _, err := old.modeThresholds(u, list[:len(list)-1], 20); err == nil || fieldOf(err) >= 0 {
		t.Errorf("a cut page: %v", err)
	}
	for _, at := range []int{22, 23, 24, 37, 39} {
		bad := bytes.Clone(list)
		bad[at] ^= 1
		if _, _, err := old.modeThresholds(u, bad, 20); fieldOf(err) != at && (at != 23 || fieldOf(err) != 22) {
			t.Errorf("byte %d: %v", at, err)
		}
	}
	if _, n, err := old.modeThresholds(roomy(), list, 20); n != 0 || err != nil {
		t.Errorf("without thresholds: %d bytes, %v", n, err)
	}
	if _, err := old.selectThresholds(u, page[:24]); err == nil {
		t.Error("a cut page is accepted")
	}
	if _, err := old.selectThresholds(roomy(), page); err == nil {
		t.Error("a page that does not exist is accepted")
	}
}

func TestSanitizeSection(t *testing.T) {
	birth := StateID{Epoch: 3, Seq: 1 << 40}
	for _, r := range []*sanitizeRecord{
		{birth: birth, passes: 1},
		{birth: birth, passes: 31, pass: 30, done: 1 << 50, unrestricted: true, invert: true, failed: true, pattern: []byte("p")},
		{birth: birth, passes: 2, pattern: bytes.Repeat([]byte{7}, maxPattern)},
	} {
		st := &luState{sanitize: r}
		b := st.encode(nil)
		again, err := decodeState(StateID{}, b)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again.encode(nil), b) || again.sanitize.birth != birth || again.sanitize.done != r.done || !bytes.Equal(again.sanitize.pattern, r.pattern) {
			t.Errorf("%+v became %+v", r, again.sanitize)
		}
	}
	good := (&luState{sanitize: &sanitizeRecord{passes: 2}}).putSanitize(nil)
	for name, change := range map[string]func([]byte) []byte{
		"short":    func(b []byte) []byte { return b[:sanitizeBytes-1] },
		"long":     func(b []byte) []byte { return append(b, make([]byte, maxPattern+1)...) },
		"bits":     func(b []byte) []byte { b[16] = 8; return b },
		"passes":   func(b []byte) []byte { b[17] = 0; return b },
		"all done": func(b []byte) []byte { b[18] = 2; return b },
	} {
		if err := new(luState).getSanitize(change(bytes.Clone(good))); !errors.Is(err, errState) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Any bytes of the two sections: no panic, and what is accepted comes back.
func FuzzSections(f *testing.F) {
	f.Add((&luState{sanitize: &sanitizeRecord{passes: 2, pattern: []byte("x")}}).putSanitize(nil))
	f.Add((&luState{thresholds: []thresholdSetting{{true, 5}, {false, 6}}}).putThresholds(nil))
	u := roomy(70, 80)
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, s := range []struct {
			get func(*luState, []byte) error
			put func(*luState, []byte) []byte
		}{{(*luState).getSanitize, (*luState).putSanitize}, {(*luState).getThresholds, (*luState).putThresholds}} {
			st := new(luState)
			if s.get(st, b) != nil {
				continue
			}
			if again := s.put(st, nil); !bytes.Equal(again, b) {
				t.Fatalf("%x became %x", b, again)
			}
			if w := st.sanitize; w != nil && len(w.block(w.pass, 512))%512 != 0 {
				t.Fatal("not a block")
			}
		}
		if next, err := new(luState).selectThresholds(u, b); err == nil && !bytes.Equal(appendThresholdPage(u, next, modeCurrent, nil), b) {
			t.Fatalf("page %x", b)
		}
		if len(b) >= 5 && len(b) <= 516 {
			if r, _, ok := parseOverwrite(b, 512); ok && (len(r.pattern) == 0 || len(r.pattern) > len(b)-4 || r.passes == 0) {
				t.Fatalf("%+v", r)
			}
		}
		wantedGroup(b, []PortGroup{{ID: 1}, {ID: 2}})
	})
}
