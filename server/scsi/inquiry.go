package scsi

import (
	"encoding/binary"
	"fmt"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// What INQUIRY says of every unit, padded with blanks. Hosts match path rules
// by the first two; they never change.
const (
	vendorID  = "TWINSAN "         // 8 characters
	productID = "VIRTUAL DISK    " // 16 characters
	revision  = "0001"             // 4 characters
)

// Peripheral qualifier and device type.
const (
	deviceDisk      = 0x00
	deviceWellKnown = 0x1e
	deviceNone      = 0x7f // not capable of supporting a unit here
)

// Version descriptors: SAM-5, iSCSI, SPC-4, SBC-3. SBC-3 goes with the long
// form of VPD page B0.
var versions = [...]uint16{0x00a0, 0x0960, 0x0460, 0x04c0}

// peripheral is byte 0 of every INQUIRY reply.
func (t *Task) peripheral() byte {
	switch {
	case t.state.unit != nil:
		return deviceDisk
	case t.LUN == cdb.WellKnownReportLUNs:
		return deviceWellKnown
	default:
		return deviceNone
	}
}

// inquiry is the reply of INQUIRY (SPC-4 "Standard INQUIRY data" and "Vital
// product data parameters").
func inquiry(s *Server, t *Task, b []byte) ([]byte, bool) {
	const pageField = 2
	page := t.CDB[pageField]
	if t.CDB[1]&1 != 0 {
		return s.vitalData(t, page, b)
	}
	if page != 0 {
		return t.deny(invalidField(pageField))
	}
	start := len(b)
	b = append(b, make([]byte, 96)...)
	d := b[start:]
	d[0] = t.peripheral()
	d[2] = 0x06           // VERSION: SPC-4
	d[3] = 0x12           // HISUP, response data format 2
	d[4] = 96 - 5         // ADDITIONAL LENGTH
	d[5] = 0x01<<4 | 0x08 // TPGS: implicit asymmetric access; 3PC: third-party copy
	if t.state.unit != nil && t.state.unit.Optimize != nil {
		d[5] |= 0x03 << 4 // and explicit
	}
	d[6] = 0x10 // MULTIP
	d[7] = 0x02 // CMDQUE
	copy(d[8:], vendorID)
	copy(d[16:], productID)
	copy(d[32:], revision)
	for i, v := range versions {
		binary.BigEndian.PutUint16(d[58+2*i:], v)
	}
	return b, true
}

// vitalPage is a VPD page: append adds what follows the four header bytes.
type vitalPage struct {
	code   byte
	noUnit bool // also at LUNs without a unit
	append func(*Server, *Task, []byte) []byte
}

// The pages in ascending order; page 00 is made from this list.
var vitalPages = [...]vitalPage{
	{0x00, true, nil},
	{0x80, false, serialPage},
	{0x83, false, identificationPage},
	{0x86, false, extendedPage},
	{0x87, false, policyPage},
	{0x88, false, portsPage},
	{0x8f, false, thirdPartyPage},
	{0xb0, false, limitsPage},
	{0xb1, false, characteristicsPage},
	{0xb2, false, provisioningPage},
}

func (s *Server) vitalData(t *Task, code byte, b []byte) ([]byte, bool) {
	const pageField = 2
	for i := range vitalPages {
		p := &vitalPages[i]
		if p.code != code || t.state.unit == nil && !p.noUnit {
			continue
		}
		start := len(b)
		b = append(b, t.peripheral(), code, 0, 0)
		if p.append == nil {
			for j := range vitalPages {
				if t.state.unit != nil || vitalPages[j].noUnit {
					b = append(b, vitalPages[j].code)
				}
			}
		} else {
			b = p.append(s, t, b)
		}
		binary.BigEndian.PutUint16(b[start+2:], uint16(len(b)-start-4))
		return b, true
	}
	return t.deny(invalidField(pageField))
}

func serialPage(_ *Server, t *Task, b []byte) []byte {
	return append(b, t.state.unit.Serial...)
}

// Designators (SPC-4 "Designation descriptor").
const (
	codeBinary = 1
	codeASCII  = 2
	codeUTF8   = 3

	ofUnit   = 0 << 4
	ofPort   = 1 << 4
	ofTarget = 2 << 4

	designatorT10   = 1
	designatorNAA   = 3
	designatorPort  = 4
	designatorGroup = 5
	designatorName  = 8
	designatorUUID  = 0xa

	protocolISCSI = 5 << 4
	protocolValid = 0x80
)

func appendDesignator(b []byte, code, kind byte, d []byte) []byte {
	if kind&0x30 != ofUnit {
		code |= protocolISCSI
		kind |= protocolValid
	}
	b = append(b, code, kind, 0, byte(len(d)))
	return append(b, d...)
}

// scsiName pads a SCSI name string with NULs, at least one, to a multiple of four.
func scsiName(name string) []byte {
	d := append([]byte(name), 0)
	for len(d)%4 != 0 {
		d = append(d, 0)
	}
	return d
}

// portSCSIName is the name of the target port of a group (RFC 7143 "SCSI target port name").
func (s *Server) portSCSIName(group uint16) []byte {
	return scsiName(fmt.Sprintf("%s,t,0x%04x", s.target, group))
}

// appendUnitDesignators appends the names of the unit itself.
func appendUnitDesignators(b []byte, u *unitConfig) []byte {
	b = appendDesignator(b, codeBinary, ofUnit|designatorNAA, u.NAA)
	b = appendDesignator(b, codeASCII, ofUnit|designatorT10, []byte(vendorID+productID+u.Serial))
	if len(u.NAA) == 8 {
		// A locally assigned NAA has 60 bits; the UUID is unique beyond doubt.
		b = appendDesignator(b, codeBinary, ofUnit|designatorUUID, append([]byte{0x10, 0}, u.VolumeUUID[:]...))
	}
	return b
}

func identificationPage(s *Server, t *Task, b []byte) []byte {
	b = appendUnitDesignators(b, t.state.unit)
	b = appendDesignator(b, codeBinary, ofPort|designatorPort, []byte{0, 0, byte(s.nodePort >> 8), byte(s.nodePort)})
	b = appendDesignator(b, codeBinary, ofPort|designatorGroup, []byte{0, 0, byte(s.portGroup >> 8), byte(s.portGroup)})
	b = appendDesignator(b, codeUTF8, ofPort|designatorName, s.portSCSIName(s.portGroup))
	return appendDesignator(b, codeUTF8, ofTarget|designatorName, scsiName(s.target))
}

// extendedPage is Extended INQUIRY Data.
func extendedPage(_ *Server, t *Task, b []byte) []byte {
	var d [60]byte
	d[1] = 0x07 // HEADSUP, ORDSUP, SIMPSUP
	if t.state.unit.VolatileCache {
		d[2] = 0x01 // V_SUP
	}
	d[3] = 0x01 // LUICLR
	return append(b, d[:]...)
}

// policyPage is Mode Page Policy: one descriptor for all pages, shared by all nexuses.
func policyPage(_ *Server, _ *Task, b []byte) []byte {
	return append(b, 0x3f, 0xff, 0x00, 0x00)
}

// portsPage is SCSI Ports: the ports of all nodes, the same list from each.
func portsPage(s *Server, t *Task, b []byte) []byte {
	for _, g := range s.paths(t.state.unit) {
		name := s.portSCSIName(g.ID)
		for _, port := range g.Ports {
			b = append(b, 0, 0)
			b = binary.BigEndian.AppendUint16(b, port)
			b = append(b, 0, 0, 0, 0, 0, 0) // no initiator port TransportID
			b = binary.BigEndian.AppendUint16(b, uint16(4+len(name)))
			b = appendDesignator(b, codeUTF8, ofPort|designatorName, name)
		}
	}
	return b
}

// limitsPage is Block Limits in its long form (SBC-3 "Block Limits VPD page").
// Offsets are those of the standard less the four header bytes.
func limitsPage(_ *Server, t *Task, b []byte) []byte {
	u := t.state.unit
	var d [60]byte
	put32 := func(at int, v uint64) { binary.BigEndian.PutUint32(d[at-4:], uint32(v)) }
	d[5-4] = byte(u.compareMax)
	binary.BigEndian.PutUint16(d[6-4:], uint16(grainBytes>>u.shift))
	put32(8, u.transferMax)
	put32(12, optimalBytes>>u.shift)
	put32(16, u.transferMax) // PRE-FETCH
	if u.Thin {
		put32(20, maxUnmapBlocks)
		put32(24, maxUnmapDescriptor)
		put32(28, grainBytes>>u.shift)
		put32(32, 1<<31) // UGAVALID, alignment 0
	}
	binary.BigEndian.PutUint64(d[36-4:], u.sameMax)
	put32(44, u.atomicMax) // without alignment, granularity or boundaries
	return append(b, d[:]...)
}

// characteristicsPage is Block Device Characteristics: non-rotating. After a
// SANITIZE with block erase the medium reads as zeros at once (WABEREQ=01b).
func characteristicsPage(_ *Server, t *Task, b []byte) []byte {
	var d [60]byte
	d[1] = 1
	if t.state.unit.Thin {
		d[3] = 0x40 // WABEREQ; WACEREQ=00b, for there is no cryptographic erase
	}
	return append(b, d[:]...)
}

// provisioningPage is Logical Block Provisioning.
func provisioningPage(_ *Server, t *Task, b []byte) []byte {
	var d [4]byte
	if u := t.state.unit; u.Thin {
		if u.warns() {
			d[0] = u.thresholdExponent()
		}
		d[1] = 0x80 | 0x40 | 0x20 | 0x04 // LBPU, LBPWS, LBPWS10, LBPRZ=001b
		d[2] = 0x02                      // thin provisioned
	}
	return append(b, d[:]...)
}

// requestSense is the reply of REQUEST SENSE: the unit attention that is due,
// as data.
func requestSense(_ *Server, t *Task, b []byte) ([]byte, bool) {
	var sense cdb.Sense
	switch itl := t.state.itl; {
	case itl != nil:
		if a, ok := itl.takeAttention(); ok {
			sense = itl.lu.attentionSense(a)
		} else if wipe := itl.lu.state.Load().sanitize; wipe != nil {
			sense = wipe.sense(t.state.unit)
		}
	case t.LUN != cdb.WellKnownReportLUNs:
		sense = senseLUN
	}
	var d [cdb.MaxSenseBytes]byte
	n := sense.Encode(d[:], t.CDB[1]&1 != 0)
	return append(b, d[:n]...), true
}
