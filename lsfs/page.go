package lsfs

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/lsfs/format"
)

// The life of a page in RAM:
//
//	clean    in a frame or not, as the directory says: may be evicted
//	dirty    changed since the last cut: stays
//	cut      changed before the cut of the running checkpoint and not written yet.
//	         Whoever changes it first saves the frame in old; the checkpoint writes that
//	staged   copied into the checkpoint's buffer, whose commit is not durable yet
//	dead     dropped since the last cut; its id is free after the next cut
const (
	pageAlive = 1 << iota
	pageDirty
	pageCut
	pageStaged
	pageDead
	pageRecount // its parents changed since the last cut, and it was not dirty then
	pageCounted // count is known: it was resident since the store was opened
)

// parentsMax is where a leaf takes no more parents from clones of ranges, which copy
// its words instead. What is left above it is for those who cannot choose: copies of
// the pages above, snapshots and clones of volumes. From parentsLast on these are
// refused before they are logged (ErrReferences); what one batch adds to a page fits
// between it and what the directory can count.
const (
	parentsMax  = format.ParentsMax / 2
	parentsLast = format.ParentsMax - 1<<21
)

type page struct {
	frame uint32 // 0: not resident
	old   uint32 // saved content for the running checkpoint, 0: none
	count uint16 // words that are not zero, or live entries; see pageCounted
	kind  format.PageKind
	flags uint8
	// parents is how many pages and tree tops lead here. A page of a map or a version
	// tree that has more than one stays as it is: whoever must change it changes a copy.
	parents uint32
}

const (
	slabFrames   = 1024
	pagesPerPart = 4096
)

type frame struct {
	page  uint32 // id of the page whose frame this is; 0: free, or an old
	guard uint64 // round of the committer that needs it resident
	ref   atomic.Bool
}

type slab struct {
	mem    []byte
	frames [slabFrames]frame
}

// pager holds pages in frames outside of the Go heap, and the page directory.
// All of it is guarded by Store.mu; pages change only under the write lock.
type pager struct {
	pages [][]page            // by id, in parts of pagesPerPart
	dir   [][]format.DirEntry // as of the running or last checkpoint; only the checkpoint writes it
	n     uint32              // ids in use or free: [1, n)
	ids   []uint32            // free ids
	dirty []uint32            // pages dirty or dead since the last cut
	moved []uint32            // clean pages whose parents changed since the last cut
	refs  *refPass            // counts references beside the operations; nil: none does

	slabs    []*slab
	free     []uint32 // free frames
	max      int      // frames
	hand     uint32
	round    uint64 // of the committer; see guard
	held     int    // frames guarded in this round; belongs to the committing role
	nDirty   atomic.Int64
	nUsed    atomic.Int64
	nAlive   atomic.Int64
	nEntries atomic.Int64  // of them, identity pages
	shared   atomic.Int64  // pages with more than one parent
	crowd    atomic.Uint32 // no page ever had more parents
}

func newPager(bytes int64) *pager {
	pg := &pager{max: max(int(bytes/format.PageSize), slabFrames), n: 1, round: 1}
	pg.grow(1)
	return pg
}

func (pg *pager) grow(n uint32) {
	for uint32(len(pg.pages))*pagesPerPart < n {
		pg.pages = append(pg.pages, make([]page, pagesPerPart))
		pg.dir = append(pg.dir, make([]format.DirEntry, pagesPerPart))
	}
}

func (pg *pager) page(id uint32) *page { return &pg.pages[id/pagesPerPart][id%pagesPerPart] }

func (pg *pager) entry(id uint32) *format.DirEntry {
	return &pg.dir[id/pagesPerPart][id%pagesPerPart]
}

// known says whether an id read from a page may be used at all.
func (pg *pager) known(id uint64) bool {
	return id != 0 && id < uint64(pg.n) && pg.page(uint32(id)).flags&pageAlive != 0
}

func (pg *pager) frameOf(f uint32) *frame { return &pg.slabs[f/slabFrames].frames[f%slabFrames] }

func (pg *pager) mem(f uint32) []byte {
	o := f % slabFrames * format.PageSize
	return pg.slabs[f/slabFrames].mem[o : o+format.PageSize : o+format.PageSize]
}

// data is the content of a resident page, nil if it is not resident.
func (pg *pager) data(id uint32) []byte {
	p := pg.page(id)
	if p.frame == 0 {
		return nil
	}
	if fr := pg.frameOf(p.frame); !fr.ref.Load() {
		fr.ref.Store(true)
	}
	return pg.mem(p.frame)
}

// hold keeps a resident page in RAM until the committer's next round.
func (pg *pager) hold(id uint32) {
	if p := pg.page(id); p.frame != 0 {
		if fr := pg.frameOf(p.frame); fr.guard != pg.round {
			fr.guard = pg.round
			pg.held++
		}
	}
}

func (pg *pager) addSlab() {
	mem, err := unix.Mmap(-1, 0, slabFrames*format.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic("lsfs: no memory for metadata frames: " + err.Error())
	}
	base := uint32(len(pg.slabs)) * slabFrames
	pg.slabs = append(pg.slabs, &slab{mem: mem})
	for f := base + slabFrames - 1; ; f-- {
		if f != 0 { // frame 0 is none
			pg.free = append(pg.free, f)
		}
		if f == base {
			return
		}
	}
}

// alloc finds a frame: a free one, a new one, or one of a clean page that was
// not used lately. It goes beyond the bound rather than fail when all it looks
// at is in use; admission before each batch keeps that rare (BOUNDED).
func (pg *pager) alloc() uint32 {
	if len(pg.free) == 0 && (len(pg.slabs)+1)*slabFrames <= pg.max {
		pg.addSlab()
	}
	total := uint32(len(pg.slabs)) * slabFrames
	for steps := 0; len(pg.free) == 0; steps++ {
		if steps == 4096 {
			pg.addSlab()
			break
		}
		pg.hand++
		if total <= pg.hand {
			pg.hand = 1
		}
		fr := pg.frameOf(pg.hand)
		if fr.page == 0 || fr.guard == pg.round {
			continue
		}
		p := pg.page(fr.page)
		if p.flags&(pageDirty|pageCut|pageStaged) != 0 || fr.ref.Swap(false) {
			continue
		}
		p.frame, fr.page = 0, 0
		pg.nUsed.Add(-1)
		return pg.hand
	}
	f := pg.free[len(pg.free)-1]
	pg.free = pg.free[:len(pg.free)-1]
	return f
}

func (pg *pager) release(f uint32) {
	fr := pg.frameOf(f)
	fr.page, fr.guard = 0, 0
	pg.free = append(pg.free, f)
}

func (pg *pager) place(id, f uint32) {
	fr := pg.frameOf(f)
	fr.page = id
	fr.ref.Store(true)
	pg.page(id).frame = f
	pg.nUsed.Add(1)
}

// create makes an empty dirty page.
func (pg *pager) create(kind format.PageKind) uint32 {
	var id uint32
	if n := len(pg.ids); n > 0 {
		id = pg.ids[n-1]
		pg.ids = pg.ids[:n-1]
	} else {
		id = pg.n
		pg.n++
		pg.grow(pg.n)
	}
	f := pg.alloc()
	clear(pg.mem(f))
	p := pg.page(id)
	p.kind, p.count, p.parents, p.flags = kind, 0, 1, pageAlive|pageDirty|pageCounted
	pg.place(id, f)
	pg.hold(id)
	pg.dirty = append(pg.dirty, id)
	pg.nDirty.Add(1)
	pg.nAlive.Add(1)
	if kind == format.EntryPage {
		pg.nEntries.Add(1)
	}
	return id
}

// touch makes a resident page dirty and returns its content for writing. The
// content of the cut, if the checkpoint has not taken it yet, is saved first.
func (pg *pager) touch(id uint32) []byte {
	p := pg.page(id)
	if p.frame == 0 {
		invariant("REFS", "page %d is changed but not resident", id)
	}
	if p.flags&pageDirty == 0 {
		if p.flags&pageCut != 0 {
			f := pg.alloc()
			copy(pg.mem(f), pg.mem(p.frame))
			p.old = f
			p.flags &^= pageCut
		}
		p.flags |= pageDirty
		pg.dirty = append(pg.dirty, id)
		pg.nDirty.Add(1)
	}
	return pg.mem(p.frame)
}

// setParents says how many lead to a page. That alone does not make it dirty: the
// next checkpoint writes it into the directory and leaves the page where it stands.
func (pg *pager) setParents(id uint32, n uint32) {
	p := pg.page(id)
	if n == 0 || format.ParentsMax < n {
		invariant("REFS", "page %d gets %d parents", id, n)
	}
	if pg.crowd.Load() < n {
		pg.crowd.Store(n)
	}
	if p.parents <= 1 && n > 1 {
		pg.shared.Add(1)
	} else if p.parents > 1 && n <= 1 {
		pg.shared.Add(-1)
	}
	p.parents = n
	if p.flags&(pageDirty|pageRecount) == 0 {
		p.flags |= pageRecount
		pg.moved = append(pg.moved, id)
	}
}

// drop ends a page. One that is clean need not be resident.
func (pg *pager) drop(id uint32) {
	p := pg.page(id)
	if p.parents != 1 {
		invariant("REFS", "page %d is dropped but has %d parents", id, p.parents)
	}
	if p.frame != 0 {
		if p.flags&pageCut != 0 {
			p.old = p.frame // the checkpoint still writes it
			pg.frameOf(p.frame).page = 0
		} else {
			pg.release(p.frame)
		}
		pg.nUsed.Add(-1)
	}
	pg.nAlive.Add(-1)
	if p.kind == format.EntryPage {
		pg.nEntries.Add(-1)
	}
	if p.flags&pageDirty == 0 {
		pg.dirty = append(pg.dirty, id)
	} else {
		pg.nDirty.Add(-1)
	}
	p.frame, p.count, p.parents, p.flags = 0, 0, 0, pageDead
}

// install puts content that was read from a device into a frame.
func (pg *pager) install(id uint32, content []byte) {
	f := pg.alloc()
	copy(pg.mem(f), content)
	p := pg.page(id)
	p.count = countPage(p.kind, content)
	p.flags |= pageCounted
	pg.place(id, f)
}

func countPage(kind format.PageKind, b []byte) (n uint16) {
	if kind == format.EntryPage {
		for i := range format.EntriesPerPage {
			if format.EntryAddr(format.EntryAt(b, i)) != 0 {
				n++
			}
		}
		return n
	}
	for i := range format.WordsPerPage {
		if format.Word(b, i) != 0 {
			n++
		}
	}
	return n
}

func (pg *pager) close() {
	for _, sl := range pg.slabs {
		_ = unix.Munmap(sl.mem)
	}
	pg.slabs = nil
}

// fault makes a page resident, reading it without the lock. With hold it stays
// until the committer's next round. A page that is gone or resident by the time
// is no error: the caller walks again.
func (s *Store) fault(id uint32, hold bool) error {
	buf := <-s.pageBufs
	defer func() { s.pageBufs <- buf }()
	for {
		s.mu.RLock()
		p := s.pg.page(id)
		if p.flags&pageAlive == 0 || p.frame != 0 {
			if hold {
				s.pg.hold(id)
			}
			s.mu.RUnlock()
			return nil
		}
		e := *s.pg.entry(id)
		if !s.segs.valid(e.Addr, format.PageSize) {
			s.mu.RUnlock()
			return s.report(s.corrupt("page", e.Addr, e.Sum, 0, format.ErrInvalid))
		}
		seg := &s.segs.all[e.Addr.Segment()]
		seg.readers.Add(1)
		s.mu.RUnlock()
		err := s.readPage(buf, e)
		damaged := err != nil
		if damaged {
			err = s.repairPage(buf, e.Addr, e.Sum, err)
		}
		seg.readers.Add(-1)
		if err != nil {
			return err
		}
		s.mu.Lock()
		if p.flags&pageAlive != 0 && p.frame == 0 {
			if s.pg.entry(id).Addr != e.Addr {
				s.mu.Unlock()
				continue
			}
			s.pg.install(id, buf)
			if damaged {
				s.pg.touch(id) // the next checkpoint writes it to another place
			}
		}
		if hold {
			s.pg.hold(id)
		}
		s.mu.Unlock()
		s.stats.pageReads.Add(1)
		return nil
	}
}

// readPage reads and checks a page. The caller keeps the segment from being reused.
func (s *Store) readPage(buf []byte, e format.DirEntry) error {
	d, off := s.segs.locate(e.Addr)
	if err := d.ReadAt(buf[:format.PageSize], off); err != nil {
		return s.report(s.corrupt("page", e.Addr, e.Sum, 0, err))
	}
	// CHECKED: no page is used before its checksum agrees with the directory.
	if sum := format.Checksum(buf[:format.PageSize]); sum != e.Sum {
		return s.report(s.corrupt("page", e.Addr, e.Sum, sum, nil))
	}
	return nil
}
