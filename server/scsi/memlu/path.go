package memlu

import (
	"bytes"
	"slices"
	"sync"

	"github.com/twinsan/twinsan/server/scsi"
)

// Path is another node's way to an LU: the same blocks and the same ordered
// state, with a watcher of its own. It implements scsi.Volume and scsi.Backend, so
// that two device servers share a volume as two nodes do. Requests held on a path
// are those that the owner has not seen yet.
type Path struct {
	lu    *LU
	watch func(scsi.StateID, []byte, bool) // under lu.mu

	mu   sync.Mutex
	held bool
	only []scsi.RequestOp // what is held; none: all
	kept []queued
}

// Path returns a new way to the volume.
func (lu *LU) Path() *Path {
	p := &Path{lu: lu}
	lu.mu.Lock()
	defer lu.mu.Unlock()
	lu.paths = append(lu.paths, p)
	return p
}

// ID implements scsi.Volume.
func (p *Path) ID() scsi.VolumeID { return p.lu.ID() }

// SizeBytes implements scsi.Volume.
func (p *Path) SizeBytes() uint64 { return p.lu.SizeBytes() }

// TryRead implements scsi.Volume: only the owner may answer without asking.
func (p *Path) TryRead(uint64, []byte) bool { return false }

// Kick implements scsi.Backend.
func (p *Path) Kick() { p.lu.Kick() }

// Watch implements scsi.Volume.
func (p *Path) Watch(f func(id scsi.StateID, value []byte, live bool)) {
	p.lu.mu.Lock()
	p.watch = f
	id, value := p.lu.stated, p.lu.state
	p.lu.mu.Unlock()
	if f != nil {
		f(id, value, false)
	}
}

// Hold keeps this path's requests, or those of some kinds, from the volume until Release.
func (p *Path) Hold(only ...scsi.RequestOp) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held, p.only = true, only
}

// Release submits what was held, or what was held of some kinds, on this
// goroutine, and holds no more of it.
func (p *Path) Release(only ...scsi.RequestOp) {
	p.mu.Lock()
	var freed, kept []queued
	for _, q := range p.kept {
		if len(only) == 0 || slices.Contains(only, q.r.Op) {
			freed = append(freed, q)
		} else {
			kept = append(kept, q)
		}
	}
	p.kept = kept
	p.only = slices.DeleteFunc(p.only, func(op scsi.RequestOp) bool { return slices.Contains(only, op) })
	p.held = p.held && len(only) > 0 && len(p.only) > 0
	p.mu.Unlock()
	for _, q := range freed {
		p.lu.submit(q, false)
	}
}

// Held is the number of requests that wait for Release.
func (p *Path) Held() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.kept)
}

// Submit implements scsi.Volume.
func (p *Path) Submit(r *scsi.Request) {
	p.lu.validate(r)
	q := queued{r: r, data: r.Data}
	p.mu.Lock()
	if p.held && (len(p.only) == 0 || slices.Contains(p.only, r.Op)) {
		if r.Borrowed {
			q.data = bytes.Clone(r.Data)
		}
		p.kept = append(p.kept, q)
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	p.lu.submit(q, r.Borrowed)
}
