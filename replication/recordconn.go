package replication

import (
	"encoding/binary"
	"net"
)

// Records returns what TLS has to be given instead of a socket on which a link between
// nodes is to run; see recordConn. Only its reads differ from those of conn.
func Records(conn net.Conn) net.Conn { return &recordConn{Conn: conn} }

// recordConn is what TLS reads from on a connection between nodes. It takes from the
// socket as much as there is, in one call, and gives TLS no more than the rest of one
// record, so that it always knows whether another whole record has come. A reader of
// the session gets one record, 16 KiB, from each Read: without More it could not tell
// that the next is there already, and would work in small batches. On a mirror with 32
// writes under way each commit of the replica held 4 of them.
//
// To collect the records that TLS writes one by one was tried as well, in pieces of 256 KiB: the
// copy cost what 64 calls for a MiB did.
//
// One goroutine reads, as with any TLS connection.
type recordConn struct {
	net.Conn
	buf      []byte
	at, have int // buf[at:have] has been read from the socket and not by TLS
	rest     int // bytes of the present record that TLS has not read
}

const (
	recordHeader = 5 // type, version, length u16
	// recordBuffer grows from the smaller to the larger while reads fill it: a
	// connection of raft needs little.
	recordBufferMin = 4 << 10
	recordBufferMax = 256 << 10
)

// Read implements net.Conn.
func (r *recordConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.at == r.have {
		if r.buf == nil || r.have == len(r.buf) && len(r.buf) < recordBufferMax {
			r.buf = make([]byte, max(recordBufferMin, min(4*len(r.buf), recordBufferMax)))
		}
		r.at, r.have = 0, 0
		n, err := r.Conn.Read(r.buf)
		r.have = n
		if n == 0 || err != nil {
			return 0, err
		}
	}
	if r.rest == 0 {
		if r.have-r.at < recordHeader {
			return r.header(p) // the length of the record has not come yet
		}
		r.rest = recordHeader + int(binary.BigEndian.Uint16(r.buf[r.at+3:]))
	}
	n := copy(p[:min(len(p), r.rest)], r.buf[r.at:r.have])
	r.at += n
	r.rest -= n
	return n, nil
}

// header completes a header of which only a part has come.
func (r *recordConn) header(p []byte) (int, error) {
	r.have = copy(r.buf, r.buf[r.at:r.have])
	r.at = 0
	for r.have < recordHeader {
		n, err := r.Conn.Read(r.buf[r.have:])
		r.have += n
		if r.have < recordHeader && (n == 0 || err != nil) {
			return 0, err // what has come stays for the next call
		}
	}
	return r.Read(p)
}

// More says whether a Read of the session has something to return without waiting.
func (r *recordConn) More() bool {
	left := r.buf[r.at:r.have]
	if r.rest != 0 {
		return len(left) >= r.rest
	}
	return len(left) >= recordHeader && len(left) >= recordHeader+int(binary.BigEndian.Uint16(left[3:]))
}
