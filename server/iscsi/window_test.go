package iscsi

import "testing"

func TestWindow(t *testing.T) {
	for _, first := range []uint32{0, 100, 0xfffffff0, 0xffffffff} {
		w := newWindow(first, 100)
		at := func(n int) uint32 { return first + uint32(n) }
		for n, want := range map[int]arrival{-1: arrivalDrop, 0: arrivalNext, 1: arrivalAhead, 99: arrivalAhead, 100: arrivalDrop, 1 << 30: arrivalDrop} {
			if got := w.classify(at(n)); got != want {
				t.Errorf("first %#x: %+d is classified %d, want %d", first, n, got, want)
			}
		}
		w.mark(at(1))
		w.mark(at(1))
		if w.classify(at(1)) != arrivalDrop || w.nextCame() {
			t.Errorf("first %#x: number held twice", first)
		}
		w.advance()
		if !w.nextCame() {
			t.Errorf("first %#x: held number is not next", first)
		}
		w.advance()
		if w.held != 0 || w.nextCame() || w.classify(at(1)) != arrivalDrop || w.classify(at(2)) != arrivalNext {
			t.Errorf("first %#x: after the gap", first)
		}
		for n := 2; n < 100; n++ {
			w.advance()
		}
		if !w.closed() || w.classify(at(100)) != arrivalDrop {
			t.Errorf("first %#x: not closed with 100 commands under way", first)
		}
		w.release()
		if w.closed() || w.classify(at(100)) != arrivalNext || w.classify(at(101)) != arrivalDrop {
			t.Errorf("first %#x: one place free", first)
		}
	}
}
