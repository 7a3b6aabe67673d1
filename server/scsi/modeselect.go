package scsi

import (
	"encoding/binary"
	"slices"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

const (
	modePageFormat = 0x10 // PF of MODE SELECT
	modeSubpage    = 0x40 // SPF of a page
)

// beginModeSelect is begin of MODE SELECT(6) and (10). SP=1 is refused by the
// command table: nothing is saved apart from the current values, which last.
func beginModeSelect(_ *Server, t *Task) Verdict {
	const formatField = 1
	if t.CDB[formatField]&modePageFormat == 0 {
		sense := invalidField(formatField)
		sense.Bit, sense.HasBit = 4, true
		return t.refuse(&sense)
	}
	want := uint32(t.CDB[4])
	if t.CDB[0] == cdb.ModeSelect10 {
		want = uint32(binary.BigEndian.Uint16(t.CDB[7:]))
	}
	switch {
	case want == 0:
		return Finished
	case t.outExpected() < want:
		return t.refuse(&senseListLen)
	}
	t.Transfer, t.OutLen = want, want
	return WantData
}

func runModeSelect(s *Server, t *Task) {
	list := slices.Clone(t.state.data)
	u := t.state.unit
	long := t.CDB[0] == cdb.ModeSelect10
	by := t.Nexus.id()
	t.changeState(s, func(now *luState) (*luState, error) { return now.modeSelect(u, list, long, by) })
}

// modeSelect applies a parameter list (SPC-4 "Mode parameter list"). All of it is
// checked before any of it counts. The mode data length, the medium type's
// place and the device specific parameter are as MODE SENSE returned them, or
// zero: they are not looked at, but for the medium type.
func (st *luState) modeSelect(u *unitConfig, list []byte, long bool, by portID) (*luState, error) {
	at, descriptor, medium, longLBA := 4, 0, 1, false
	if long {
		at, medium = 8, 2
	}
	if len(list) < at {
		return nil, &refusal{senseListLen}
	}
	if list[medium] != 0 {
		return nil, refuseParameter(uint16(medium))
	}
	if long {
		longLBA = list[4]&1 != 0
		descriptor = int(binary.BigEndian.Uint16(list[6:]))
	} else {
		descriptor = int(list[3])
	}
	if err := modeDescriptor(u, list, at, descriptor, longLBA); err != nil {
		return nil, err
	}
	next := st.edited(eventMode, by)
	changed := false
	for at += descriptor; at < len(list); {
		with, n, err := next.modeThresholds(u, list, at)
		if err != nil {
			return nil, err
		}
		if n != 0 {
			changed = changed || with != next
			next = with
			at += n
			continue
		}
		page, d, err := modePageAt(list, at)
		if err != nil {
			return nil, err
		}
		now, mask := make([]byte, page.size), make([]byte, page.size)
		page.body(u, next, now)
		if page.changeable != nil {
			page.changeable(mask)
		}
		for i := range d {
			if (d[i]^now[i])&^mask[i] != 0 {
				return nil, refuseParameter(uint16(at + page.headerBytes() + i))
			}
		}
		if !slices.Equal(d, now) {
			page.set(next, d)
			changed = true
		}
		at += page.headerBytes() + page.size
	}
	if !changed {
		return nil, nil
	}
	return next, nil
}

func (p *modePage) headerBytes() int {
	if p.subpage == 0 {
		return 2
	}
	return 4
}

// modeDescriptor checks the block descriptor: it may only say what is so already.
func modeDescriptor(u *unitConfig, list []byte, at, bytes int, longLBA bool) error {
	want := 8
	if longLBA {
		want = 16
	}
	lengthField := uint16(at - 1)
	switch {
	case bytes == 0:
		return nil
	case bytes != want:
		return refuseParameter(lengthField)
	case len(list)-at < bytes:
		return &refusal{senseListLen}
	}
	d := list[at : at+bytes]
	var blocks, none uint64
	var size uint32
	if longLBA {
		blocks, none, size = binary.BigEndian.Uint64(d), 1<<64-1, binary.BigEndian.Uint32(d[12:])
	} else {
		blocks, none, size = uint64(binary.BigEndian.Uint32(d)), 1<<32-1, binary.BigEndian.Uint32(d[4:])&0xffffff
	}
	switch {
	case blocks != 0 && blocks != none && blocks != u.blocks():
		return refuseParameter(uint16(at))
	case size != u.LogicalBlock:
		return refuseParameter(uint16(at + bytes - 3))
	}
	return nil
}

// modePageAt finds the page that a list has at a place, and its body.
func modePageAt(list []byte, at int) (*modePage, []byte, error) {
	d := list[at:]
	header := 2
	if d[0]&modeSubpage != 0 {
		header = 4
	}
	if len(d) < header {
		return nil, nil, &refusal{senseListLen}
	}
	subpage, size := byte(0), int(d[1])
	if header == 4 {
		subpage, size = d[1], int(binary.BigEndian.Uint16(d[2:]))
	}
	for i := range modePages {
		p := &modePages[i]
		if p.page != d[0]&0x3f || p.subpage != subpage || p.headerBytes() != header {
			continue
		}
		switch {
		case size != p.size:
			return nil, nil, refuseParameter(uint16(at + header - 1))
		case len(d)-header < size:
			return nil, nil, &refusal{senseListLen}
		}
		return p, d[header : header+size], nil
	}
	return nil, nil, refuseParameter(uint16(at))
}
