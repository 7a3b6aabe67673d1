package scsi

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strings"
)

// A TransportID of an iSCSI initiator (SPC-4 "TransportID for initiator ports
// using SCSI over iSCSI"):
//
//	0  FORMAT CODE in bits 7-6, PROTOCOL IDENTIFIER 5h in bits 3-0
//	1  reserved
//	2  ADDITIONAL LENGTH, a multiple of four, at least 20
//	4  the name in UTF-8, ended by a NUL and padded with NULs
//
// Format 00b names a device: "iqn...". Format 01b names a port: "iqn...,i,0x" and
// the ISID in hexadecimal.
const (
	transportHeaderBytes = 4
	transportNameMin     = 20
	transportISCSI       = 0x05
	transportPort        = 0x40
	isidSeparator        = ",i,0x"
	iscsiNameMax         = 223
)

// transportID is a decoded TransportID: a port, or a device when the ISID is not given.
type transportID struct {
	portName
	device bool
}

// cutTransportID reads a TransportID from the beginning of b and returns what
// follows it. It is not ok for other protocols, formats and bad names.
func cutTransportID(b []byte) (id transportID, rest []byte, ok bool) {
	if len(b) < transportHeaderBytes || b[0]&^transportPort != transportISCSI {
		return id, nil, false
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	if n < transportNameMin || n%4 != 0 || len(b)-transportHeaderBytes < n {
		return id, nil, false
	}
	text, rest := b[transportHeaderBytes:transportHeaderBytes+n], b[transportHeaderBytes+n:]
	end := bytes.IndexByte(text, 0)
	if end < 0 || len(bytes.TrimRight(text[end:], "\x00")) != 0 {
		return id, nil, false
	}
	name := string(text[:end])
	if b[0]&transportPort == 0 {
		id.device = true
	} else {
		var isid string
		if name, isid, ok = strings.Cut(name, isidSeparator); !ok || !id.setISID(isid) {
			return id, nil, false
		}
	}
	if name == "" || len(name) > iscsiNameMax || strings.Contains(name, ",") {
		return id, nil, false
	}
	id.initiator = strings.ToLower(name) // as the names of sessions are
	return id, rest, len(id.initiator) <= iscsiNameMax
}

// setISID reads 1 to 12 hexadecimal digits: some hosts leave leading zeros out.
func (id *transportID) setISID(digits string) bool {
	if len(digits) < 1 || len(digits) > 12 {
		return false
	}
	d, err := hex.DecodeString(strings.Repeat("0", 12-len(digits)) + digits)
	copy(id.isid[:], d)
	return err == nil
}

// appendTransportID appends the TransportID of a port.
func appendTransportID(b []byte, p portName) []byte {
	start := len(b)
	b = append(b, transportPort|transportISCSI, 0, 0, 0)
	b = append(b, p.initiator...)
	b = append(b, isidSeparator...)
	b = hex.AppendEncode(b, p.isid[:])
	b = append(b, 0)
	for n := len(b) - start - transportHeaderBytes; n < transportNameMin || n%4 != 0; n++ {
		b = append(b, 0)
	}
	binary.BigEndian.PutUint16(b[start+2:], uint16(len(b)-start-transportHeaderBytes))
	return b
}
