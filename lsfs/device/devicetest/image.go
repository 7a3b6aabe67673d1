package devicetest

import (
	"math/rand/v2"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/lsfs/device"
)

// Image is a disk as flat memory, made for trying very many crashes: what is done
// to it after Mark is undone by Rollback at the price of the pages that changed, and
// a Tape can keep what reaches it, so that a crash explorer lays any part of the
// unsynced writes on the image of the last flush. Where [Disk] is told what goes
// wrong, an Image is told what has arrived.
//
// Everything that was written is there at once: an Image itself loses nothing. All
// methods of device.Device are safe for concurrent use; the others are not.
type Image struct {
	path string
	mu   sync.RWMutex
	data []byte

	// Undo, from Mark to Rollback: the pages that changed, as they were.
	marked bool
	round  uint32
	stamp  []uint32 // of each page: the round in which it was saved
	saved  []int64  // offsets of saved pages
	copies []*page  // of the same index in saved, and spare ones behind
	tape   *Tape
	unit   int // number of this image on the tape

	failKind Kind // set before the store is opened
	failIn   int  // operations of that kind until one fails; 0: none does
	failed   bool
}

// NewImage makes an image of size bytes, a multiple of device.Align, that reads as zeros.
func NewImage(path string, size int64) *Image {
	if size <= 0 || size%device.Align != 0 {
		panic("devicetest: size of an image must be a multiple of 4096")
	}
	return &Image{path: path, data: make([]byte, size), stamp: make([]uint32, size/device.Align)}
}

var _ device.Device = (*Image)(nil)

func (m *Image) Size() int64  { return int64(len(m.data)) }
func (m *Image) Path() string { return m.path }

// Direct is true: the image demands aligned memory, as direct I/O does.
func (m *Image) Direct() bool { return true }

func (m *Image) ReadAt(p []byte, off int64) error {
	if err := device.CheckRange(p, off, m.Size()); err != nil {
		return &device.Error{Op: "read", Path: m.path, Off: off, Len: int64(len(p)), Err: err}
	}
	if m.failKind == Read && m.countRead() {
		return &device.Error{Op: "read", Path: m.path, Off: off, Len: int64(len(p)), Err: unix.EIO}
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	copy(p, m.data[off:])
	return nil
}

func (m *Image) countRead() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fails(Read)
}

// FailNth makes the n-th operation of a kind from now (1 is the next) fail with
// unix.EIO: a write arrives in part, a flush secures nothing. 0 takes that back.
func (m *Image) FailNth(k Kind, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failKind, m.failIn, m.failed = k, n, false
}

// Failed says whether the operation that FailNth named was met.
func (m *Image) Failed() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.failed
}

// fails counts an operation. The caller has the lock.
func (m *Image) fails(k Kind) bool {
	if m.failIn == 0 || m.failKind != k {
		return false
	}
	if m.failIn--; m.failIn > 0 {
		return false
	}
	m.failed = true
	return true
}

func (m *Image) WriteAt(p []byte, off int64) error {
	if err := device.CheckRange(p, off, m.Size()); err != nil {
		return &device.Error{Op: "write", Path: m.path, Off: off, Len: int64(len(p)), Err: err}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	if m.fails(Write) {
		p, err = p[:len(p)/2], &device.Error{Op: "write", Path: m.path, Off: off, Len: int64(len(p)), Err: unix.EIO}
	}
	m.put(off, p)
	if m.tape != nil {
		m.tape.add(Event{Kind: Write, Unit: m.unit, Off: off, Data: slices.Clone(p)})
	}
	return err
}

// Flush secures nothing, for nothing is lost; a tape keeps where it stood.
func (m *Image) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fails(Flush) {
		return &device.Error{Op: "flush", Path: m.path, Err: unix.EIO}
	}
	if m.tape != nil {
		m.tape.add(Event{Kind: Flush, Unit: m.unit})
	}
	return nil
}

// Discard leaves the contents.
func (m *Image) Discard(off, n int64) error {
	if err := device.CheckDiscard(off, n, m.Size()); err != nil {
		return &device.Error{Op: "discard", Path: m.path, Off: off, Len: n, Err: err}
	}
	return nil
}

// Holes makes a store that writes zeros ahead of its log into the holes of a sparse
// file meet that: the range is filled with zeros, unsynced, in the moment of asking.
func (m *Image) Holes(off, n int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	zeros := make([]byte, n)
	m.put(off, zeros)
	if m.tape != nil {
		m.tape.add(Event{Kind: Write, Unit: m.unit, Off: off, Data: zeros})
	}
	return false
}

// Close does nothing: the image can be opened again at once.
func (m *Image) Close() error { return nil }

func (m *Image) put(off int64, p []byte) {
	if m.marked {
		for at := off &^ (device.Align - 1); at < off+int64(len(p)); at += device.Align {
			m.save(at)
		}
	}
	copy(m.data[off:], p)
}

func (m *Image) save(at int64) {
	if m.stamp[at/device.Align] == m.round {
		return
	}
	m.stamp[at/device.Align] = m.round
	n := len(m.saved)
	if n == len(m.copies) {
		m.copies = append(m.copies, new(page))
	}
	copy(m.copies[n][:], m.data[at:])
	m.saved = append(m.saved, at)
}

// Mark begins what Rollback undoes.
func (m *Image) Mark() {
	m.marked = true
	m.round++
	m.saved = m.saved[:0]
}

// Rollback undoes everything since Mark.
func (m *Image) Rollback() {
	for i, at := range m.saved {
		copy(m.data[at:at+device.Align], m.copies[i][:])
	}
	m.saved, m.marked = m.saved[:0], false
}

// Put lays bytes on the image; off and length need not be aligned. No tape sees it.
func (m *Image) Put(off int64, p []byte) { m.put(off, p) }

// Bytes is the content itself. Whoever changes it does so behind Mark's back.
func (m *Image) Bytes() []byte { return m.data }

// FlipBit changes one bit: bit counts from off.
func (m *Image) FlipBit(off, bit int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at := off + bit/8
	m.put(at, []byte{m.data[at] ^ 1<<(bit%8)})
}

// Tape keeps, in order, the writes and flushes of the images of one pool.
type Tape struct {
	mu     sync.Mutex
	Events []Event
	// Stamp is copied into each event: what the test knew when it happened.
	Stamp [2]int
}

// Event is a write or a flush on a tape.
type Event struct {
	Kind  Kind // Write or Flush
	Unit  int  // which image
	Off   int64
	Data  []byte
	Stamp [2]int
}

func (t *Tape) add(e Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e.Stamp = t.Stamp
	t.Events = append(t.Events, e)
}

// Record has the image keep what reaches it on t as image number unit; nil ends that.
func (m *Image) Record(t *Tape, unit int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tape, m.unit = t, unit
}

// Loss is what becomes of unsynced writes in a power cut.
type Loss uint8

const (
	LoseAll  Loss = iota // none of them arrives
	KeepAll              // all of them do
	Keep25               // each sector by itself, with this probability in percent
	Keep50               //
	Keep75               //
	Prefix               // in order: everything up to some sector, nothing behind
	OneLost              // everything but one sector
	OneWrong             // everything, but one sector has become garbage
	OneWrite             // whole writes only, each by itself: reordering without tearing
	Losses               // the number of kinds
)

func (l Loss) String() string {
	return [...]string{"none kept", "all kept", "25 % kept", "50 % kept", "75 % kept", "prefix kept", "one sector lost", "one sector garbage", "whole writes kept", "?"}[min(l, Losses)]
}

// Cut lays what survives of the unsynced writes on the images. It says whether the
// outcome is another than that of LoseAll and KeepAll, and a hash of which sectors
// arrived, by which equal outcomes of one moment are told.
func (l Loss) Cut(images []*Image, unsynced []Event, rng *rand.Rand) (outcome uint64) {
	sectors := 0
	for i := range unsynced {
		sectors += len(unsynced[i].Data) / Sector
	}
	chosen := 0
	if sectors > 0 {
		chosen = rng.IntN(sectors)
	}
	var garbage [Sector]byte
	outcome = 14695981039346656037
	n := 0
	for i := range unsynced {
		e := &unsynced[i]
		whole := rng.IntN(2) == 0
		for at := 0; at < len(e.Data); at += Sector {
			kept := false
			switch l {
			case KeepAll, OneWrong:
				kept = true
			case Keep25, Keep50, Keep75:
				kept = rng.IntN(4) < int(l-Keep25)+1
			case Prefix:
				kept = n < chosen
			case OneLost:
				kept = n != chosen
			case OneWrite:
				kept = whole
			}
			mark := uint64(n) << 2
			if kept {
				mark |= 1
				data := e.Data[at : at+Sector]
				if l == OneWrong && n == chosen {
					for k := range garbage {
						garbage[k] = byte(rng.Uint32())
					}
					data = garbage[:]
					mark |= 2
				}
				images[e.Unit].put(e.Off+int64(at), data)
			}
			outcome = (outcome ^ mark) * 1099511628211
			n++
		}
	}
	return outcome
}
