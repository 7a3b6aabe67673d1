package scsi

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"sync"
	"time"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

const (
	// tokenGrace is how long a token that has expired keeps its data: longer than
	// any use of it that began in time can last, copyBudgetMax.
	tokenGrace = 30 * time.Second
	// fillingMax is when a token that is still being filled counts as left behind:
	// its node died or lost its way. POPULATE TOKEN gives up long before.
	fillingMax = 2 * time.Minute
	// endingMax is when a removal that another node began is taken over.
	endingMax = 15 * time.Second
	// maxGone bounds the memory of removed tokens, which only makes answers exact.
	maxGone = 256
)

// tokenWatch is what a node knows of the tokens of one unit beyond their records.
type tokenWatch struct {
	mu       sync.Mutex
	seen     map[uint64]tokenSeen
	gone     map[uint64]tokenStatus // why tokens went
	order    []uint64               // of gone, oldest first
	removing bool                   // one removal at a time
}

// tokenSeen is when this node saw a record change last.
type tokenSeen struct {
	status tokenStatus
	uses   uint32
	at     time.Duration
}

// idle returns how long a token has been as it is. The clock of a record that is
// met for the first time, or has changed, starts now: nodes' clocks are never compared.
func (w *tokenWatch) idle(r *tokenRecord, now time.Duration) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return now - w.seeLocked(r, now).at
}

func (w *tokenWatch) seeLocked(r *tokenRecord, now time.Duration) tokenSeen {
	seen, ok := w.seen[r.id]
	if !ok || seen.status != r.status || seen.uses != r.uses {
		seen = tokenSeen{r.status, r.uses, now}
		if w.seen == nil {
			w.seen = make(map[uint64]tokenSeen)
		}
		w.seen[r.id] = seen
	}
	if r.status.ending() {
		w.goneLocked(r.id, r.status)
	}
	return seen
}

func (w *tokenWatch) goneLocked(id uint64, why tokenStatus) {
	if _, ok := w.gone[id]; ok {
		return
	}
	if w.gone == nil {
		w.gone = make(map[uint64]tokenStatus)
	}
	if len(w.order) >= maxGone {
		delete(w.gone, w.order[0])
		w.order = append(w.order[:0], w.order[1:]...)
	}
	w.gone[id] = why
	w.order = append(w.order, id)
}

// survey looks at all records and forgets those that are no more.
func (w *tokenWatch) survey(st *luState, now time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range st.tokens {
		w.seeLocked(r, now)
	}
	if len(w.seen) > len(st.tokens) {
		for id := range w.seen {
			if st.token(id) == nil {
				delete(w.seen, id)
			}
		}
	}
}

// why says how a token went, in sense data.
func (w *tokenWatch) why(id uint64) cdb.Sense {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch w.gone[id] {
	case tokenExpired:
		return senseTokenExpired
	case tokenDeleted:
		return senseTokenDeleted
	case tokenEvicted:
		return senseTokenGone
	default:
		return senseTokenUnknown
	}
}

// lifetime is the inactivity after which a token is no longer valid.
func (r *tokenRecord) lifetime() time.Duration { return time.Duration(r.timeout) * time.Second }

// valid returns the record of a token that a command brings, or the refusal.
// Secrets are compared in constant time; a wrong one is answered like a wrong id.
func (s *Server) valid(lu *logicalUnit, st *luState, token *[cdb.TokenBytes]byte) (*tokenRecord, error) {
	t := cdb.ParseToken(token[:])
	hash := sha256.Sum256(t.Secret[:])
	r := st.token(t.ID)
	if r == nil {
		return nil, &refusal{lu.tokens.why(t.ID)}
	}
	if subtle.ConstantTimeCompare(hash[:], r.secret[:]) != 1 || r.status == tokenFilling {
		return nil, &refusal{senseTokenUnknown}
	}
	idle := lu.tokens.idle(r, s.now())
	switch {
	case r.status.ending():
		return nil, &refusal{lu.tokens.why(t.ID)}
	case idle > r.lifetime():
		return nil, &refusal{senseTokenExpired}
	case !bytes.Equal(token[:], s.rodToken(lu.config.Load(), r, t.Secret)[:]):
		return nil, &refusal{senseTokenCorrupt}
	}
	return r, nil
}

// annexOf is the annex of a unit as the destination of a token's copies, which
// is allowed while the token has a status for it: what comes too late, behind the
// removal of the token, never touches a place that another token has by then.
func (s *Server) annexOf(lu *logicalUnit, id uint64, may func(tokenStatus) bool) place {
	return place{volume: lu.config.Load().Volume, base: replication.AnnexOff, check: func() (StateID, error) {
		st := lu.state.Load()
		if r := st.token(id); r == nil || !may(r.status) {
			return st.id, ErrBusy
		}
		return st.id, nil
	}}
}

// older returns the state that came first: who judged by two of them, one of
// which may be behind, is asked again.
func older(a, b StateID) StateID {
	if a.Epoch < b.Epoch || a.Epoch == b.Epoch && a.Seq < b.Seq {
		return a
	}
	return b
}

// tokenRemoval empties the annex of a token that is no longer valid, then drops
// its record: in this order, so that a place in the annex is given again only
// when nothing of the old token is left there.
type tokenRemoval struct {
	s      *Server
	lu     *logicalUnit
	id     uint64
	record *tokenRecord
	index  int
	copier copier
	done   func() // may be nil
}

// removeToken ends a token for a reason. done is called on the sequencer's
// goroutine when it is gone, or cannot be removed now: then Tick tries again.
func (s *Server) removeToken(lu *logicalUnit, id uint64, why tokenStatus, done func()) {
	x := &tokenRemoval{s: s, lu: lu, id: id, done: done}
	s.changeState(lu, func(now *luState) (*luState, error) {
		x.record = now.token(id)
		if x.record == nil || x.record.status.ending() {
			return nil, nil
		}
		return now.setToken(x.record, func(r *tokenRecord) { r.status = why }), nil
	}, x.marked)
}

func (x *tokenRemoval) marked(after *luState, err error) {
	if err != nil || x.record == nil {
		x.end()
		return
	}
	x.lu.tokens.survey(after, x.s.now())
	x.copier.s = x.s
	x.copier.stopped = func() bool { return false }
	x.copier.to = x.s.annexOf(x.lu, x.id, tokenStatus.ending)
	x.copier.done = x.emptied
	x.next()
}

// next empties the next range.
func (x *tokenRemoval) next() {
	start, end := x.record.ranges[x.index].cover()
	x.index++
	x.copier.dst, x.copier.length = start, end-start
	x.copier.start()
}

func (x *tokenRemoval) emptied(err error) {
	switch {
	case err != nil:
		x.end()
	case x.index < len(x.record.ranges):
		x.next()
	default:
		x.s.changeState(x.lu, func(now *luState) (*luState, error) {
			if now.token(x.id) == nil {
				return nil, nil
			}
			next := now.edited(eventOther, portID{})
			next.tokens = now.withToken(x.id, nil)
			return next, nil
		}, func(*luState, error) { x.end() })
	}
}

func (x *tokenRemoval) end() {
	if x.done != nil {
		x.done()
	}
}

// Tick does what is due by the clock: it lets copies go on that met a busy
// volume, forgets the status of old ones, and removes tokens that expired or were
// left behind. The server calls it every
// second; it does not block.
func (s *Server) Tick() {
	now := s.now()
	s.copies.sweep(now)
	s.paused.resume()
	for _, lu := range s.sortedUnits() {
		st := lu.state.Load()
		lu.tokens.survey(st, now)
		if PathState(lu.path.Load()) == ActiveOptimized {
			s.reapToken(lu, st, now)
		}
	}
	s.backend.Kick()
}

// reapToken removes one token that is due. It is the task of the node that owns
// the volume; two nodes that both believe so do no harm.
func (s *Server) reapToken(lu *logicalUnit, st *luState, now time.Duration) {
	for _, r := range st.tokens {
		idle := lu.tokens.idle(r, now)
		why := tokenExpired
		switch {
		case r.status == tokenFilling && idle > fillingMax:
			why = tokenEvicted
		case r.status.usable() && idle > r.lifetime()+tokenGrace:
		case r.status.ending() && idle > endingMax:
		default:
			continue
		}
		w := &lu.tokens
		w.mu.Lock()
		busy := w.removing
		w.removing = true
		w.mu.Unlock()
		if !busy {
			s.removeToken(lu, r.id, why, func() {
				w.mu.Lock()
				w.removing = false
				w.mu.Unlock()
			})
		}
		return
	}
}

// ticker calls Tick until it is stopped.
type ticker struct {
	quit chan struct{}
	done chan struct{}
}

func (k *ticker) start(s *Server) {
	k.quit, k.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(k.done)
		every := time.NewTicker(time.Second)
		defer every.Stop()
		for {
			select {
			case <-k.quit:
				return
			case <-every.C:
				s.Tick()
			}
		}
	}()
}

func (k *ticker) stop() {
	close(k.quit)
	<-k.done
}

// creator finds the unit that made a token, whoever sees it: a token is a bearer
// secret. The refusal says whose it is when it is not ours.
func (s *Server) creator(t *cdb.Token) (*logicalUnit, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, lu := range s.units {
		if len(t.NAA) > 0 && bytes.Equal(lu.config.Load().NAA, t.NAA) {
			return lu, nil
		}
	}
	switch {
	case t.Target == nil || t.NAA == nil:
		return nil, &refusal{senseTokenUnknown}
	case string(t.Target) != s.target:
		return nil, &refusal{senseTokenRemote}
	default:
		return nil, &refusal{senseTokenRevoked} // the unit is gone, and its tokens with it
	}
}
