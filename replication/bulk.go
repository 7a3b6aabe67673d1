package replication

import (
	"sync"
	"time"

	"github.com/twinsan/twinsan/replication/wire"
)

// The contents of a chunk are a megabyte: a resync would spend a third of its processor
// time on copying them from one buffer to the next. So they have one place at each end.
// The owner reads them from its store to a chunkRoom and the link writes them from
// there; the replica reads them from the link to a body, and its store writes them
// from there.

// bulk is a frame of a resync. They go one at a time, between the writes of what is in
// out: an operation or a beacon never stands behind more than one of them. So what is
// queued later may overtake it. Nothing that follows it in the stream may depend on it
// before its call has been answered, which the range that the owner holds sees to (Y4).
//
// BOUNDED: each is in a call that somebody waits for.
type bulk struct {
	id         uint64
	head, data []byte
}

// bulkMin is the shortest data part that is worth a write of its own.
const bulkMin = 64 << 10

// callBulk is call for a long data part, which is not copied. head has room for a
// header, and the meta part behind it. Both belong to the link until the call returns
// without an error, and for ever if it returns one: they may still be on their way.
func (l *link) callBulk(h wire.Header, method wire.Method, head, data []byte, cancel <-chan struct{}) (reply, error) {
	if len(data) < bulkMin {
		return l.call(h, method, head[wire.HeaderLen:], data, cancel)
	}
	c := pendingCall{answer: make(chan reply, 1)}
	l.lock()
	if l.err != nil {
		c.answer <- reply{err: l.err}
	} else {
		h = l.enlist(&c, h, method)
		l.bulk = append(l.bulk, bulk{c.id, wire.EndBefore(head, 0, h, len(head)-wire.HeaderLen, len(data)), data})
	}
	l.unlock()
	l.flush()
	return l.wait(c, cancel)
}

// writeBulkLocked writes one of the bulk frames. It lets go of the mutex meanwhile.
func (l *link) writeBulkLocked() {
	b := l.bulk[0]
	n := copy(l.bulk, l.bulk[1:])
	l.bulk[n] = bulk{}
	l.bulk = l.bulk[:n]
	l.pending.Store(len(l.out) > 0 || n > 0)
	if l.calls[b.id] == nil {
		return // nobody waits for it any more
	}
	l.mu.Unlock()
	l.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := l.conn.Write(b.head)
	if err == nil {
		_, err = l.conn.Write(b.data)
	}
	l.mu.Lock()
	if err != nil {
		l.failLocked(err)
	}
}

// body is the data part of a long call from a peer, of bodyMin to bodyMax bytes. Who
// takes it from the link frees it, once, when nothing refers to its bytes any more, or
// leaves it to the garbage collector.
//
// BOUNDED: there are as many as chunks under way, which the owner bounds, and one that
// is being read for each link.
type body struct {
	data []byte
	room [bodyMax]byte
}

const (
	bodyMin = bulkMin
	bodyMax = wire.ChunkBlocks * blockSize
)

// Resyncs are rare: between them the garbage collector has the bodies back.
var bodies = sync.Pool{New: func() any { return new(body) }}

func newBody(size int) *body {
	b := bodies.Get().(*body)
	b.data = b.room[:size]
	return b
}

func (b *body) free() {
	b.data = nil
	bodies.Put(b)
}

// takeBody makes the body of the frame that is being handled the caller's; nil when its
// data part lies in the buffer of the link, or it was taken. The reading goroutine calls it.
func (l *link) takeBody() *body {
	b := l.body
	l.body = nil
	return b
}
