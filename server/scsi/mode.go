package scsi

import "encoding/binary"

// Page control of MODE SENSE.
const (
	modeCurrent = iota
	modeChangeable
	modeDefault
	modeSaved
)

// modePage is a mode page. Its body follows the page header.
type modePage struct {
	page, subpage byte
	size          int
	body          func(*unitConfig, *luState, []byte) // fills size zero bytes with the current values
	changeable    func([]byte)                        // fills size zero bytes with the changeable bits; nil: none
	set           func(*luState, []byte)              // takes the values of a page that was checked
}

// Bits of the control mode page.
const (
	modeSWPByte = 2 // of the body
	modeSWP     = 0x08
)

// The pages in ascending order of page and subpage (SPC-4 and SBC-3 "Mode parameters").
var modePages = [...]modePage{
	{page: 0x01, size: 10, body: func(u *unitConfig, _ *luState, d []byte) {
		d[0] = 0xc0 // AWRE, ARRE
		if u.warns() {
			d[5] = 0x80 // LBPERE: thresholds are told
		}
	}},
	{page: 0x08, size: 18, body: func(u *unitConfig, _ *luState, d []byte) {
		if u.VolatileCache {
			d[0] = 0x04 // WCE
		}
	}},
	{page: 0x0a, size: 10, body: func(_ *unitConfig, st *luState, d []byte) {
		d[0] = 0x02 // TST=000b, D_SENSE=0, GLTSD
		d[1] = 0x10 // unrestricted reordering, QERR=00b
		if st.protected {
			d[modeSWPByte] = modeSWP
		}
		d[3] = 0x40                            // ATO=0, TAS
		binary.BigEndian.PutUint16(d[6:], 300) // BUSY TIMEOUT, 100 ms
	},
		changeable: func(d []byte) { d[modeSWPByte] = modeSWP },
		set:        func(st *luState, d []byte) { st.protected = d[modeSWPByte]&modeSWP != 0 }},
	{page: 0x0a, subpage: 0x01, size: 28, body: func(_ *unitConfig, _ *luState, d []byte) { d[0] = 0x01 }}, // IALUAE
	{page: 0x1c, size: 10, body: func(u *unitConfig, _ *luState, d []byte) {
		if !u.warns() {
			d[0] = 0x08 // DEXCPT
		}
		d[1] = 0x06 // MRIE
	}},
}

// modeDefaults is the state of a unit at which nothing was set.
var modeDefaults luState

// modeSense is the reply of MODE SENSE(6) and (10).
func modeSense(_ *Server, t *Task, b []byte) ([]byte, bool) {
	const (
		pageField    = 2
		subpageField = 3
	)
	u := t.state.unit
	long := t.state.cmd.size == 10
	control := t.CDB[pageField] >> 6
	page, subpage := t.CDB[pageField]&0x3f, t.CDB[subpageField]
	if control == modeSaved {
		return t.deny(senseNoSaving)
	}

	var device byte = 0x10 // DPOFUA
	if t.state.protected {
		device |= 0x80 // WP
	}
	descriptor := 8
	longLBA := long && t.CDB[1]&0x10 != 0 // LLBAA
	if longLBA {
		descriptor = 16
	}
	if t.CDB[1]&0x08 != 0 { // DBD
		descriptor = 0
	}
	start := len(b)
	if long {
		b = append(b, 0, 0, 0, device, 0, 0, 0, byte(descriptor))
		if longLBA && descriptor != 0 {
			b[start+4] = 0x01 // LONGLBA
		}
	} else {
		b = append(b, 0, 0, device, byte(descriptor))
	}
	switch descriptor {
	case 8:
		b = binary.BigEndian.AppendUint32(b, uint32(min(u.blocks(), 0xffffffff)))
		b = binary.BigEndian.AppendUint32(b, u.LogicalBlock)
	case 16:
		b = binary.BigEndian.AppendUint64(b, u.blocks())
		b = append(b, 0, 0, 0, 0)
		b = binary.BigEndian.AppendUint32(b, u.LogicalBlock)
	}

	found := false
	for i := range modePages {
		p := &modePages[i]
		if page != 0x3f && page != p.page {
			continue
		}
		if subpage != 0xff && subpage != p.subpage {
			continue
		}
		found = true
		b = p.append(u, t.state.itl.lu.state.Load(), control, b)
	}
	if u.warns() && (page == 0x3f || page == thresholdPage) && (subpage == 0xff || subpage == thresholdSubpage) {
		found = true
		b = appendThresholdPage(u, t.state.itl.lu.state.Load(), control, b)
	}
	if !found {
		return t.deny(invalidField(pageField))
	}
	if long {
		binary.BigEndian.PutUint16(b[start:], uint16(len(b)-start-2))
	} else {
		b[start] = byte(len(b) - start - 1)
	}
	return b, true
}

func (p *modePage) append(u *unitConfig, st *luState, control byte, b []byte) []byte {
	if p.subpage == 0 {
		b = append(b, p.page, byte(p.size))
	} else {
		b = append(b, modeSubpage|p.page, p.subpage, byte(p.size>>8), byte(p.size))
	}
	start := len(b)
	b = append(b, make([]byte, p.size)...)
	switch d := b[start:]; {
	case control == modeDefault:
		p.body(u, &modeDefaults, d)
	case control != modeChangeable:
		p.body(u, st, d)
	case p.changeable != nil:
		p.changeable(d)
	}
	return b
}
