package iscsi

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

const (
	// firstOutput is the size that an output buffer starts with, keepOutput the
	// size up to which it is kept after use, bytes.
	firstOutput = 64 << 10
	keepOutput  = 1 << 20
	// flushAt is the amount of output at which the reader writes before it goes on
	// with the commands at hand, bytes.
	flushAt = 256 << 10
	// inlineData is the longest Data-In that is copied into the output buffer;
	// longer ones are sent from the task's own buffer. Copying 64 KiB costs about
	// what one more element of a writev does with its page references.
	inlineData = 64 << 10
	// copyData is the same limit for completed tasks, whose data are in a buffer of
	// their own already.
	copyData = 8 << 10
	// maxVectors is the number of elements of one writev.
	maxVectors = 64
)

// batch is output that is collected or being written: bytes in order, with
// pieces of other memory inserted. The leases of the pieces end with the write.
type batch struct {
	buf     []byte
	inserts []insert
	size    int // bytes with inserts
}

// insert is a piece of foreign memory that goes out before buf[at].
type insert struct {
	at    int
	data  []byte
	lease lease // released after the write; may be none
}

// header appends room for a header and returns it. It is valid until the next
// append.
func (b *batch) header() *pdu.Header {
	n := len(b.buf)
	b.grow(pdu.HeaderLen)
	b.size += pdu.HeaderLen
	return (*pdu.Header)(b.buf[n:])
}

// grow extends buf by n bytes of undefined content.
func (b *batch) grow(n int) {
	need := len(b.buf) + n
	if need > cap(b.buf) {
		next := make([]byte, len(b.buf), max(2*cap(b.buf), need, firstOutput))
		copy(next, b.buf)
		b.buf = next
	}
	b.buf = b.buf[:need]
}

// append appends bytes.
func (b *batch) append(p []byte) {
	n := len(b.buf)
	b.grow(len(p))
	copy(b.buf[n:], p)
	b.size += len(p)
}

// insert appends a piece of foreign memory.
func (b *batch) insert(data []byte, l lease) {
	b.inserts = append(b.inserts, insert{len(b.buf), data, l})
	b.size += len(data)
}

// empty forgets the content, keeping memory of ordinary size.
func (b *batch) empty() {
	b.size = 0
	b.buf = b.buf[:0]
	if cap(b.buf) > keepOutput {
		b.buf = nil
	}
	clear(b.inserts)
	b.inserts = b.inserts[:0]
}

// writeState is the batch that is being written. It belongs to whoever set
// connection.writing.
type writeState struct {
	batch   *batch
	bytes   int // of batch.buf, written
	inserts int // of batch.inserts, written
	within  int // of the current insert, written
	err     error
	vectors [maxVectors]syscall.Iovec
}

// more reports whether something is left to write.
func (w *writeState) more() bool {
	return w.bytes < len(w.batch.buf) || w.inserts < len(w.batch.inserts)
}

// push writes as much as the socket takes. False: it takes no more now.
func (w *writeState) push(fd uintptr) bool {
	for w.more() {
		n := w.collect()
		written, _, errno := syscall.Syscall(syscall.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.vectors[0])), uintptr(n))
		switch errno {
		case 0:
			w.consume(int(written))
		case syscall.EAGAIN:
			return false
		case syscall.EINTR:
		default:
			w.err = errno
			return true
		}
	}
	return true
}

// collect fills the vectors with what comes next and returns how many there are.
func (w *writeState) collect() int {
	b := w.batch
	at, ins, within := w.bytes, w.inserts, w.within
	n := 0
	for n < maxVectors && (at < len(b.buf) || ins < len(b.inserts)) {
		end := len(b.buf)
		if ins < len(b.inserts) {
			end = b.inserts[ins].at
		}
		var p []byte
		if at < end {
			p = b.buf[at:end]
			at = end
		} else {
			p = b.inserts[ins].data[within:]
			ins++
			within = 0
		}
		if len(p) == 0 {
			continue
		}
		w.vectors[n].Base = &p[0]
		w.vectors[n].SetLen(len(p))
		n++
	}
	return n
}

// consume notes n written bytes.
func (w *writeState) consume(n int) {
	b := w.batch
	for n > 0 {
		end := len(b.buf)
		if w.inserts < len(b.inserts) {
			end = b.inserts[w.inserts].at
		}
		if w.bytes < end {
			step := min(n, end-w.bytes)
			w.bytes += step
			n -= step
			continue
		}
		step := min(n, len(b.inserts[w.inserts].data)-w.within)
		w.within += step
		n -= step
		w.skipDone()
	}
	w.skipDone()
}

// skipDone goes past inserts that are wholly written.
func (w *writeState) skipDone() {
	b := w.batch
	for w.inserts < len(b.inserts) && w.bytes == b.inserts[w.inserts].at && w.within == len(b.inserts[w.inserts].data) {
		w.inserts++
		w.within = 0
	}
}

// flush writes collected output, as far as the socket takes it without waiting;
// the rest is left to a goroutine with a deadline. Any goroutine may call it;
// when another one is writing, that one also writes what came since.
func (c *connection) flush() {
	c.mu.Lock()
	for !c.writing && !c.closed && c.out.size > 0 {
		c.startWriteLocked()
		c.mu.Unlock()
		err := c.raw.Write(c.pushOnce)
		if err == nil {
			err = c.write.err
		}
		if err == nil && c.write.more() {
			c.mu.Lock()
			if !c.closed {
				c.stalls++
				c.writers.Add(1)
				go c.drain()
				c.mu.Unlock()
				return
			}
			c.mu.Unlock()
			err = errDropped
		}
		c.mu.Lock()
		c.endWriteLocked(err)
	}
	c.mu.Unlock()
}

// startWriteLocked swaps the pair of batches.
func (c *connection) startWriteLocked() {
	c.writing = true
	c.out, c.spare = c.spare, c.out
	c.write.batch = c.spare
	c.write.bytes, c.write.inserts, c.write.within, c.write.err = 0, 0, 0, nil
}

// endWriteLocked releases what was written. After an error the connection is
// cut; its reader cleans up.
func (c *connection) endWriteLocked(err error) {
	for i := range c.spare.inserts {
		c.target.buffers.release(c.spare.inserts[i].lease)
	}
	c.bytesOut += uint64(c.spare.size)
	c.spare.empty()
	clear(c.write.vectors[:])
	c.writing = false
	if err != nil && !c.closed {
		c.cutLocked(err)
	}
	c.changed.Broadcast()
}

// drain writes what the socket did not take at once, and what comes meanwhile.
// A batch that is not taken within WriteTime ends the connection.
func (c *connection) drain() {
	defer c.writers.Done()
	c.mu.Lock()
	for {
		c.mu.Unlock()
		err := c.conn.SetWriteDeadline(time.Now().Add(c.target.limits.WriteTime))
		if err == nil {
			err = c.raw.Write(c.pushAll)
		}
		if err == nil {
			err = c.write.err
		}
		if err == nil {
			err = c.conn.SetWriteDeadline(time.Time{})
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = errSlowReader
		}
		c.mu.Lock()
		c.endWriteLocked(err)
		if c.closed || c.out.size == 0 {
			c.mu.Unlock()
			return
		}
		c.startWriteLocked()
	}
}

// unsentLocked is the number of bytes that wait for the initiator.
func (c *connection) unsentLocked() int {
	n := c.out.size
	if c.writing {
		n += c.spare.size
	}
	return n
}

// numbersLocked takes the next StatSN together with the command window.
func (c *connection) numbersLocked() pdu.Numbers {
	n := pdu.Numbers{StatSN: c.statSN, ExpCmdSN: c.window.exp, MaxCmdSN: c.window.max}
	c.statSN++
	return n
}

// peekNumbersLocked is numbersLocked for PDUs that do not use up a StatSN.
func (c *connection) peekNumbersLocked() pdu.Numbers {
	return pdu.Numbers{StatSN: c.statSN, ExpCmdSN: c.window.exp, MaxCmdSN: c.window.max}
}

// sealLocked ends the header that was appended last, whose data segment will
// have n bytes, and appends the header digest.
func (c *connection) sealLocked(h *pdu.Header, n int) {
	h.SetDataLen(n)
	if c.layout.HeaderDigest {
		crc := pdu.Digest(h[:])
		b := c.out
		at := len(b.buf)
		b.grow(pdu.DigestLen)
		b.size += pdu.DigestLen
		pdu.PutDigest(b.buf[at:], crc)
	}
}

// dataLocked appends a data segment with padding and digest.
func (c *connection) dataLocked(data []byte) {
	if len(data) == 0 {
		return
	}
	c.out.append(data)
	c.tailLocked(data)
}

// tailLocked appends padding and digest of a data segment.
func (c *connection) tailLocked(data []byte) {
	var tail [3 + pdu.DigestLen]byte
	n := pdu.Pad(len(data))
	if c.layout.DataDigest {
		pdu.PutDigest(tail[n:], pdu.DataDigest(data))
		n += pdu.DigestLen
	}
	c.out.append(tail[:n])
}
