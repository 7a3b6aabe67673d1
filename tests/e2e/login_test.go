//go:build e2e

package e2e

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// rawLogin logs in without authentication, with bytes made by hand: what follows
// on the connection may then be as wrong as a test wants.
func rawLogin(portal, initiator, target string) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", portal, 5*time.Second)
	if err != nil {
		return nil, err
	}
	reply, err := login(c, initiator, target)
	if err != nil {
		c.Close()
		return nil, err
	}
	if class := reply[36]; class != 0 {
		c.Close()
		return nil, fmt.Errorf("login refused with status %02x%02x", reply[36], reply[37])
	}
	return c, nil
}

// login sends one Login Request from the operational stage to full feature phase
// and returns the header of the response (RFC 7143 11.12, 11.13).
func login(c net.Conn, initiator, target string) ([]byte, error) {
	text := strings.Join([]string{"InitiatorName=" + initiator, "TargetName=" + target, "SessionType=Normal",
		"HeaderDigest=None", "DataDigest=None", "MaxRecvDataSegmentLength=65536", ""}, "\x00")
	pdu := make([]byte, 48, 48+len(text)+3)
	pdu[0] = 0x40 | 0x03 // immediate, Login Request
	pdu[1] = 0x80 | 1<<2 | 3
	putLength(pdu, len(text))
	pdu[8] = 0x40 // ISID of type "random"
	binary.BigEndian.PutUint32(pdu[9:], uint32(time.Now().UnixNano()))
	binary.BigEndian.PutUint32(pdu[16:], 1) // task tag
	binary.BigEndian.PutUint32(pdu[24:], 1) // CmdSN
	pdu = append(pdu, text...)
	for len(pdu)%4 != 0 {
		pdu = append(pdu, 0)
	}
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, err
	}
	if _, err := c.Write(pdu); err != nil {
		return nil, err
	}
	reply := make([]byte, 48)
	if _, err := io.ReadFull(c, reply); err != nil {
		return nil, err
	}
	if reply[0]&0x3f != 0x23 {
		return nil, fmt.Errorf("answer to a login with opcode %02x", reply[0])
	}
	n := int64(reply[5])<<16 | int64(reply[6])<<8 | int64(reply[7])
	_, err := io.CopyN(io.Discard, c, (n+3)&^3)
	return reply, err
}

func putLength(pdu []byte, n int) { pdu[5], pdu[6], pdu[7] = byte(n>>16), byte(n>>8), byte(n) }
