package scsi

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"time"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// What VPD page 8F advertises of tokens.
const (
	tokenTimeoutMax     = 600 // seconds
	tokenTimeoutDefault = 60
	maxTokenTransfer    = 1 << 30 // bytes: of one POPULATE or WRITE USING TOKEN
	optimalTransfer     = 64 << 20
)

// populateMax is when POPULATE TOKEN gives up: long before fillingMax, and hosts
// wait no longer either.
const populateMax = 20 * time.Second

func beginPopulate(_ *Server, t *Task) Verdict {
	return beginCopyList(t, cdb.PopulateHeaderBytes, cdb.PopulateHeaderBytes+16*maxTokenRanges)
}

// byteRange is a range of a unit, in bytes.
type byteRange struct{ off, bytes uint64 }

// blockRanges checks a list of range descriptors: their number, that they lie on
// the unit, do not overlap and are not too long together (SBC-3 "POPULATE TOKEN
// parameter list"). Ranges of no blocks are left out. field is where the list begins.
func (u *unitConfig) blockRanges(list cdb.RangeList, claimed int, field uint16) (ranges []byteRange, total uint64, sense *cdb.Sense) {
	bad := func(at uint16) ([]byteRange, uint64, *cdb.Sense) {
		sense := invalidParameter(at)
		return nil, 0, &sense
	}
	if claimed/16 > maxTokenRanges {
		return nil, 0, &senseTooManySegment
	}
	if list.Len() == 0 || list.Len() < claimed/16 {
		return bad(field - 2)
	}
	capacity := u.blocks()
	for i := range list.Len() {
		lba, blocks := list.At(i)
		if lba > capacity || uint64(blocks) > capacity-lba || blocks == 0 && lba == capacity {
			return nil, 0, &senseLBA
		}
		if blocks != 0 {
			ranges = append(ranges, byteRange{lba << u.shift, uint64(blocks) << u.shift})
			total += uint64(blocks) << u.shift
		}
	}
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, func(a, b byteRange) int { return cmp.Compare(a.off, b.off) })
	for i := 1; i < len(sorted); i++ {
		if sorted[i-1].off+sorted[i-1].bytes > sorted[i].off {
			return bad(field)
		}
	}
	if total > maxTokenTransfer {
		return bad(field)
	}
	return ranges, total, nil
}

// populate is a POPULATE TOKEN at work: it reserves a place in the annex, clones
// the ranges there, and makes the token valid.
type populate struct {
	op      *operation
	lu      *logicalUnit
	ranges  []byteRange
	record  tokenRecord
	secret  [cdb.TokenSecretBytes]byte
	placed  *tokenRecord
	evicted []uint64
	index   int
	err     error // why it failed
	copier  copier
}

func runPopulate(s *Server, t *Task) {
	x := &populate{op: &operation{known: true, keep: true}, lu: t.state.itl.lu}
	if sense := x.parse(t); sense != nil {
		t.check(sense)
		s.finish(t)
		return
	}
	const idField = 6
	x.op.id = be32(t.CDB[idField:])
	if !s.beginCopy(x.op, t) {
		return
	}
	x.op.detach()
	sources := make([]tokenRange, len(x.ranges))
	for i, r := range x.ranges {
		sources[i] = tokenRange(r)
	}
	s.changeState(x.lu, func(now *luState) (*luState, error) {
		next, err := now.reserveToken(&x.record, sources)
		if err != nil {
			return nil, err
		}
		x.placed = next.token(x.record.id)
		x.evicted = x.evicted[:0]
		for _, r := range next.tokens {
			if old := now.token(r.id); r.status == tokenEvicted && old != nil && old.status != tokenEvicted {
				x.evicted = append(x.evicted, r.id)
			}
		}
		return next, nil
	}, x.reserved)
}

// parse checks a parameter list.
func (x *populate) parse(t *Task) *cdb.Sense {
	const (
		lengthField  = 0
		timeoutField = 4
	)
	u := t.state.unit
	p, field, ok := cdb.ParsePopulateToken(t.state.data)
	switch {
	case !ok:
		sense := invalidParameter(field)
		return &sense
	case p.Timeout > tokenTimeoutMax:
		sense := invalidParameter(timeoutField)
		return &sense
	case p.TypeValid && p.Type != cdb.RODPointInTime && p.Type != cdb.RODAnyPointInTime:
		return &senseTokenType
	}
	var total uint64
	var sense *cdb.Sense
	x.ranges, total, sense = u.blockRanges(p.Ranges, p.Claimed, cdb.PopulateHeaderBytes)
	if sense == nil && total == 0 {
		empty := invalidParameter(cdb.PopulateHeaderBytes)
		sense = &empty
	}
	if sense != nil {
		return sense
	}
	x.op.immed = p.Immediate
	var id [8]byte
	rand.Read(id[:]) // never fails
	rand.Read(x.secret[:])
	x.record = tokenRecord{
		id: binary.BigEndian.Uint64(id[:]), secret: sha256.Sum256(x.secret[:]), status: tokenFilling,
		shift: u.shift, timeout: uint16(p.Timeout),
	}
	if p.Timeout == 0 {
		x.record.timeout = tokenTimeoutDefault
	}
	for _, r := range x.ranges {
		x.record.ranges = append(x.record.ranges, tokenRange{0, r.bytes})
	}
	return nil
}

func (x *populate) reserved(after *luState, err error) {
	s := x.op.s
	if err != nil {
		x.op.finishError(err)
		return
	}
	x.lu.tokens.survey(after, s.now())
	for _, id := range x.evicted {
		s.removeToken(x.lu, id, tokenEvicted, nil)
	}
	c := &x.copier
	c.s, c.done = s, x.cloned
	c.stopped = func() bool { return x.op.stopped() || s.now()-x.op.started > populateMax }
	c.from = place{volume: x.op.unit.Volume}
	c.to = s.annexOf(x.lu, x.record.id, func(st tokenStatus) bool { return st == tokenFilling })
	annex := c.to.check
	c.to.check = func() (StateID, error) {
		id, err := annex()
		if err != nil {
			return id, err
		}
		by, err := x.op.itl.permits(AccessRead)
		return older(id, by), err
	}
	c.cloneOnly = true
	x.next()
}

// next clones the next range, in whole blocks: what it holds beyond the range is
// not what the token represents.
func (x *populate) next() {
	src, _ := tokenRange(x.ranges[x.index]).cover()
	start, end := x.placed.ranges[x.index].cover()
	x.copier.src, x.copier.dst, x.copier.length = src, start, end-start
	x.copier.start()
}

func (x *populate) cloned(err error) {
	s := x.op.s
	if err != nil {
		x.fail(err)
		return
	}
	x.op.bytes.Add(x.ranges[x.index].bytes)
	if x.index++; x.index < len(x.ranges) {
		x.next()
		return
	}
	x.op.segments.Store(1)
	s.changeState(x.lu, func(now *luState) (*luState, error) {
		r := now.token(x.record.id)
		if r == nil || r.status != tokenFilling {
			return nil, &refusal{senseNoROD} // taken for left behind
		}
		return now.setToken(r, func(r *tokenRecord) { r.status = tokenReady }), nil
	}, func(after *luState, err error) {
		if err != nil {
			x.fail(err)
			return
		}
		x.lu.tokens.survey(after, s.now())
		x.op.finish(&copyResult{state: copyGood, token: s.rodToken(x.op.unit, x.placed, x.secret)})
	})
}

// fail gives the place in the annex back, then answers. Hosts copy by themselves
// when a token cannot be made.
func (x *populate) fail(err error) {
	if err == errNotCloned || err == errStopped && !x.op.stopped() {
		err = &refusal{senseNoROD}
	}
	x.err = err
	x.op.s.removeToken(x.lu, x.record.id, tokenEvicted, func() { x.op.finishError(x.err) })
}
