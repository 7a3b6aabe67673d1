package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Version is the wire version this build speaks. Hello carries the range
// [MinVersion, Version]; nodes without a common version refuse each other.
//
// 2: forwarded requests carry the ordered state under which they were accepted,
// and a node that took no notice of it would let a banned command through. So
// there is no speaking with version 1.
//
// 4: beacons and their answers say how fast the sender's devices are.
const (
	MinVersion = 2
	Version    = 4
)

// Type says what a frame is. Part of the wire format, do not change.
type Type uint8

const (
	Hello        Type = 1  // dialer introduces itself
	HelloAck     Type = 2  // listener answers with its replicas' positions
	Beacon       Type = 3  // owner asks for leases (L1)
	BeaconAck    Type = 4  // leases granted, room left
	Prepare      Type = 5  // one sequenced operation (W1)
	Ack          Type = 6  // durable up to Seq (W3)
	Gap          Type = 7  // expected Seq (W3)
	Stale        Type = 8  // refused: promised Epoch (W2)
	Need         Type = 9  // contents missing for Seq
	Content      Type = 10 // the missing contents
	Call         Type = 11 // a request of the control kind: Flags holds the Method, Seq the call's id
	Reply        Type = 12 // its answer; Flags is 0 for success
	Forward      Type = 13 // a client's request for the owner; Seq is its id
	ForwardReply Type = 14 // its result
)

// HeaderLen is the size of every frame's header:
//
//	 0  u32 magic "TWN1", little-endian like all numbers here
//	 4  u8  type
//	 5  u8  flags
//	 6  u16 zero
//	 8  u32 meta length
//	12  u32 data length
//	16  u64 volume
//	24  u64 epoch
//	32  u64 seq
//	40  u32 CRC32C of the meta part
//	44  u32 CRC32C of bytes 0..43
//
// Part of the wire format, do not change; a new layout takes a new magic.
const HeaderLen = 48

const magic = 0x314e5754

// Limits of one frame. A longer one is a protocol error and ends the connection.
const (
	MaxMeta = 1 << 20
	MaxData = 9 << 20
)

// Header is a frame's header without its sums.
type Header struct {
	Type    Type
	Flags   uint8
	MetaLen uint32
	DataLen uint32
	Volume  uint64
	Epoch   uint64
	Seq     uint64
}

// ErrFrame is wrapped by every error about a frame that cannot be understood:
// the stream is lost and the connection has to be closed.
var ErrFrame = errors.New("bad frame")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Begin appends room for a header; End fills it in. Between the two the caller
// appends the meta part, then says SealMeta, then appends the data part.
func Begin(dst []byte) []byte {
	var zero [HeaderLen]byte
	return append(dst, zero[:]...)
}

// End fills in the header at offset at of dst, for a frame whose meta part is
// metaLen bytes long and whose data part is the rest of dst.
func End(dst []byte, at int, h Header, metaLen int) []byte { return EndBefore(dst, at, h, metaLen, 0) }

// EndBefore is End for a frame whose data part goes on with following bytes that are
// sent from elsewhere.
func EndBefore(dst []byte, at int, h Header, metaLen, following int) []byte {
	b := dst[at : at+HeaderLen]
	binary.LittleEndian.PutUint32(b[0:], magic)
	b[4], b[5] = byte(h.Type), h.Flags
	binary.LittleEndian.PutUint16(b[6:], 0)
	binary.LittleEndian.PutUint32(b[8:], uint32(metaLen))
	binary.LittleEndian.PutUint32(b[12:], uint32(len(dst)-at-HeaderLen-metaLen+following))
	binary.LittleEndian.PutUint64(b[16:], h.Volume)
	binary.LittleEndian.PutUint64(b[24:], h.Epoch)
	binary.LittleEndian.PutUint64(b[32:], h.Seq)
	binary.LittleEndian.PutUint32(b[40:], crc32.Checksum(dst[at+HeaderLen:at+HeaderLen+metaLen], castagnoli))
	binary.LittleEndian.PutUint32(b[44:], crc32.Checksum(b[:44], castagnoli))
	return dst
}

// AppendFrame appends a whole frame; the lengths in h are ignored.
func AppendFrame(dst []byte, h Header, meta, data []byte) []byte {
	at := len(dst)
	dst = Begin(dst)
	dst = append(dst, meta...)
	dst = append(dst, data...)
	return End(dst, at, h, len(meta))
}

// ParseHeader reads a header from the first HeaderLen bytes of b. The meta sum
// is returned to be checked with CheckMeta once the meta part is there.
func ParseHeader(b []byte) (h Header, metaSum uint32, err error) {
	if len(b) < HeaderLen {
		return h, 0, fmt.Errorf("%w: %d bytes of header", ErrFrame, len(b))
	}
	if m := binary.LittleEndian.Uint32(b); m != magic {
		return h, 0, fmt.Errorf("%w: magic %08x, want %08x (does the peer run another version?)", ErrFrame, m, uint32(magic))
	}
	if sum := crc32.Checksum(b[:44], castagnoli); sum != binary.LittleEndian.Uint32(b[44:]) {
		return h, 0, fmt.Errorf("%w: header checksum", ErrFrame)
	}
	h = Header{
		Type: Type(b[4]), Flags: b[5],
		MetaLen: binary.LittleEndian.Uint32(b[8:]),
		DataLen: binary.LittleEndian.Uint32(b[12:]),
		Volume:  binary.LittleEndian.Uint64(b[16:]),
		Epoch:   binary.LittleEndian.Uint64(b[24:]),
		Seq:     binary.LittleEndian.Uint64(b[32:]),
	}
	if h.Type < Hello || h.Type > ForwardReply {
		return h, 0, fmt.Errorf("%w: unknown type %d", ErrFrame, h.Type)
	}
	if h.MetaLen > MaxMeta || h.DataLen > MaxData {
		return h, 0, fmt.Errorf("%w: %d bytes of meta and %d of data are over the limits %d and %d", ErrFrame, h.MetaLen, h.DataLen, MaxMeta, MaxData)
	}
	return h, binary.LittleEndian.Uint32(b[40:]), nil
}

// CheckMeta verifies the meta part against the sum from its header.
func CheckMeta(meta []byte, sum uint32) error {
	if crc32.Checksum(meta, castagnoli) != sum {
		return fmt.Errorf("%w: meta checksum", ErrFrame)
	}
	return nil
}
