package lsfs

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/twinsan/twinsan/cache"
	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// l2 is the second level of the cache: blocks that left the RAM cache after they
// were used, on a flash device of their own. It pays where the pool's devices are
// slower than it, and only there.
//
// It is asked by fingerprint, which the identity entry of the block says, and what
// it gives is hashed and compared with that: an entry can be wrong in any way and
// is then a miss. A block identity that is freed or means another block now has
// another fingerprint. Errors of the device turn it off and nothing else.
type l2 struct {
	dev   device.Device
	flash *cache.Flash
	spill *cache.Spill
}

const (
	// spillBlocks wait for their place on flash: 8 MiB.
	spillBlocks = 2048
	// l2Rate is the default of what is written to flash, bytes a second: 64 MiB/s are
	// 5.5 TiB a day at the very most, and a cache of 1 TiB is filled in 5 hours.
	l2Rate = 64 << 20
)

// openL2 opens the second level, if one is configured. A pool opens without it.
func (s *Store) openL2() {
	if s.cfg.L2 == "" {
		return
	}
	s.l2 = &l2{}
	if err := s.l2.open(s); err != nil {
		s.l2.free(s)
		s.l2Off(err)
	}
}

func (l *l2) open(s *Store) error {
	c := &s.cfg
	d, err := c.OpenL2(c.L2)
	if errors.Is(err, os.ErrNotExist) && c.L2Bytes > 0 {
		if err = device.Create(c.L2, c.L2Bytes); err == nil {
			d, err = c.OpenL2(c.L2)
		}
	}
	if err != nil {
		return err
	}
	l.dev = d
	if l.flash, err = cache.OpenFlash(d, s.id, s.l2Off); err != nil {
		return err
	}
	if l.spill, err = cache.NewSpill(spillBlocks); err != nil {
		return err
	}
	return s.l1.SpillTo(l.spill, l.flash.Stats().Capacity/cache.BlockSize)
}

// l2Off tells once that there is no second level any more. It is called on any goroutine.
func (s *Store) l2Off(err error) {
	s.logger.Warn("second level cache is off", "device", s.cfg.L2, "err", err)
	s.cfg.Event(Event{Code: "l2-off", Text: fmt.Sprintf("the flash cache %s is off, reads go to the pool's devices: %v", s.cfg.L2, err), Err: err})
	s.l2Failure.CompareAndSwap(nil, &err)
}

// free gives memory and device back. Nobody reads any more.
func (l *l2) free(s *Store) {
	if l.flash != nil {
		if err := l.flash.Close(); err != nil {
			s.logger.Warn("close the flash cache", "device", s.cfg.L2, "err", err)
		}
	}
	if l.dev != nil {
		if err := l.dev.Close(); err != nil {
			s.logger.Warn("close device", "device", s.cfg.L2, "err", err)
		}
	}
	if l.spill != nil {
		_ = l.spill.Close()
	}
	*l = l2{}
}

// l2Loop warms the second level up, and then fills it at a bounded rate: what comes
// faster is lost from the spill.
func (s *Store) l2Loop() {
	l := s.l2
	l.flash.Warm(s.stop)
	block := device.AlignedBuffer(dedup.BlockSize)
	defer device.FreeAligned(block)
	pause := time.NewTimer(0)
	defer pause.Stop()
	<-pause.C
	cost := time.Duration(dedup.BlockSize) * time.Second / time.Duration(s.cfg.L2Rate)
	due := time.Now() // when what was written so far may have been
	for {
		select {
		case <-s.stop:
			return
		case <-l.spill.Wake():
		}
		for {
			bid, ok := l.spill.Take(block)
			if !ok {
				break
			}
			// The block may be dead by now. An identity does not come to mean another
			// block while the store is open.
			var key cache.Key
			s.mu.RLock()
			e, _, _ := s.entryOf(BID(bid))
			take := e != nil && s.flashHelps(format.EntryAddr(e))
			if take {
				key = cache.Key(e[:32])
			}
			s.mu.RUnlock()
			if !take || l.flash.Contains(&key) {
				continue
			}
			l.flash.Add(&key, block)
			now := time.Now()
			if early := now.Add(-time.Second); due.Before(early) {
				due = early // idle times give credit for a second
			}
			if due = due.Add(cost); due.Sub(now) > 10*time.Millisecond {
				pause.Reset(due.Sub(now))
				select {
				case <-s.stop:
					return
				case <-pause.C:
				}
			}
		}
	}
}

// flashHelps says whether a block belongs into the second level: where the pool has
// devices of both classes, only what stands on capacity does.
func (s *Store) flashHelps(at format.Addr) bool {
	m := s.segs.layout.Load().find(at.Segment())
	return m != nil && (!s.tiered() || m.class == Capacity)
}

// fromFlash serves what it can of blocks from the second level and returns the rest,
// in another order.
func (s *Store) fromFlash(rc *readContext, blocks []located) []located {
	if s.l2 == nil || s.l2.flash == nil {
		return blocks
	}
	f := s.l2.flash
	if rc.reducer == nil {
		rc.reducer = dedup.NewReducer(s.cfg.Key)
	}
	rc.batch = rc.batch[:0]
	n := 0 // of blocks whose place is known, moved to the front
	for i := range blocks {
		if !s.flashHelps(blocks[i].e.Addr) {
			continue
		}
		off, ok := f.Lookup((*cache.Key)(&blocks[i].e.Fingerprint))
		if !ok {
			continue
		}
		blocks[n], blocks[i] = blocks[i], blocks[n]
		l := &blocks[n]
		r := &rc.runs[n]
		l.at, l.direct = n*dedup.BlockSize, rc.to.whole != nil && !rc.ahead
		if l.direct {
			l.at = l.index * dedup.BlockSize
			r.P = rc.to.whole[l.at : l.at+dedup.BlockSize]
		} else {
			r.P = rc.buf[l.at : l.at+dedup.BlockSize]
		}
		r.Device, r.Off = s.l2.dev, off
		rc.batch = append(rc.batch, r)
		n++
	}
	if n == 0 {
		return blocks
	}
	_ = s.reads.ReadBatch(rc.batch)
	left := 0
	for i := range n {
		l, r := &blocks[i], &rc.runs[i]
		if r.Err != nil {
			f.Fail(r.Err)
		} else if rc.reducer.Fingerprint(r.P) == l.e.Fingerprint {
			// CHECKED: these are the bytes that the block was made of.
			rc.deliverPlain(l, r.P)
			continue
		} else {
			f.Forget((*cache.Key)(&l.e.Fingerprint), r.Off)
		}
		blocks[left], blocks[i] = blocks[i], blocks[left]
		left++
	}
	// The first n are those that failed, then those that were served; behind them stand
	// those that flash does not have.
	for i := n; i < len(blocks); i++ {
		blocks[left], blocks[i] = blocks[i], blocks[left]
		left++
	}
	return blocks[:left]
}

// L2Stats says how the second level does.
type L2Stats struct {
	Path string // empty: none is configured
	cache.FlashStats
	Dropped int64 // blocks that came faster than flash is written
	Failure error // why it is off
}

func (s *Store) l2Stats() L2Stats {
	st := L2Stats{Path: s.cfg.L2}
	if p := s.l2Failure.Load(); p != nil {
		st.Failure = *p
	}
	if s.l2 != nil && s.l2.flash != nil {
		st.FlashStats, st.Dropped = s.l2.flash.Stats(), s.l2.spill.Dropped()
	}
	return st
}
