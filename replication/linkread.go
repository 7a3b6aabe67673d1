package replication

import (
	"io"
	"net"
	"sync"

	"github.com/twinsan/twinsan/replication/wire"
)

const readBuffer = 1 << 20

// Links come and go many times a second while a peer flaps; their buffers stay.
var readBuffers = sync.Pool{New: func() any { return new([readBuffer]byte) }}

// linkReader takes frames out of a link's bytes. What it reads lies in buf[at:have];
// the data part of a long call is read to where it stays, a body.
type linkReader struct {
	link     *link
	buf      []byte
	at, have int
	body     *body // of the call whose header and meta part are buf[at:have]
	got      int   // bytes of body
}

// read takes frames until the connection ends: handle gets each with bytes that
// are valid until it returns, batch is called when no whole frame is left in the buffer
// and no more is there to be read, or a megabyte later. The data part of a long call
// may be kept: see takeBody.
//
// A peer that dialled us sends a beacon every fifth of a second. What comes after a
// long silence was on its way for as long, or in the buffers of a process that stood
// still, and may be a command that its initiator has given up and repeated through
// another node: the link ends before any of it is looked at (Z1).
func (l *link) read(handle func(h wire.Header, meta, data []byte) error, batch func()) error {
	first := readBuffers.Get().(*[readBuffer]byte)
	defer readBuffers.Put(first) // handle is not under way, and nothing else looks into it
	r := &linkReader{link: l, buf: first[:]}
	unbatched := 0
	for {
		for {
			more, err := r.frame(handle)
			if err != nil {
				return err
			}
			if !more {
				break
			}
		}
		if unbatched >= readBuffer || !l.more() {
			batch()
			unbatched = 0
		}
		r.tidy()
		asked := l.node.now()
		m, err := r.fill()
		unbatched += m
		if !l.dialled && !mutant("Z1-late") && l.node.now() > asked.After(l.node.timing.Late) {
			return errLate
		}
		if m == 0 {
			if err == nil {
				err = io.ErrNoProgress
			}
			return err
		}
	}
}

// frame handles the next frame if all of it is there.
func (r *linkReader) frame(handle func(h wire.Header, meta, data []byte) error) (more bool, err error) {
	l := r.link
	rest := r.buf[r.at:r.have]
	if len(rest) < wire.HeaderLen {
		return false, nil
	}
	h, sum, err := wire.ParseHeader(rest)
	if err != nil {
		return false, err
	}
	head := wire.HeaderLen + int(h.MetaLen)
	size := head + int(h.DataLen)
	var data []byte
	switch {
	case r.body != nil:
		if r.got < len(r.body.data) {
			return false, nil
		}
		size, data = head, r.body.data
	case len(rest) >= size:
		data = rest[head:size]
	case h.Type == wire.Call && bodyMin <= h.DataLen && h.DataLen <= bodyMax:
		if len(rest) < head {
			r.need(head)
			return false, nil
		}
		r.body = newBody(int(h.DataLen))
		r.got = copy(r.body.data, rest[head:])
		r.have = r.at + head
		return false, nil
	default:
		r.need(size)
		return false, nil
	}
	meta := rest[wire.HeaderLen:head]
	if err := wire.CheckMeta(meta, sum); err != nil {
		return false, err
	}
	select {
	case <-l.closed: // what is still in the buffer came from a life that is over (Z1)
		if !mutant("Z1-link") {
			return false, net.ErrClosed
		}
	default:
	}
	l.body, r.body = r.body, nil
	err = handle(h, meta, data)
	if b := l.takeBody(); b != nil {
		b.free()
	}
	r.at += size
	return err == nil, err
}

// need makes room for a frame, or the part of it, that is size bytes long.
func (r *linkReader) need(size int) {
	if size > len(r.buf) {
		bigger := make([]byte, size+readBuffer)
		r.have = copy(bigger, r.buf[r.at:r.have])
		r.buf, r.at = bigger, 0
	}
}

// tidy makes room at the end of the buffer.
func (r *linkReader) tidy() {
	if r.at == r.have {
		r.at, r.have = 0, 0
		if len(r.buf) > 4*readBuffer {
			r.buf = make([]byte, readBuffer)
		}
	} else if r.at > 0 && len(r.buf)-r.have < len(r.buf)/4 {
		r.have = copy(r.buf, r.buf[r.at:r.have])
		r.at = 0
	}
}

// fill reads once, to where the next bytes belong.
func (r *linkReader) fill() (int, error) {
	if r.body != nil {
		m, err := r.link.conn.Read(r.body.data[r.got:])
		r.got += m
		return m, err
	}
	m, err := r.link.conn.Read(r.buf[r.have:])
	r.have += m
	return m, err
}
