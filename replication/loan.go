package replication

import (
	"errors"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// A volume is cloned from one that another node owns, too, when that node is the
// only other one that holds the destination (C4). The owner of the source lends the
// range: it keeps writes away, and says which operation was the newest to commit
// when none was in flight there. Whoever is in sync has that one, the borrower
// among them. The lender is the replica of the destination that gets the clone, and
// takes it only from a borrower whose loan still runs; else it refuses the stream
// and is filled again. So a loan may end at any time, with its link or by the
// clock, and the copies still cannot differ.

const (
	// loanTime bounds a loan: a clone takes a commit or two.
	loanTime = 10 * time.Second
	// loansMax bounds the loans of one volume.
	loansMax = 64
	// loanSince is the first wire version that knows loans.
	loanSince = 3
)

// loan is a range that this node, as the owner, keeps as it is for another one.
type loan struct {
	l        *link
	id       uint64
	hold     hold
	returned chan struct{}
}

// lend answers a Lend, and then waits until the loan ends. It runs in a goroutine of its own.
func (v *Volume) lend(l *link, h wire.Header, b wire.Loan) {
	x := &loan{
		l: l, id: b.ID, returned: make(chan struct{}),
		hold: hold{start: lsfs.BlockNo(b.Start), end: lsfs.BlockNo(b.Start) + lsfs.BlockNo(b.Count)},
	}
	if v.lockRange(&x.hold) != nil {
		l.replyError(h, errAbsent)
		return
	}
	defer v.unlockRange(&x.hold)
	v.mu.Lock()
	// R1: what is cloned is what a read would return at this moment.
	if v.g.role != Active || v.gone != nil || v.term != x.hold.term || lsfs.Epoch(h.Epoch) != v.g.rec.Epoch || !v.mayServe() || len(v.loans) >= loansMax {
		v.mu.Unlock()
		l.replyError(h, errAbsent)
		return
	}
	v.loans = append(v.loans, x)
	at := lsfs.OpID{Epoch: v.g.rec.Epoch, Seq: v.committed()}
	v.mu.Unlock()
	l.reply(h, wire.StatusOK, wire.AppendOpID(nil, at), nil)
	end := time.NewTimer(loanTime)
	defer end.Stop()
	select {
	case <-x.returned:
	case <-l.closed:
	case <-end.C:
	case <-v.node.ctx.Done():
	}
	v.mu.Lock()
	v.loans = slices.DeleteFunc(v.loans, func(o *loan) bool { return o == x })
	v.mu.Unlock()
}

// takeBack ends a loan.
func (v *Volume) takeBack(l *link, b wire.Loan) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i, x := range v.loans {
		if x.l == l && x.id == b.ID {
			close(x.returned)
			v.loans = slices.Delete(v.loans, i, i+1)
			return
		}
	}
}

// lends says whether the borrower at the other end of l holds the range. Called
// with mu, of the volume that the range lies in.
func (v *Volume) lends(l *link, start lsfs.BlockNo, count uint32) bool {
	end := start + lsfs.BlockNo(count)
	return slices.ContainsFunc(v.loans, func(x *loan) bool {
		return x.l == l && x.hold.term == v.term && x.hold.start <= start && end <= x.hold.end
	})
}

// borrowed is a loan at the borrower's end.
type borrowed struct {
	v    *Volume
	l    *link
	loan wire.Loan
	at   lsfs.OpID // the newest that had committed
}

// borrow asks the volume's owner to keep a range as it is. ErrNoClone: it cannot.
func (v *Volume) borrow(start lsfs.BlockNo, count uint32) (*borrowed, error) {
	v.mu.Lock()
	l, epoch, owner := v.ownerLink(), v.g.rec.Epoch, v.g.rec.Owner
	v.mu.Unlock()
	p := (*v.node.peers.Load())[owner]
	if l == nil || p == nil || p.version.Load() < loanSince {
		return nil, ErrNoClone
	}
	b := &borrowed{v: v, l: l, loan: wire.Loan{ID: v.node.borrows.Add(1), Start: uint64(start), Count: count}}
	r, err := l.call(wire.Header{Volume: uint64(v.id), Epoch: uint64(epoch)}, wire.Lend, wire.AppendLoan(nil, &b.loan), nil, v.node.ctx.Done())
	if err == nil {
		b.at, err = wire.DecodeOpID(r.meta)
	}
	if err != nil {
		if !errors.Is(err, errAbsent) {
			v.log.Warn("a range to clone from was not lent", "owner", owner, "err", err)
		}
		return nil, ErrNoClone
	}
	return b, nil
}

// giveBack ends the loan. Nobody waits for the answer.
func (b *borrowed) giveBack() {
	b.l.lock()
	h := wire.Header{Type: wire.Call, Flags: uint8(wire.Return), Volume: uint64(b.v.id)}
	b.l.out = wire.AppendFrame(b.l.out, h, wire.AppendLoan(nil, &b.loan), nil)
	b.l.unlock()
	b.l.flush()
}

// borrowable says whether every copy of the destination v can clone from its own
// copy of the lent range. Called with the mutexes of both.
func (v *Volume) borrowable(b *borrowed, to *hold) error {
	src := b.v
	if v.g.role != Active || v.gone != nil || v.term != to.term {
		return errElsewhere
	}
	if src.gone != nil || src.g.rec.Epoch != b.at.Epoch || !src.g.rec.Has(v.node.self) || src.ownerLink() != b.l || !src.has(b.at) {
		return ErrNoClone
	}
	for _, f := range v.followers {
		if f.link == nil && !v.g.needsAck(f.id) {
			continue
		}
		if f.id != src.g.rec.Owner || f.link != b.l || f.mirror {
			return ErrNoClone
		}
	}
	return nil
}
