package scsi

import (
	"errors"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// What RECEIVE COPY OPERATING PARAMETERS and VPD page 8F advertise and
// EXTENDED COPY keeps. A command of maxSegments segments copies 4 GiB: by
// reference in well under a second, and hosts send one segment of 4 to 32 MiB.
const (
	maxCSCDs            = 16
	maxSegments         = 64
	maxCopyListBytes    = 4096
	maxSegmentBytes     = 64 << 20
	maxIdentifiedCopies = 32
	thisUnit            = 0xffff // CSCD descriptor id: the unit that got the command
)

// copyDescriptors are the descriptor types that are understood, ascending.
var copyDescriptors = [...]byte{cdb.SegmentBlocks, cdb.SegmentBytes, cdb.CSCDIdentification}

// listBytes is the PARAMETER LIST LENGTH of third-party copy commands.
func listBytes(t *Task) uint32 { return be32(t.CDB[10:]) }

// beginCopyList is begin of commands that bring a parameter list of at least
// least and at most most bytes that matter.
func beginCopyList(t *Task, least, most uint32) Verdict {
	want := listBytes(t)
	switch {
	case want == 0:
		return Finished
	case want < least || t.outExpected() < want:
		return t.refuse(&senseListLen)
	}
	t.Transfer, t.OutLen = want, min(want, most)
	return WantData
}

func beginExtendedCopy(_ *Server, t *Task) Verdict {
	return beginCopyList(t, cdb.CopyHeaderBytes, cdb.CopyHeaderBytes+maxCopyListBytes)
}

// cscd is a source or destination of segments.
type cscd struct {
	itl     *itlNexus // nil: not reachable
	refused *cdb.Sense
}

// extendedCopy is an EXTENDED COPY(LID1) at work, one segment after the other.
type extendedCopy struct {
	op       *operation
	cscds    []cscd
	segments []cdb.CopySegment
	index    int
	side     copySide // whose fault an error of the copier is
	copier   copier
}

// runExtendedCopy checks the whole list, then copies. The order of the checks is
// what hosts and suites expect: lengths, numbers, types, inline data, the list
// identifier; whether a segment's units and ranges are there is seen when it is
// its turn.
func runExtendedCopy(s *Server, t *Task) {
	x := &extendedCopy{op: &operation{}}
	if sense := x.parse(s, t); sense != nil {
		t.check(sense)
		s.finish(t)
		return
	}
	if !s.beginCopy(x.op, t) {
		return
	}
	if field := x.oversized(t); field != 0 {
		x.op.finishError(&refusal{invalidParameter(field)})
		return
	}
	x.copier.s, x.copier.stopped, x.copier.done = s, x.op.stopped, x.segmentDone
	x.next()
}

// parse checks a parameter list and copies what is needed of it.
func (x *extendedCopy) parse(s *Server, t *Task) *cdb.Sense {
	list := t.state.data
	h, _ := cdb.ParseCopyHeader(list) // beginExtendedCopy saw to its length
	lists := uint64(h.CSCDBytes) + uint64(h.SegmentBytes)
	if cdb.CopyHeaderBytes+lists > uint64(listBytes(t)) || lists > maxCopyListBytes {
		return &senseListLen
	}
	targets := list[cdb.CopyHeaderBytes : cdb.CopyHeaderBytes+int(h.CSCDBytes)]
	segments := list[cdb.CopyHeaderBytes+int(h.CSCDBytes) : cdb.CopyHeaderBytes+int(lists)]
	if len(targets)%cdb.CSCDBytes != 0 {
		return &senseListLen
	}
	if len(targets)/cdb.CSCDBytes > maxCSCDs {
		return &senseTooManyCSCD
	}
	count := 0
	for b := segments; len(b) > 0; count++ {
		n := cdb.SegmentSize(b)
		if n == 0 || n > len(b) {
			n = len(b) // cut short: seen below, after its type
		}
		b = b[n:]
	}
	if count > maxSegments {
		return &senseTooManySegment
	}
	for b := targets; len(b) > 0; b = b[cdb.CSCDBytes:] {
		c, ok := cdb.ParseCSCD(b)
		if !ok {
			return &senseCSCDType
		}
		x.cscds = append(x.cscds, s.findCSCD(t, &c))
	}
	for b := segments; len(b) > 0; b = b[cdb.SegmentSize(b):] {
		if !cdb.KnownSegment(b[0]) {
			return &senseSegmentType
		}
		seg, ok := cdb.ParseSegment(b)
		if !ok {
			return &senseListLen
		}
		x.segments = append(x.segments, seg)
	}
	if h.InlineBytes != 0 {
		return &senseInlineData
	}
	if h.Usage == cdb.ListIDNone && h.ID != 0 || h.Usage == 1 {
		sense := invalidParameter(1)
		return &sense
	}
	x.op.id = uint32(h.ID)
	x.op.known = h.Usage != cdb.ListIDNone
	x.op.keep = h.Usage == cdb.ListIDKeep
	return nil
}

// oversized returns where the length of the first segment stands that is above
// MAXIMUM SEGMENT LENGTH, before any is copied; 0: there is none.
func (x *extendedCopy) oversized(t *Task) uint16 {
	at := cdb.CopyHeaderBytes + len(x.cscds)*cdb.CSCDBytes
	for i := range x.segments {
		if n, ok := x.bytes(t, &x.segments[i]); ok && n > maxSegmentBytes {
			return uint16(at + 8)
		}
		at += len(x.segments[i].Append(nil))
	}
	return 0
}

// findCSCD looks a designator up among the units that the sender sees, so that a
// copy reaches nothing else and tells nothing of it.
func (s *Server) findCSCD(t *Task, c *cdb.CSCD) cscd {
	if c.Association != 0 || c.Designator == nil {
		return cscd{}
	}
	for _, itl := range t.Nexus.state.view.Load().units {
		u := itl.lu.config.Load()
		if !u.designatedBy(c.CodeSet, c.Kind, c.Designator) {
			continue
		}
		switch {
		case c.DeviceType != deviceDisk:
			return cscd{itl, &senseWrongCSCD}
		case c.BlockBytes != 0 && c.BlockBytes != u.LogicalBlock:
			return cscd{itl, &senseWrongCSCD}
		}
		return cscd{itl: itl}
	}
	return cscd{}
}

// designatedBy says whether page 83 names the unit so.
func (u *unitConfig) designatedBy(codeSet, kind byte, designator []byte) bool {
	var scratch [128]byte
	for b := appendUnitDesignators(scratch[:0], u); len(b) >= 4; {
		n := 4 + int(b[3])
		if b[0]&0x0f == codeSet && b[1]&0x0f == kind && string(b[4:n]) == string(designator) {
			return true
		}
		b = b[n:]
	}
	return false
}

// find returns the unit of a CSCD descriptor id.
func (x *extendedCopy) find(t *Task, id uint16) (c cscd) {
	switch {
	case id == thisUnit:
		return cscd{itl: t.state.itl}
	case int(id) < len(x.cscds):
		return x.cscds[id]
	}
	return c
}

// bytes is the length of a segment; it is not ok when the unit that it counts in is not there.
func (x *extendedCopy) bytes(t *Task, seg *cdb.CopySegment) (n uint64, ok bool) {
	if seg.Type == cdb.SegmentBytes {
		return uint64(seg.Count), true
	}
	in := seg.Source
	if seg.CountsDest {
		in = seg.Destination
	}
	c := x.find(t, in)
	if c.itl == nil {
		return 0, false
	}
	return uint64(seg.Count) << c.itl.lu.config.Load().shift, true
}

// next begins the next segment, or ends the command.
func (x *extendedCopy) next() {
	op := x.op
	t := op.task
	for ; x.index < len(x.segments); x.index++ {
		op.segments.Store(uint32(x.index))
		if op.stopped() {
			op.finishError(errStopped)
			return
		}
		seg := &x.segments[x.index]
		from, to := x.find(t, seg.Source), x.find(t, seg.Destination)
		for _, c := range [...]cscd{from, to} {
			sense := c.refused
			if c.itl == nil {
				sense = &senseUnreachable
			}
			if sense != nil {
				x.fail(sense, ofCopy, nil)
				return
			}
		}
		n, _ := x.bytes(t, seg)
		src, srcErr := segmentPlace(from.itl, AccessRead, seg.SourceLBA, uint64(seg.SourceByte), n)
		if srcErr != nil {
			x.failBy(srcErr, ofSource)
			return
		}
		dst, dstErr := segmentPlace(to.itl, AccessWrite, seg.DestLBA, uint64(seg.DestByte), n)
		if dstErr != nil {
			x.failBy(dstErr, ofDestination)
			return
		}
		if n == 0 {
			continue
		}
		c := &x.copier
		c.from, c.to = op.s.inName(from.itl, AccessRead), op.s.inName(to.itl, AccessWrite)
		c.src, c.dst, c.length = src, dst, n
		if c.from.volume.ID() == c.to.volume.ID() && src == dst {
			op.bytes.Add(n)
			continue
		}
		x.side = ofDestination
		c.start()
		return
	}
	op.segments.Store(uint32(len(x.segments)))
	op.finish(&copyResult{state: copyGood})
}

// segmentPlace makes the checks of one side of a segment, in the order of a READ
// or WRITE, and returns where it begins.
func segmentPlace(itl *itlNexus, access Access, lba, offset, n uint64) (off uint64, err error) {
	u := itl.lu.config.Load()
	if state := PathState(itl.lu.path.Load()); state > ActiveNonOptimized {
		return 0, &refusal{*pathSense(state)}
	}
	if _, err := itl.permits(access); err != nil {
		return 0, err
	}
	block := uint64(u.LogicalBlock)
	if offset%block != 0 || n%block != 0 {
		return 0, &refusal{senseBadParameter}
	}
	capacity := u.blocks()
	first := offset >> u.shift
	if lba >= capacity || first >= capacity-lba || n>>u.shift > capacity-lba-first {
		return 0, &refusal{senseLBA}
	}
	return (lba + first) << u.shift, nil
}

// segmentDone is the copier's done.
func (x *extendedCopy) segmentDone(err error) {
	switch {
	case err == nil:
		x.op.bytes.Add(x.copier.length)
		x.index++
		x.next()
	case errors.Is(err, errStopped):
		x.op.finishError(err)
	default:
		if x.copier.failedFrom {
			x.side = ofSource
		}
		x.failBy(err, x.side)
	}
}

// failBy ends the command by what a source or destination answered.
func (x *extendedCopy) failBy(err error, side copySide) {
	if errors.Is(err, ErrDeleted) || errors.Is(err, ErrUnavailable) {
		x.fail(&senseUnreachable, ofCopy, nil)
		return
	}
	var cause copyResult
	cause.setError(err)
	x.fail(&senseCopyAborted, side, &cause)
}

func (x *extendedCopy) fail(sense *cdb.Sense, side copySide, cause *copyResult) {
	r := copyResult{state: copyFailed}
	r.setSegment(sense, x.index, side, cause)
	x.op.finish(&r)
}
