package cluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// The encoding of commands, snapshots and messages between nodes. Integers are
// big endian and of fixed size, a string or a byte slice is a 32-bit length and
// the bytes, a list is a 32-bit count and the items. There are no optional
// fields and no alternative forms: a value has exactly one encoding, so equal
// states have equal bytes. Part of the raft log and snapshot format, do not
// change; a change takes a new version in the envelope that holds it.
//
// The version of the encoding is one number for commands and snapshots:
//
//	1  the first
//	2  a volume's physical block and read-only hosts, a node that is drained, the
//	   credentials of discovery
//	3  replicas that are added, removed and moved, with their operations; the mode
//	   of a node, the settings of the cluster, the preferred owner of a volume and
//	   the history of its replicas; snapshots, their schedules, a volume's origin
//	   and rollbacks
//	4  the rate of resyncs
//	5  a node's management address
//
// A walk that meets an older version leaves out what that version did not have,
// and fills in what it meant. Version 3 is written from feature level 2 on, version 4
// from level 3 on, version 5 from level 4 on (see level.go); messages between nodes follow the same rule (encodeMessage).
const codecVersion = 5

// Limits of the encoding. What exceeds them is refused by the encoder as well as
// by the decoder.
const (
	maxText  = 4 << 10  // bytes of a name, an address, an event text
	maxBlob  = 64 << 10 // bytes of a certificate, a sealed secret
	maxItems = 1 << 16  // items of a list
)

var errEncoding = errors.New("malformed encoding")

// codec walks a value once, either writing it to buf or reading it from there.
// One walk method per type serves both directions, so they cannot drift apart.
// The first failure sticks; later steps do nothing.
type codec struct {
	buf      []byte
	version  byte
	decoding bool
	err      error
}

func (c *codec) fail(what string) {
	if c.err == nil {
		c.err = fmt.Errorf("%w: %s", errEncoding, what)
	}
}

// take returns the next n bytes to read, or nil.
func (c *codec) take(n int) []byte {
	if c.err != nil {
		return nil
	}
	if len(c.buf) < n {
		c.fail("short")
		return nil
	}
	p := c.buf[:n]
	c.buf = c.buf[n:]
	return p
}

// raw walks a fixed number of bytes.
func (c *codec) raw(p []byte) {
	if !c.decoding {
		c.buf = append(c.buf, p...)
		return
	}
	if b := c.take(len(p)); b != nil {
		copy(p, b)
	}
}

func u8[T ~uint8](c *codec, v *T) {
	if !c.decoding {
		c.buf = append(c.buf, byte(*v))
	} else if b := c.take(1); b != nil {
		*v = T(b[0])
	}
}

func u16[T ~uint16](c *codec, v *T) {
	if !c.decoding {
		c.buf = binary.BigEndian.AppendUint16(c.buf, uint16(*v))
	} else if b := c.take(2); b != nil {
		*v = T(binary.BigEndian.Uint16(b))
	}
}

func u32[T ~uint32](c *codec, v *T) {
	if !c.decoding {
		c.buf = binary.BigEndian.AppendUint32(c.buf, uint32(*v))
	} else if b := c.take(4); b != nil {
		*v = T(binary.BigEndian.Uint32(b))
	}
}

func u64[T ~uint64](c *codec, v *T) {
	if !c.decoding {
		c.buf = binary.BigEndian.AppendUint64(c.buf, uint64(*v))
	} else if b := c.take(8); b != nil {
		*v = T(binary.BigEndian.Uint64(b))
	}
}

func (c *codec) flag(v *bool) {
	var b uint8
	if *v {
		b = 1
	}
	u8(c, &b)
	if b > 1 {
		c.fail("flag")
	}
	*v = b == 1
}

// time walks a point in time with nanoseconds, in UTC. The zero time is zero.
func (c *codec) time(t *time.Time) {
	var n uint64
	if !c.decoding && !t.IsZero() {
		n = uint64(t.UnixNano())
	}
	u64(c, &n)
	if c.decoding {
		*t = time.Time{}
		if n != 0 {
			*t = time.Unix(0, int64(n)).UTC()
		}
	}
}

// length walks the length of what follows. Each item takes at least one byte, so
// a decoded length never exceeds what is left to read: nothing is allocated by a
// length that the input cannot fill.
func (c *codec) length(n, limit int, what string) int {
	v := uint32(n)
	if !c.decoding && n > limit {
		c.fail(what + " too long")
		return 0
	}
	u32(c, &v)
	if c.err != nil {
		return 0
	}
	if c.decoding && (int64(v) > int64(limit) || int64(v) > int64(len(c.buf))) {
		c.fail(what + " too long")
		return 0
	}
	return int(v)
}

func text[T ~string](c *codec, v *T) {
	n := c.length(len(*v), maxText, "text")
	if c.err != nil {
		return
	}
	if !c.decoding {
		c.buf = append(c.buf, *v...)
	} else {
		*v = T(c.take(n))
	}
}

func blob[T ~[]byte](c *codec, v *T) {
	n := c.length(len(*v), maxBlob, "bytes")
	if c.err != nil {
		return
	}
	if !c.decoding {
		c.buf = append(c.buf, *v...)
		return
	}
	*v = nil
	if n > 0 {
		*v = append(T(nil), c.take(n)...)
	}
}

func list[T any](c *codec, v *[]T, item func(*codec, *T)) {
	n := c.length(len(*v), maxItems, "list")
	if c.err != nil {
		return
	}
	if c.decoding {
		*v = nil
	}
	for i := 0; i < n && c.err == nil; i++ {
		if !c.decoding {
			item(c, &(*v)[i])
			continue
		}
		var x T
		item(c, &x)
		*v = append(*v, x)
	}
}

// walker is a type with one walk for both directions.
type walker interface{ walk(*codec) }

// pointers walks a list of pointers to T.
func pointers[T any, P interface {
	*T
	walker
}](c *codec, v *[]P) {
	list(c, v, func(c *codec, p *P) {
		if c.decoding {
			*p = new(T)
		}
		(*p).walk(c)
	})
}

// encode returns the encoding of v.
func encode(v walker) ([]byte, error) { return encodeVersion(v, codecVersion) }

// encodeVersion is encode for a reader of an older version.
func encodeVersion(v walker, version byte) ([]byte, error) {
	c := codec{version: version}
	v.walk(&c)
	return c.buf, c.err
}

// decode fills v from b, which must hold nothing else.
func decode(b []byte, v walker) error { return decodeVersion(b, codecVersion, v) }

// decodeVersion is decode for what was written by an older version.
func decodeVersion(b []byte, version byte, v walker) error {
	c := codec{buf: b, version: version, decoding: true}
	v.walk(&c)
	if c.err == nil && len(c.buf) != 0 {
		c.fail("trailing bytes")
	}
	return c.err
}
