package scsi

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"slices"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// Space is the room of a thin provisioned unit, in bytes.
type Space struct {
	Total  uint64 // of the smallest pool that holds the unit
	Free   uint64 // of that pool, to be written to
	Used   uint64 // mapped in this unit
	Shared uint64 // of those, without room of their own: stored once for several
}

// maxThresholds bounds the thresholds of a unit, so that all mode pages together
// fit into the reply of MODE SENSE(6).
const maxThresholds = 8

// Threshold counts are in sets of 1 MiB: 2^(THRESHOLD EXPONENT) logical blocks.
const thresholdSetShift = 20

// thresholdExponent is THRESHOLD EXPONENT of VPD page B2.
func (u *unitConfig) thresholdExponent() byte { return thresholdSetShift - u.shift }

// counts says whether the unit tells its room.
func (u *unitConfig) counts() bool { return u.Thin && u.Space != nil }

// warns says whether the unit tells initiators when room gets short.
func (u *unitConfig) warns() bool { return u.counts() && len(u.Thresholds) > 0 }

func thresholdSets(n uint64) uint32 { return uint32(min(n>>thresholdSetShift, math.MaxUint32)) }

// thresholdSetting is a threshold as MODE SELECT has set it: part of the ordered state.
type thresholdSetting struct {
	enabled bool
	count   uint32 // sets that are available
}

// Section 6 of the state: for each threshold u8 enabled and u32 count,
// big-endian. Part of the wire and disk formats, do not change.
const thresholdSettingBytes = 5

func (st *luState) putThresholds(b []byte) []byte {
	for _, t := range st.thresholds {
		var enabled byte
		if t.enabled {
			enabled = 1
		}
		b = binary.BigEndian.AppendUint32(append(b, enabled), t.count)
	}
	return b
}

func (st *luState) getThresholds(b []byte) error {
	if len(b)%thresholdSettingBytes != 0 || len(b) > thresholdSettingBytes*maxThresholds {
		return fmt.Errorf("%w: thresholds", errState)
	}
	for ; len(b) > 0; b = b[thresholdSettingBytes:] {
		if b[0] > 1 {
			return fmt.Errorf("%w: thresholds", errState)
		}
		st.thresholds = append(st.thresholds, thresholdSetting{b[0] == 1, binary.BigEndian.Uint32(b[1:])})
	}
	return nil
}

// thresholdsOf returns the thresholds in force: those that MODE SELECT has set,
// else those of the configuration for a pool of this size. What was set for
// another number of thresholds is void.
func (st *luState) thresholdsOf(u *unitConfig, total uint64) []thresholdSetting {
	if st != nil && len(st.thresholds) == len(u.Thresholds) {
		return st.thresholds
	}
	all := make([]thresholdSetting, len(u.Thresholds))
	for i, percent := range u.Thresholds {
		hi, lo := bits.Mul64(total, uint64(100-percent))
		left, _ := bits.Div64(hi, lo, 100)
		all[i] = thresholdSetting{true, thresholdSets(left)}
	}
	return all
}

// The mode page Logical Block Provisioning (SBC-3): SITUA=0, for every nexus is
// told, and a descriptor for each threshold:
//
//	0  u8   bit 7 ENABLED, bits 5-3 THRESHOLD TYPE (0: soft), bits 2-0 ARMING (0: decreasing)
//	1  u8   THRESHOLD RESOURCE (1: available)
//	4  u32  THRESHOLD COUNT
const (
	thresholdPage            = 0x1c
	thresholdSubpage         = 0x02
	thresholdPageHeader      = 16
	thresholdDescriptorBytes = 8

	thresholdEnabled  = 0x80
	thresholdResource = 0x01
)

// appendThresholdPage adds the mode page to a reply of MODE SENSE. ENABLED and
// THRESHOLD COUNT can be changed.
func appendThresholdPage(u *unitConfig, st *luState, control byte, b []byte) []byte {
	size := thresholdPageHeader - 4 + thresholdDescriptorBytes*len(u.Thresholds)
	b = append(b, 0x40|thresholdPage, thresholdSubpage, byte(size>>8), byte(size))
	b = append(b, make([]byte, thresholdPageHeader-4)...)
	if control == modeDefault {
		st = nil
	}
	for _, t := range st.thresholdsOf(u, u.Space().Total) {
		var d [thresholdDescriptorBytes]byte
		switch {
		case control == modeChangeable:
			d[0] = thresholdEnabled
			binary.BigEndian.PutUint32(d[4:], math.MaxUint32)
		default:
			if t.enabled {
				d[0] = thresholdEnabled
			}
			d[1] = thresholdResource
			binary.BigEndian.PutUint32(d[4:], t.count)
		}
		b = append(b, d[:]...)
	}
	return b
}

// selectThresholds returns the state after a MODE SELECT of the page, given from
// its first byte. The error is a refusal with a pointer into the page.
func (st *luState) selectThresholds(u *unitConfig, page []byte) (*luState, error) {
	if !u.warns() {
		return nil, &refusal{invalidParameter(0)}
	}
	want := appendThresholdPage(u, st, modeCurrent, nil)
	mask := appendThresholdPage(u, st, modeChangeable, nil)
	if len(page) != len(want) {
		return nil, &refusal{invalidParameter(2)}
	}
	for i := range page {
		fixed := byte(0xff)
		if i >= thresholdPageHeader {
			fixed = ^mask[i]
		}
		if (page[i]^want[i])&fixed != 0 {
			return nil, &refusal{invalidParameter(uint16(i))}
		}
	}
	next := *st
	next.thresholds = make([]thresholdSetting, 0, len(u.Thresholds))
	for d := page[thresholdPageHeader:]; len(d) > 0; d = d[thresholdDescriptorBytes:] {
		next.thresholds = append(next.thresholds, thresholdSetting{d[0]&thresholdEnabled != 0, binary.BigEndian.Uint32(d[4:])})
	}
	return &next, nil
}

// modeThresholds takes the page from its place in the parameter list of a MODE
// SELECT. bytes is 0 when another page is there, next is st when nothing changes.
func (st *luState) modeThresholds(u *unitConfig, list []byte, at int) (next *luState, bytes int, err error) {
	page := list[at:]
	if !u.warns() || len(page) < 2 || page[0] != 0x40|thresholdPage || page[1] != thresholdSubpage {
		return st, 0, nil
	}
	now := appendThresholdPage(u, st, modeCurrent, nil)
	switch {
	case len(page) >= 4 && (page[2] != now[2] || page[3] != now[3]):
		return nil, 0, &refusal{invalidParameter(uint16(at + 2))}
	case len(page) < len(now):
		return nil, 0, &refusal{senseListLen}
	case slices.Equal(page[:len(now)], now):
		return st, len(now), nil
	}
	next, err = st.selectThresholds(u, page[:len(now)])
	if r, ok := err.(*refusal); ok {
		r.sense.Field += uint16(at)
	}
	return next, len(now), err
}

// SpaceChanged looks at the room of a unit and warns every nexus of it when a
// threshold is crossed: once, until the room has grown by a hundredth of the pool
// above the threshold. The node calls it about once a second. It does not block.
func (s *Server) SpaceChanged(lun uint16) {
	lu := s.unit(lun)
	if lu == nil {
		return
	}
	u := lu.config.Load()
	if !u.warns() {
		return
	}
	space := u.Space()
	crossed := false
	lu.mu.Lock()
	for i, t := range lu.state.Load().thresholdsOf(u, space.Total) {
		bit := uint16(1) << i
		limit := uint64(t.count) << thresholdSetShift
		switch {
		case !t.enabled, lu.crossed&bit != 0 && space.Free > limit+space.Total/100:
			lu.crossed &^= bit
		case lu.crossed&bit == 0 && space.Free <= limit:
			lu.crossed |= bit
			crossed = true
		}
	}
	lu.mu.Unlock()
	if crossed {
		lu.raise(attentionSpace)
	}
}

// short says whether room is below a threshold.
func (lu *logicalUnit) short() bool {
	lu.mu.Lock()
	defer lu.mu.Unlock()
	return lu.crossed != 0
}

// attentionSense is the sense of a unit attention. THIN PROVISIONING SOFT
// THRESHOLD REACHED points to the descriptor of the lowest threshold that was
// crossed, in bytes of its mode page (SBC-3 "Threshold notification").
func (lu *logicalUnit) attentionSense(a attention) cdb.Sense {
	sense := a.sense()
	if a != attentionSpace {
		return sense
	}
	lu.mu.Lock()
	crossed := lu.crossed
	lu.mu.Unlock()
	if crossed != 0 {
		last := 15 - bits.LeadingZeros16(crossed)
		sense.Info, sense.HasInfo = uint64(thresholdPageHeader+thresholdDescriptorBytes*last), true
	}
	return sense
}
