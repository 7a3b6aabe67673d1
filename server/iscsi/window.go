package iscsi

import "github.com/twinsan/twinsan/server/iscsi/pdu"

// window is the command window of a session (RFC 7143 section 4.2.2.1): which
// command number comes next, which are taken, which have come already. All
// comparisons are serial.
//
//	    exp            max
//	-----|--------------|-----> CmdSN
//	 old  taken or held   dropped
//
// max - exp + 1 is the size less the commands under way; it grows only when one
// of them ends, so max never goes back. The connection's mutex guards it.
type window struct {
	exp  uint32
	max  uint32
	came []bool // by CmdSN modulo its length: received ahead of exp
	held int    // how many are set
}

// newWindow returns a window of size commands that expects the number first.
func newWindow(first uint32, size int) window {
	length := 1
	for length < size {
		length *= 2
	}
	return window{exp: first, max: first + uint32(size) - 1, came: make([]bool, length)}
}

// arrival is what to do with a numbered PDU.
type arrival uint8

const (
	arrivalDrop  arrival = iota // outside the window, or come before
	arrivalNext                 // the one that is expected
	arrivalAhead                // others have to come first
)

func (w *window) slot(sn uint32) *bool { return &w.came[sn&uint32(len(w.came)-1)] }

// inside reports exp <= sn <= max.
func (w *window) inside(sn uint32) bool {
	return !pdu.SerialLess(sn, w.exp) && !pdu.SerialLess(w.max, sn)
}

// classify tells what to do with a PDU of this number. It changes nothing.
func (w *window) classify(sn uint32) arrival {
	switch {
	case !w.inside(sn) || *w.slot(sn):
		return arrivalDrop
	case sn == w.exp:
		return arrivalNext
	}
	return arrivalAhead
}

// mark notes that a number inside the window, ahead of exp, has come.
func (w *window) mark(sn uint32) {
	if s := w.slot(sn); !*s {
		*s = true
		w.held++
	}
}

// advance takes the expected number. The command holds its place in the window
// until release.
func (w *window) advance() {
	if s := w.slot(w.exp); *s {
		*s = false
		w.held--
	}
	w.exp++
}

// release gives a place back: the command has ended.
func (w *window) release() { w.max++ }

// nextCame reports whether the expected number has come ahead.
func (w *window) nextCame() bool { return w.held > 0 && *w.slot(w.exp) }

// closed reports whether the initiator may send no command.
func (w *window) closed() bool { return w.max+1 == w.exp }

// forget drops what has come ahead of a gap: the connection that carried it is
// gone.
func (w *window) forget() {
	clear(w.came)
	w.held = 0
}
