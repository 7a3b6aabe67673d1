package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// Method names what a Call asks for, in the frame's Flags. Part of the wire format.
type Method uint8

const (
	// Promise asks a replica to promise Epoch (W2, M3); reply: Position.
	Promise Method = 1
	// SyncStart: the replica's content is to be made equal to the owner's from a
	// common point on; meta: common OpID. Reply: its changed chunks since.
	SyncStart Method = 2
	// SyncMirror: live operations follow from Seq+1 on; meta: the owner's epoch
	// log and ordered state. It is handled in stream order with Prepares. No data in the reply.
	SyncMirror Method = 3
	// SyncCompare: meta: SyncChunk without data. Reply: index of blocks whose content is needed.
	SyncCompare Method = 4
	// SyncApply: meta: SyncChunk with contents. Reply: digest of the chunk as it is now.
	SyncApply Method = 5
	// SyncEnd: everything is equal; the replica is consistent again. Meta: Position to take over.
	SyncEnd Method = 6
	// Digests asks for the digests of chunks; meta: first u32, count u32. Reply: count digests of 32 bytes.
	Digests Method = 7
	// Changed asks for the chunks that were ever written. Reply: data part, a u32 each.
	Changed Method = 9
	// Fetch asks for a block by fingerprint (repair); meta: fingerprint. Where the block
	// stands may be named by Volume and, in Epoch, its number plus one. Reply: Content of one block.
	Fetch Method = 8
	// StateSum asks for the ordered state that is durable at a replica. Reply: its
	// name (OpID) and the SHA-256 of its value.
	StateSum Method = 10
	// Lend asks the owner of a volume to keep a range as it is (C4), since version 3;
	// meta: Loan. Reply: OpID, the newest operation that has committed. It ends by
	// Return, with the link, or after a time.
	Lend Method = 11
	// Return ends what Lend began; meta: Loan.
	Return Method = 12
	// SyncWhole, handled in stream order with Prepares: all contents have been copied,
	// so what follows finds the volume as the owner had it. Since version 3, as all below.
	SyncWhole Method = 13
	// SnapList asks for the snapshots of the volume. Reply: data part, SnapshotLen bytes each.
	SnapList Method = 14
	// SnapDrop deletes snapshots that the owner does not have; data: ids, a u64 each.
	SnapDrop Method = 15
	// SnapForge begins a snapshot that the replica missed; meta: ForgeBody.
	SnapForge Method = 16
	// SnapCompare and SnapApply are SyncCompare and SyncApply for a snapshot that is
	// being forged: meta: its id, u64, then as theirs.
	SnapCompare Method = 17
	SnapApply   Method = 18
	// SnapSeal ends the forging of a snapshot; meta: its id, u64, and its point, OpID.
	SnapSeal Method = 19
	// SnapDigests is Digests for a snapshot: meta: its id, u64, then as theirs.
	SnapDigests Method = 20
)

// Status of a Reply, in the frame's Flags.
const (
	StatusOK     = 0 // meta as the method says
	StatusError  = 1 // meta is a text
	StatusStale  = 2 // refused: Epoch holds the promised epoch
	StatusAbsent = 3 // no such replica, volume or block here
	StatusAgain  = 4 // a block that was there has gone: repeat with all contents
)

// Greeting is the meta part of Hello and HelloAck.
type Greeting struct {
	MinVersion, Version uint16
	Node                uint32
	Incarnation         uint64
	Replicas            []Position // HelloAck only
}

// Position is where a replica stands. State, the ordered state as it is stored,
// goes along only where a position is to be taken over (SyncMirror, SyncEnd).
type Position struct {
	Volume       uint64
	Replica      [16]byte
	Promised     lsfs.Epoch
	Durable      lsfs.OpID
	SyncFrom     lsfs.OpID
	Inconsistent bool
	EpochLog     []lsfs.OpID
	State        []byte
}

// MaxEpochLog bounds the history that a Position carries: the newest entries.
const MaxEpochLog = 1024

const maxReplicas = 8192

// AppendGreeting appends g.
func AppendGreeting(dst []byte, g *Greeting) []byte {
	dst = binary.LittleEndian.AppendUint16(dst, g.MinVersion)
	dst = binary.LittleEndian.AppendUint16(dst, g.Version)
	dst = binary.LittleEndian.AppendUint32(dst, g.Node)
	dst = binary.LittleEndian.AppendUint64(dst, g.Incarnation)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(g.Replicas)))
	for i := range g.Replicas {
		dst = AppendPosition(dst, &g.Replicas[i])
	}
	return dst
}

// DecodeGreeting is the inverse of AppendGreeting.
func DecodeGreeting(b []byte) (Greeting, error) {
	r := reader{b: b}
	g := Greeting{MinVersion: r.u16(), Version: r.u16(), Node: r.u32(), Incarnation: r.u64()}
	n := r.u32()
	if n > maxReplicas {
		return g, fmt.Errorf("%w: %d replicas", ErrFrame, n)
	}
	for ; n > 0 && r.err == nil; n-- {
		g.Replicas = append(g.Replicas, r.position())
	}
	return g, r.end()
}

// AppendPosition appends p, with at most MaxEpochLog newest entries of its history.
func AppendPosition(dst []byte, p *Position) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, p.Volume)
	dst = append(dst, p.Replica[:]...)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(p.Promised))
	dst = appendOpID(dst, p.Durable)
	dst = appendOpID(dst, p.SyncFrom)
	var inconsistent byte
	if p.Inconsistent {
		inconsistent = 1
	}
	dst = append(dst, inconsistent)
	log := p.EpochLog
	if len(log) > MaxEpochLog {
		log = log[len(log)-MaxEpochLog:]
	}
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(log)))
	for _, id := range log {
		dst = appendOpID(dst, id)
	}
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(p.State)))
	return append(dst, p.State...)
}

// DecodePosition is the inverse of AppendPosition.
func DecodePosition(b []byte) (Position, error) {
	r := reader{b: b}
	p := r.position()
	return p, r.end()
}

func appendOpID(dst []byte, id lsfs.OpID) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, uint64(id.Epoch))
	return binary.LittleEndian.AppendUint64(dst, uint64(id.Seq))
}

// AppendOpID appends an operation's name.
func AppendOpID(dst []byte, id lsfs.OpID) []byte { return appendOpID(dst, id) }

// DecodeOpID is the inverse of AppendOpID.
func DecodeOpID(b []byte) (lsfs.OpID, error) {
	r := reader{b: b}
	id := r.opID()
	return id, r.end()
}

// Lease is one volume in a Beacon, or one grant in a BeaconAck.
type Lease struct {
	Volume uint64
	Epoch  lsfs.Epoch
}

// BeaconBody is the meta part of Beacon and BeaconAck. In a Beacon, Sent is the
// sender's clock, which comes back unchanged in the BeaconAck with the leases
// that are granted; Echo is the newest nonce that the sender of this frame has
// seen from the other side (L3). Room is the free room of the sender's pool in bytes.
//
// Paced says that Pace is there, at the end: from wire version 4 on.
type BeaconBody struct {
	Nonce  uint64
	Sent   int64
	Echo   uint64
	Room   uint64
	Leases []Lease
	Paced  bool
	Pace   Pace
}

// Pace is how fast the sender's devices are:
//
//	0  u32 microseconds of a write and its flush, flash   4  the same, capacity; 0: not known
//	8  u8  1: one of them is slow, and the sender ought to be spared
type Pace struct {
	Micros [2]uint32
	Slow   bool
}

// AppendBeacon appends b.
func AppendBeacon(dst []byte, b *BeaconBody) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, b.Nonce)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(b.Sent))
	dst = binary.LittleEndian.AppendUint64(dst, b.Echo)
	dst = binary.LittleEndian.AppendUint64(dst, b.Room)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(b.Leases)))
	for _, l := range b.Leases {
		dst = binary.LittleEndian.AppendUint64(dst, l.Volume)
		dst = binary.LittleEndian.AppendUint64(dst, uint64(l.Epoch))
	}
	if b.Paced {
		dst = binary.LittleEndian.AppendUint32(dst, b.Pace.Micros[0])
		dst = binary.LittleEndian.AppendUint32(dst, b.Pace.Micros[1])
		slow := byte(0)
		if b.Pace.Slow {
			slow = 1
		}
		dst = append(dst, slow)
	}
	return dst
}

// DecodeBeacon is the inverse of AppendBeacon. It reuses into's Leases.
func DecodeBeacon(b []byte, into *BeaconBody) error {
	r := reader{b: b}
	into.Nonce, into.Sent, into.Echo, into.Room = r.u64(), int64(r.u64()), r.u64(), r.u64()
	n := r.u32()
	into.Leases = into.Leases[:0]
	if n > maxReplicas {
		return fmt.Errorf("%w: %d leases", ErrFrame, n)
	}
	for ; n > 0 && r.err == nil; n-- {
		into.Leases = append(into.Leases, Lease{r.u64(), lsfs.Epoch(r.u64())})
	}
	into.Paced, into.Pace = len(r.b) > 0, Pace{}
	if into.Paced && r.err == nil {
		into.Pace.Micros = [2]uint32{r.u32(), r.u32()}
		slow := r.take(1)[0]
		if slow > 1 {
			return fmt.Errorf("%w: pace %d", ErrFrame, slow)
		}
		into.Pace.Slow = slow == 1
	}
	return r.end()
}

// SyncChunk is the meta part of SyncCompare and SyncApply: the fingerprints of a
// chunk's blocks (the zero value for a hole) and, for SyncApply, the contents
// that the replica asked for, by index.
type SyncChunk struct {
	Chunk        uint32
	Version      lsfs.Seq
	Fingerprints []dedup.Fingerprint
	Index        []uint32
	Blocks       []dedup.Block
}

// ChunkBlocks is the number of blocks in a chunk, 1 MiB.
const ChunkBlocks = 256

// AppendSyncChunk appends the meta part; AppendBlockData of c.Blocks is the data part.
func AppendSyncChunk(dst []byte, c *SyncChunk) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, c.Chunk)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(c.Version))
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(c.Fingerprints)))
	for i := range c.Fingerprints {
		dst = append(dst, c.Fingerprints[i][:]...)
	}
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(c.Index)))
	for _, i := range c.Index {
		dst = binary.LittleEndian.AppendUint32(dst, i)
	}
	return appendBlocks(dst, c.Blocks)
}

// AppendBlockData appends the stored bytes of blocks, one after the other.
func AppendBlockData(dst []byte, blocks []dedup.Block) []byte { return appendBlockData(dst, blocks) }

// DecodeSyncChunk is the inverse of AppendSyncChunk; block data aliases data.
func DecodeSyncChunk(meta, data []byte) (c SyncChunk, err error) {
	r := reader{b: meta}
	c.Chunk, c.Version = r.u32(), lsfs.Seq(r.u64())
	n := r.u32()
	if n > ChunkBlocks {
		return c, fmt.Errorf("%w: %d fingerprints in a chunk", ErrFrame, n)
	}
	fps := r.take(32 * int(n))
	if r.err != nil {
		return c, r.err
	}
	if n > 0 {
		c.Fingerprints = make([]dedup.Fingerprint, n)
	}
	for i := range c.Fingerprints {
		copy(c.Fingerprints[i][:], fps[32*i:])
	}
	index, rest, err := decodeIndex(r.b)
	if err != nil {
		return c, err
	}
	for _, i := range index {
		if int(i) >= len(c.Fingerprints) {
			return c, fmt.Errorf("%w: index %d in a chunk of %d", ErrFrame, i, len(c.Fingerprints))
		}
	}
	c.Index = index
	if len(rest) == 0 {
		if len(data) != 0 {
			return c, fmt.Errorf("%w: data without blocks", ErrFrame)
		}
		return c, nil
	}
	c.Blocks, err = decodeBlocks(make([]dedup.Block, 0, min(len(index), ChunkBlocks)), rest, data, len(index))
	return c, err
}

// ForwardBody is the meta part of Forward: a client's request. The frame's epoch
// is the reign under which the sender accepted the command (Z2). Sum is the
// CRC32C of the data part. Stamp is the newest reading of the receiver's own clock
// that the sender had from its beacons: the receiver refuses what is too old (Z3)
// without any agreement of clocks. State names the ordered state that the request
// depends on when Stated is set; for a change of the state it is the one that is
// to be replaced (C2).
type ForwardBody struct {
	Op        uint8
	FUA       bool
	Atomic    bool
	Stated    bool
	Off       uint64 // bytes
	Len       uint64 // bytes
	Sum       uint32
	Stamp     int64
	State     lsfs.OpID
	Source    uint64 // volume to clone from
	SourceOff uint64 // bytes
	Limit     uint32 // extents that the answer may have
}

const (
	forwardLen = 72

	forwardFUA    = 1
	forwardAtomic = 2
	forwardStated = 4
)

// AppendForward appends b.
func AppendForward(dst []byte, b *ForwardBody) []byte {
	var m [forwardLen]byte
	m[0] = b.Op
	for _, f := range [...]struct {
		set bool
		bit byte
	}{{b.FUA, forwardFUA}, {b.Atomic, forwardAtomic}, {b.Stated, forwardStated}} {
		if f.set {
			m[1] |= f.bit
		}
	}
	binary.LittleEndian.PutUint32(m[4:], b.Sum)
	binary.LittleEndian.PutUint64(m[8:], b.Off)
	binary.LittleEndian.PutUint64(m[16:], b.Len)
	binary.LittleEndian.PutUint64(m[24:], uint64(b.Stamp))
	binary.LittleEndian.PutUint64(m[32:], uint64(b.State.Epoch))
	binary.LittleEndian.PutUint64(m[40:], uint64(b.State.Seq))
	binary.LittleEndian.PutUint64(m[48:], b.Source)
	binary.LittleEndian.PutUint64(m[56:], b.SourceOff)
	binary.LittleEndian.PutUint32(m[64:], b.Limit)
	return append(dst, m[:]...)
}

// DecodeForward is the inverse of AppendForward.
func DecodeForward(meta []byte) (b ForwardBody, err error) {
	if len(meta) != forwardLen || meta[1] >= forwardStated*2 {
		return b, fmt.Errorf("%w: forwarded request of %d bytes", ErrFrame, len(meta))
	}
	r := reader{b: meta[8:]}
	return ForwardBody{
		Op: meta[0], FUA: meta[1]&forwardFUA != 0, Atomic: meta[1]&forwardAtomic != 0, Stated: meta[1]&forwardStated != 0,
		Sum: binary.LittleEndian.Uint32(meta[4:]), Off: r.u64(), Len: r.u64(), Stamp: int64(r.u64()),
		State: r.opID(), Source: r.u64(), SourceOff: r.u64(), Limit: r.u32(),
	}, nil
}

// ForwardResult is the meta part of ForwardReply: how a forwarded request ended.
// At is the byte offset of a miscompare or of an unreadable block, State the name
// of the ordered state for the operations on it, Sum the CRC32C of the data part.
type ForwardResult struct {
	Code  uint8
	Sum   uint32
	At    uint64
	State lsfs.OpID
}

const resultLen = 32

// AppendForwardResult appends b.
func AppendForwardResult(dst []byte, b *ForwardResult) []byte {
	var m [resultLen]byte
	m[0] = b.Code
	binary.LittleEndian.PutUint32(m[4:], b.Sum)
	binary.LittleEndian.PutUint64(m[8:], b.At)
	binary.LittleEndian.PutUint64(m[16:], uint64(b.State.Epoch))
	binary.LittleEndian.PutUint64(m[24:], uint64(b.State.Seq))
	return append(dst, m[:]...)
}

// DecodeForwardResult is the inverse of AppendForwardResult.
func DecodeForwardResult(meta []byte) (b ForwardResult, err error) {
	if len(meta) != resultLen {
		return b, fmt.Errorf("%w: answer of %d bytes", ErrFrame, len(meta))
	}
	r := reader{b: meta[4:]}
	return ForwardResult{Code: meta[0], Sum: r.u32(), At: r.u64(), State: r.opID()}, nil
}

// ExtentLen is the size of one extent in the answer to a request for extents:
// a u64 whose lowest bit says that it is mapped and whose others count its bytes.
const ExtentLen = 8

// AppendExtent appends one extent of n bytes.
func AppendExtent(dst []byte, n uint64, mapped bool) []byte {
	n <<= 1
	if mapped {
		n |= 1
	}
	return binary.LittleEndian.AppendUint64(dst, n)
}

// DecodeExtent reads the extent at the beginning of b, which is ExtentLen bytes long at least.
func DecodeExtent(b []byte) (n uint64, mapped bool) {
	n = binary.LittleEndian.Uint64(b)
	return n >> 1, n&1 != 0
}

// reader is a cursor that latches the first error.
type reader struct {
	b   []byte
	err error
}

func (r *reader) take(n int) []byte {
	if r.err != nil || len(r.b) < n {
		r.err = fmt.Errorf("%w: message cut short", ErrFrame)
		return make([]byte, n)
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) u16() uint16 { return binary.LittleEndian.Uint16(r.take(2)) }
func (r *reader) u32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }
func (r *reader) u64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }
func (r *reader) opID() lsfs.OpID {
	return lsfs.OpID{Epoch: lsfs.Epoch(r.u64()), Seq: lsfs.Seq(r.u64())}
}

func (r *reader) position() (p Position) {
	p.Volume = r.u64()
	copy(p.Replica[:], r.take(16))
	p.Promised = lsfs.Epoch(r.u64())
	p.Durable, p.SyncFrom = r.opID(), r.opID()
	p.Inconsistent = r.take(1)[0] == 1
	n := r.u32()
	if n > MaxEpochLog {
		r.err = fmt.Errorf("%w: %d epochs", ErrFrame, n)
		return p
	}
	for ; n > 0 && r.err == nil; n-- {
		p.EpochLog = append(p.EpochLog, r.opID())
	}
	if n = r.u32(); n > maxState {
		r.err = fmt.Errorf("%w: state of %d bytes", ErrFrame, n)
	} else if n > 0 && r.err == nil {
		p.State = bytes.Clone(r.take(int(n)))
	}
	return p
}

func (r *reader) end() error {
	if r.err == nil && len(r.b) != 0 {
		r.err = fmt.Errorf("%w: %d bytes left over", ErrFrame, len(r.b))
	}
	return r.err
}

// Loan is the meta part of Lend and Return: a range of blocks. ID is the
// borrower's, unique on its link.
type Loan struct {
	ID, Start uint64
	Count     uint32
}

// AppendLoan appends b.
func AppendLoan(dst []byte, b *Loan) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, b.ID)
	dst = binary.LittleEndian.AppendUint64(dst, b.Start)
	return binary.LittleEndian.AppendUint32(dst, b.Count)
}

// DecodeLoan is the inverse of AppendLoan.
func DecodeLoan(meta []byte) (b Loan, err error) {
	if len(meta) != 20 {
		return b, fmt.Errorf("%w: loan of %d bytes", ErrFrame, len(meta))
	}
	return Loan{
		ID: binary.LittleEndian.Uint64(meta), Start: binary.LittleEndian.Uint64(meta[8:]), Count: binary.LittleEndian.Uint32(meta[16:]),
	}, nil
}

// SnapshotBody is one snapshot in the answer to SnapList.
type SnapshotBody struct {
	ID     uint64
	Point  lsfs.OpID
	Blocks uint64
}

// SnapshotLen is the length of a SnapshotBody.
const SnapshotLen = 32

// AppendSnapshot appends b.
func AppendSnapshot(dst []byte, b *SnapshotBody) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, b.ID)
	dst = appendOpID(dst, b.Point)
	return binary.LittleEndian.AppendUint64(dst, b.Blocks)
}

// DecodeSnapshots reads a list of them.
func DecodeSnapshots(b []byte) ([]SnapshotBody, error) {
	if len(b)%SnapshotLen != 0 {
		return nil, fmt.Errorf("%w: list of snapshots of %d bytes", ErrFrame, len(b))
	}
	list := make([]SnapshotBody, len(b)/SnapshotLen)
	r := reader{b: b}
	for i := range list {
		list[i] = SnapshotBody{ID: r.u64(), Point: r.opID(), Blocks: r.u64()}
	}
	return list, r.end()
}

// ForgeBody is the meta part of SnapForge: a snapshot of Blocks blocks begins with
// the content of Base, a snapshot or the volume itself; 0: with none.
type ForgeBody struct{ ID, Base, Blocks uint64 }

// AppendForge appends b.
func AppendForge(dst []byte, b *ForgeBody) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, b.ID)
	dst = binary.LittleEndian.AppendUint64(dst, b.Base)
	return binary.LittleEndian.AppendUint64(dst, b.Blocks)
}

// DecodeForge is the inverse of AppendForge.
func DecodeForge(meta []byte) (ForgeBody, error) {
	r := reader{b: meta}
	b := ForgeBody{ID: r.u64(), Base: r.u64(), Blocks: r.u64()}
	return b, r.end()
}

// AppendSeal appends the meta part of SnapSeal.
func AppendSeal(dst []byte, id uint64, point lsfs.OpID) []byte {
	return appendOpID(binary.LittleEndian.AppendUint64(dst, id), point)
}

// DecodeSeal is the inverse of AppendSeal.
func DecodeSeal(meta []byte) (id uint64, point lsfs.OpID, err error) {
	r := reader{b: meta}
	id, point = r.u64(), r.opID()
	return id, point, r.end()
}
