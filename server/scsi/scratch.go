package scsi

import (
	"sync"
	"sync/atomic"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

const (
	// pieceBytes is how much a command that reads in pieces reads at once: large
	// enough to amortise a hop through the sequencer, small enough for maxScratch.
	pieceBytes = 256 << 10
	// maxScratch bounds the commands that read in pieces, and so their memory
	// (16 MiB). At the bound a command is answered TASK SET FULL.
	maxScratch = 64
)

// scratchPool lends buffers of pieceBytes.
type scratchPool struct {
	lent atomic.Int32
	pool sync.Pool
}

func (p *scratchPool) get() []byte {
	if p.lent.Add(1) > maxScratch {
		p.lent.Add(-1)
		return nil
	}
	if b, ok := p.pool.Get().(*[pieceBytes]byte); ok {
		return b[:]
	}
	return make([]byte, pieceBytes)
}

func (p *scratchPool) put(b []byte) {
	p.pool.Put((*[pieceBytes]byte)(b))
	p.lent.Add(-1)
}

// takeScratch gives the task its buffer, or ends it with TASK SET FULL.
func (t *Task) takeScratch(s *Server) bool {
	if t.state.scratch = s.scratch.get(); t.state.scratch != nil {
		return true
	}
	if !t.Write {
		t.Transfer = 0
	}
	t.Status = cdb.TaskSetFull
	s.finish(t)
	return false
}

// smallBuffer holds the parameters of most commands: COMPARE AND WRITE of a
// block, WRITE SAME, UNMAP with all descriptors that the limit allows.
type smallBuffer [8 + 16*maxUnmapDescriptor + 4096]byte

var smallBuffers = sync.Pool{New: func() any { return new(smallBuffer) }}

// ownData makes data outlive Execute: data in a receive buffer is copied. Only
// COMPARE AND WRITE and VERIFY of much data at once take fresh memory for it,
// bounded by the transport's receive buffer.
func (t *Task) ownData() {
	st := &t.state
	if !t.OutBorrowed || len(st.data) == 0 {
		return
	}
	if len(st.data) > len(smallBuffer{}) {
		st.data = append([]byte(nil), st.data...)
		return
	}
	st.small = smallBuffers.Get().(*smallBuffer)
	st.data = st.small[:copy(st.small[:], st.data)]
}
