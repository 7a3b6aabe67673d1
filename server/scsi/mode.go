package scsi

import "encoding/binary"

// Page control of MODE SENSE.
const (
	modeCurrent = iota
	modeChangeable
	modeDefault
	modeSaved
)

// modePage is a mode page. Its body follows the page header; no bit of any page
// can be changed, so current and default values are equal.
type modePage struct {
	page, subpage byte
	body          func(*unitConfig, []byte) // fills size zero bytes
	size          int
}

// The pages in ascending order of page and subpage (SPC-4 and SBC-3 "Mode parameters").
var modePages = [...]modePage{
	{0x01, 0x00, func(_ *unitConfig, d []byte) { d[0] = 0xc0 }, 10}, // AWRE, ARRE
	{0x08, 0x00, func(u *unitConfig, d []byte) {
		if u.VolatileCache {
			d[0] = 0x04 // WCE
		}
	}, 18},
	{0x0a, 0x00, func(_ *unitConfig, d []byte) {
		d[0] = 0x02                            // TST=000b, D_SENSE=0, GLTSD
		d[1] = 0x10                            // unrestricted reordering, QERR=00b
		d[3] = 0x40                            // ATO=0, TAS
		binary.BigEndian.PutUint16(d[6:], 300) // BUSY TIMEOUT, 100 ms
	}, 10},
	{0x0a, 0x01, func(_ *unitConfig, d []byte) { d[0] = 0x01 }, 28}, // IALUAE
	{0x1c, 0x00, func(_ *unitConfig, d []byte) {
		d[0] = 0x08 // DEXCPT
		d[1] = 0x06 // MRIE
	}, 10},
}

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
		b = p.append(u, control, b)
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

func (p *modePage) append(u *unitConfig, control byte, b []byte) []byte {
	if p.subpage == 0 {
		b = append(b, p.page, byte(p.size))
	} else {
		b = append(b, 0x40|p.page, p.subpage, byte(p.size>>8), byte(p.size))
	}
	start := len(b)
	b = append(b, make([]byte, p.size)...)
	if control != modeChangeable {
		p.body(u, b[start:])
	}
	return b
}
