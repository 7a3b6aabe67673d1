package cache

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Key names the content of a block: a cryptographic hash of it.
type Key [32]byte

// FlashDevice is the device under a Flash. Requests are multiples of BlockSize, in
// memory that is aligned to a page. It is read and written at the same time.
type FlashDevice interface {
	ReadAt(p []byte, off int64) error
	WriteAt(p []byte, off int64) error
	Size() int64
	Path() string
}

// ErrFlashInUse is returned by OpenFlash for a device that holds something else.
var ErrFlashInUse = errors.New("device holds other data: it is not taken as a cache; wipe its first 4 KiB if it may be lost")

// Flash is a cache of blocks on a flash device, by their content: a log of segments
// that goes round and round over the device, and an index of it in RAM.
//
// What stands at a place is never trusted: the reader hashes what it has read, and
// takes it for the content of a key only when the hash is that key. So neither a torn
// write nor a reused place, a foreign device or rot can be served, nothing here is
// ever flushed, and how entries are named elsewhere, and whether those names are
// used again, does not matter.
//
// Lookup, Forget, Stats and Fail are safe for concurrent use and do no I/O. Warm, Add
// and Close belong to one goroutine.
type Flash struct {
	dev    FlashDevice
	failed func(error)
	broken atomic.Pointer[error]

	segments   int64
	generation uint64
	mem        []byte // staging, victim, index
	staging    []byte // the segment that is filled: its summary, then blocks
	victim     []byte // the segment that it will replace
	count      int    // blocks in staging
	next       int64  // segment to be written next
	sequence   uint64

	sets  []flashSet
	locks [256]sync.Mutex
	hits  []atomic.Uint64 // a bit per place: found since it was written

	entries, hitCount, missCount, staleCount atomic.Int64
	written, kept                            atomic.Int64
	warm                                     atomic.Bool
}

// The device:
//
//	0        header, one page
//	1 MiB    segments of 1 MiB: a summary of one page, then up to 255 blocks
//
// The header, little endian, the rest zero:
//
//	   0  magic "TWFLASH\x01"
//	   8  version u16, reserved u16, block size u32
//	  16  owner [16]      the pool; another owner's cache is started anew
//	  32  generation u64  drawn when the cache was started
//	4092  CRC32C of bytes 0..4091
//
// The summary:
//
//	   0  magic "TWFLSEG\x01"
//	   8  generation u64
//	  16  sequence u64    of the segment's writing
//	  24  count u32, reserved u32
//	  32  count x 12 bytes: the first bytes of each block's key
//	4092  CRC32C of bytes 0..4091
//
// A summary that does not parse is a segment without entries; a header that does not
// parse is a foreign device unless the page is all zeros. Part of the format, do not
// change: version 1 is the first.
const (
	flashVersion     = 1
	flashSegment     = 1 << 20
	flashBlocks      = flashSegment/BlockSize - 1
	flashSegmentsMin = 4
	flashPrefix      = 12
	flashEntriesAt   = 32
	flashSumAt       = BlockSize - 4
	flashWays        = 8
	// flashKeep bounds what of a segment is written again instead of being lost, so
	// that at least half of all that is written is new.
	flashKeep = flashBlocks / 2
)

var (
	flashMagic   = [8]byte{'T', 'W', 'F', 'L', 'A', 'S', 'H', 1}
	summaryMagic = [8]byte{'T', 'W', 'F', 'L', 'S', 'E', 'G', 1}
)

// flashSet is a cache line of the index: per entry 24 bits of the key and the number
// of the place. 0 is empty, for no place has the number 0.
type flashSet [flashWays]uint64

const (
	placeBits = 40
	placeMask = 1<<placeBits - 1
)

// FlashMemory is what a Flash on a device of so many bytes takes of RAM, with what the
// cache above remembers for it (SpillTo): 14 bytes and a bit for each block, which is
// 3.6 GiB for 1 TiB, and two segments.
func FlashMemory(deviceBytes int64) int64 {
	segments := deviceBytes/flashSegment - 1
	return flashSets(segments)*flashWays*8 + segments*flashBlocks*2 + segments*flashSegment/BlockSize/8 + 2*flashSegment
}

func flashSets(segments int64) int64 {
	// Room for half as many again: at two thirds a set of 8 is too small for 2 % of the blocks.
	return max(segments*flashBlocks*3/(flashWays*2), 1)
}

// OpenFlash opens the cache on a device for its owner, or starts it anew when it is
// another owner's or the device's first page is all zeros; on any other device it is
// ErrFlashInUse. failed is called once, on any goroutine, when the device has failed
// and the cache has turned itself off. It must not block.
func OpenFlash(dev FlashDevice, owner [16]byte, failed func(error)) (*Flash, error) {
	f := &Flash{dev: dev, failed: failed, segments: dev.Size()/flashSegment - 1}
	if f.segments < flashSegmentsMin || f.segments*flashSegment/BlockSize > placeMask {
		return nil, fmt.Errorf("flash cache on %s: %d bytes: want 5 MiB to 4 PiB", dev.Path(), dev.Size())
	}
	n := flashSets(f.segments)
	mem, err := unix.Mmap(-1, 0, int(2*flashSegment+n*flashWays*8), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("flash cache on %s: map its index: %w", dev.Path(), err)
	}
	f.mem = mem
	f.staging, f.victim = mem[:flashSegment], mem[flashSegment:2*flashSegment]
	f.sets = setsIn(mem[2*flashSegment:], int(n))
	f.hits = make([]atomic.Uint64, (f.segments*flashSegment/BlockSize+63)/64)
	if err := f.start(owner); err != nil {
		_ = unix.Munmap(mem)
		return nil, fmt.Errorf("flash cache on %s: %w", dev.Path(), err)
	}
	return f, nil
}

func (f *Flash) start(owner [16]byte) error {
	page := f.staging[:BlockSize]
	if err := f.dev.ReadAt(page, 0); err != nil {
		return err
	}
	le := binary.LittleEndian
	if [8]byte(page) == flashMagic && sum(page) == le.Uint32(page[flashSumAt:]) {
		if v := le.Uint16(page[8:]); v != flashVersion {
			return fmt.Errorf("version %d, this program knows %d", v, flashVersion)
		}
		if f.generation = le.Uint64(page[32:]); [16]byte(page[16:]) == owner && le.Uint32(page[12:]) == BlockSize {
			return nil
		}
	} else {
		for _, b := range page {
			if b != 0 {
				return ErrFlashInUse
			}
		}
	}
	clear(page)
	copy(page, flashMagic[:])
	le.PutUint16(page[8:], flashVersion)
	le.PutUint32(page[12:], BlockSize)
	copy(page[16:], owner[:])
	_, _ = rand.Read(page[32:40])
	f.generation = le.Uint64(page[32:])
	le.PutUint32(page[flashSumAt:], sum(page))
	return f.dev.WriteAt(page, 0)
}

// segmentAt is the offset of a segment on the device, placeAt of a place.
func segmentAt(segment int64) int64 { return (segment + 1) * flashSegment }
func placeAt(place uint64) int64    { return flashSegment + int64(place)*BlockSize }

// place of block i of a segment. The summary stands at the segment's first one, so no
// block has place 0.
func place(segment int64, i int) uint64 { return uint64(segment)*(flashBlocks+1) + uint64(i) + 1 }

// parseSummary gives the keys' prefixes, flashPrefix bytes each, that a summary lists.
func parseSummary(page []byte, generation uint64) (prefixes []byte, sequence uint64, ok bool) {
	le := binary.LittleEndian
	if len(page) < BlockSize || [8]byte(page) != summaryMagic || le.Uint64(page[8:]) != generation || le.Uint32(page[flashSumAt:]) != sum(page) {
		return nil, 0, false
	}
	n := le.Uint32(page[24:])
	if n > flashBlocks {
		return nil, 0, false
	}
	return page[flashEntriesAt : flashEntriesAt+int(n)*flashPrefix], le.Uint64(page[16:]), true
}

// Warm reads the summaries of all segments into the index, until stop is closed; it
// has to end before the first Add. Lookups find meanwhile what was read.
func (f *Flash) Warm(stop <-chan struct{}) {
	page := f.victim[:BlockSize]
	var newest uint64
	for i := range f.segments {
		select {
		case <-stop:
			return
		default:
		}
		if f.Failure() != nil {
			return
		}
		if err := f.dev.ReadAt(page, segmentAt(i)); err != nil {
			f.Fail(err)
			return
		}
		prefixes, sequence, ok := parseSummary(page, f.generation)
		if !ok {
			continue
		}
		for k := 0; k < len(prefixes); k += flashPrefix {
			f.insert(prefixes[k:], place(i, k/flashPrefix))
		}
		if newest <= sequence {
			newest, f.next = sequence, (i+1)%f.segments
		}
	}
	f.sequence = newest
	f.warm.Store(true)
}

func (f *Flash) set(prefix []byte) (*flashSet, *sync.Mutex, uint64) {
	n, _ := bits.Mul64(binary.LittleEndian.Uint64(prefix), uint64(len(f.sets)))
	tag := uint64(binary.LittleEndian.Uint32(prefix[8:])) << placeBits
	return &f.sets[n], &f.locks[n%uint64(len(f.locks))], tag
}

func (f *Flash) insert(prefix []byte, at uint64) {
	s, mu, tag := f.set(prefix)
	mu.Lock()
	defer mu.Unlock()
	victim, oldest := 0, uint64(0)
	total := uint64(f.segments) * (flashBlocks + 1)
	for i, e := range s {
		if e == 0 || e&^placeMask == tag {
			if e == 0 {
				f.entries.Add(1)
			}
			s[i] = tag | at
			return
		}
		// A set that is full forgets what the log reaches next, what was used last of all.
		p := e & placeMask
		age := (at + total - p) % total
		if f.hits[p/64].Load()&(1<<(p%64)) == 0 {
			age += total
		}
		if age >= oldest {
			victim, oldest = i, age
		}
	}
	s[victim] = tag | at
}

func (f *Flash) remove(prefix []byte, at uint64) {
	s, mu, tag := f.set(prefix)
	mu.Lock()
	defer mu.Unlock()
	for i, e := range s {
		if e == tag|at {
			s[i] = 0
			f.entries.Add(-1)
			return
		}
	}
}

// Lookup says where on the device the block of this key may stand. The caller reads
// BlockSize bytes there and hashes them; when the hash is another one it calls Forget.
func (f *Flash) Lookup(key *Key) (off int64, ok bool) {
	if f == nil || f.broken.Load() != nil {
		return 0, false
	}
	at := f.find(key)
	if at == 0 {
		f.missCount.Add(1)
		return 0, false
	}
	f.hitCount.Add(1)
	if w := &f.hits[at/64]; w.Load()&(1<<(at%64)) == 0 {
		w.Or(1 << (at % 64))
	}
	return placeAt(at), true
}

func (f *Flash) find(key *Key) uint64 {
	s, mu, tag := f.set(key[:])
	mu.Lock()
	defer mu.Unlock()
	for _, e := range s {
		if e != 0 && e&^placeMask == tag {
			return e & placeMask
		}
	}
	return 0
}

// Contains says whether Lookup would find the key. It does not count as a use.
func (f *Flash) Contains(key *Key) bool { return f.find(key) != 0 }

// Forget is told that what stands at a place that Lookup gave is not the block of this key.
func (f *Flash) Forget(key *Key, off int64) {
	f.hitCount.Add(-1)
	f.missCount.Add(1)
	f.staleCount.Add(1)
	f.remove(key[:], uint64((off-flashSegment)/BlockSize))
}

// Add takes a copy of a block that the cache does not hold. Once in 255 blocks it
// writes a segment, of 1 MiB. Adding the same block again costs room.
func (f *Flash) Add(key *Key, block []byte) {
	if f.Failure() != nil {
		return
	}
	copy(f.staging[flashEntriesAt+f.count*flashPrefix:], key[:flashPrefix])
	copy(f.staging[(f.count+1)*BlockSize:], block[:BlockSize])
	if f.count++; f.count == flashBlocks {
		f.seal()
	}
}

// seal writes the staged segment in place of the oldest one. Blocks of that one that
// were found since it was written are staged anew.
func (f *Flash) seal() {
	if err := f.dev.ReadAt(f.victim, segmentAt(f.next)); err != nil {
		f.Fail(err)
		return
	}
	old, _, ok := parseSummary(f.victim, f.generation)
	if !ok {
		old = nil
	}
	for k := 0; k < len(old); k += flashPrefix {
		f.remove(old[k:], place(f.next, k/flashPrefix))
	}
	le := binary.LittleEndian
	page := f.staging[:BlockSize]
	copy(page, summaryMagic[:])
	le.PutUint64(page[8:], f.generation)
	le.PutUint64(page[16:], f.sequence+1)
	le.PutUint32(page[24:], uint32(f.count))
	le.PutUint32(page[28:], 0)
	clear(page[flashEntriesAt+f.count*flashPrefix:])
	le.PutUint32(page[flashSumAt:], sum(page))
	n := (f.count + 1) * BlockSize
	if err := f.dev.WriteAt(f.staging[:n], segmentAt(f.next)); err != nil {
		f.Fail(err)
		return
	}
	f.written.Add(int64(n))
	f.sequence++
	var found [flashBlocks]bool
	for i := range flashBlocks {
		at := place(f.next, i)
		bit := uint64(1) << (at % 64)
		found[i] = f.hits[at/64].And(^bit)&bit != 0
		if i < f.count {
			f.insert(page[flashEntriesAt+i*flashPrefix:], at)
		}
	}
	f.next = (f.next + 1) % f.segments
	f.count = 0
	for i := 0; i < len(old)/flashPrefix && f.count < flashKeep; i++ {
		if found[i] {
			copy(page[flashEntriesAt+f.count*flashPrefix:], old[i*flashPrefix:][:flashPrefix])
			copy(f.staging[(f.count+1)*BlockSize:], f.victim[(i+1)*BlockSize:][:BlockSize])
			f.count++
		}
	}
	f.kept.Add(int64(f.count))
}

// Fail turns the cache off for good: its device has failed.
func (f *Flash) Fail(err error) {
	if f.broken.CompareAndSwap(nil, &err) && f.failed != nil {
		f.failed(err)
	}
}

// Failure is why the cache is off, nil while it works.
func (f *Flash) Failure() error {
	if p := f.broken.Load(); p != nil {
		return *p
	}
	return nil
}

// FlashStats are levels, and counts since OpenFlash.
type FlashStats struct {
	Hits     int64 // Lookup that found the block
	Misses   int64
	Stale    int64 // of the misses: another content stood there
	Blocks   int64 // held
	Bytes    int64 // of blocks held
	Capacity int64 // of blocks that fit
	Written  int64 // bytes
	Kept     int64 // blocks that were written again because they were used
	Memory   int64 // bytes of RAM
	Warm     bool  // the index holds what the last run left
}

// Stats counts.
func (f *Flash) Stats() FlashStats {
	return FlashStats{
		Hits: f.hitCount.Load(), Misses: f.missCount.Load(), Stale: f.staleCount.Load(),
		Blocks: f.entries.Load(), Bytes: f.entries.Load() * BlockSize, Capacity: f.segments * flashBlocks * BlockSize,
		Written: f.written.Load(), Kept: f.kept.Load(), Memory: FlashMemory((f.segments + 1) * flashSegment), Warm: f.warm.Load(),
	}
}

// Close writes what is staged, so that the next run finds it, and gives the memory
// back. No other call may be running or follow. The device stays the caller's.
func (f *Flash) Close() error {
	if f.warm.Load() && f.count > 0 && f.Failure() == nil {
		f.seal()
	}
	err := f.Failure()
	f.broken.CompareAndSwap(nil, &errFlashClosed)
	return errors.Join(err, unix.Munmap(f.mem))
}

var errFlashClosed = errors.New("flash cache is closed")
