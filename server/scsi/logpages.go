package scsi

import "encoding/binary"

// logPage is a log page: append adds its parameters, each with logParameter.
type logPage struct {
	code, subpage byte
	offered       func(*unitConfig) bool // nil: on every unit
	append        func(*Task, []byte) []byte
}

// The log pages in ascending order (SPC-4 and SBC-3 "Log parameters"). Pages
// without parameters are lists of pages, made from this table. It is filled by
// init, since those read it.
var logPages []logPage

const (
	pageProvisioning  = 0x0c
	pageStatistics    = 0x19
	pageInformational = 0x2f
)

func init() {
	logPages = []logPage{
		{0x00, 0x00, nil, supportedPages},
		{0x00, 0xff, nil, supportedSubpages},
		{pageProvisioning, 0x00, (*unitConfig).counts, provisioningLog},
		{pageStatistics, 0x00, nil, statisticsLog},
		{pageInformational, 0x00, nil, informationalLog},
	}
}

// findLogPage returns a page that the unit offers, or nil.
func findLogPage(u *unitConfig, code, subpage byte) *logPage {
	for i := range logPages {
		p := &logPages[i]
		if p.code == code && p.subpage == subpage && (p.offered == nil || p.offered(u)) {
			return p
		}
	}
	return nil
}

// logSense is the reply of LOG SENSE. All parameters are lists or counters
// without thresholds, whose current values are returned whatever PC says.
func logSense(_ *Server, t *Task, b []byte) ([]byte, bool) {
	const (
		pageField    = 2
		subpageField = 3
		pointerField = 5
		saved        = 0x80 // DS: nothing is
		format       = 0x40 // SPF
	)
	u := t.state.unit
	code, subpage := t.CDB[pageField]&0x3f, t.CDB[subpageField]
	p := findLogPage(u, code, subpage)
	if p == nil {
		field := uint16(pageField)
		if findLogPage(u, code, 0) != nil {
			field = subpageField
		}
		return t.deny(invalidField(field))
	}
	first := code
	if code != 0 {
		first |= saved
	}
	if subpage != 0 {
		first |= format
	}
	start := len(b)
	b = p.append(t, append(b, first, subpage, 0, 0))
	if pointer := binary.BigEndian.Uint16(t.CDB[pointerField:]); pointer != 0 {
		at := start + 4
		if code != 0 {
			for at < len(b) && binary.BigEndian.Uint16(b[at:]) < pointer {
				at += 4 + int(b[at+3])
			}
		}
		if code == 0 || at == len(b) {
			return t.deny(invalidField(pointerField))
		}
		b = append(b[:start+4], b[at:]...)
	}
	binary.BigEndian.PutUint16(b[start+2:], uint16(len(b)-start-4))
	return b, true
}

func logParameter(b []byte, code uint16, value ...byte) []byte {
	const list = 0x03 // parameter control: binary format list
	b = binary.BigEndian.AppendUint16(b, code)
	b = append(b, list, byte(len(value)))
	return append(b, value...)
}

func supportedPages(t *Task, b []byte) []byte {
	for i := range logPages {
		if p := &logPages[i]; p.subpage == 0 && findLogPage(t.state.unit, p.code, 0) != nil {
			b = append(b, p.code)
		}
	}
	return b
}

func supportedSubpages(t *Task, b []byte) []byte {
	for i := range logPages {
		if p := &logPages[i]; findLogPage(t.state.unit, p.code, p.subpage) != nil {
			b = append(b, p.code, p.subpage)
		}
	}
	return b
}

// provisioningLog is Logical Block Provisioning, in threshold sets.
func provisioningLog(t *Task, b []byte) []byte {
	const (
		available    = 0x0001
		used         = 0x0002
		deduplicated = 0x0100
		ownScope     = 0x01 // dedicated to the unit
		sharedScope  = 0x02 // other units draw on it
	)
	space := t.state.unit.Space()
	for _, p := range [...]struct {
		code  uint16
		bytes uint64
		scope byte
	}{{available, space.Free, sharedScope}, {used, space.Used, ownScope}, {deduplicated, space.Shared, ownScope}} {
		var v [8]byte
		binary.BigEndian.PutUint32(v[:], thresholdSets(p.bytes))
		v[4] = p.scope
		b = logParameter(b, p.code, v[:]...)
	}
	return b
}

// accesses sum up the commands of a unit for the log.
type accesses struct {
	reads, writes         uint64 // commands
	readBytes, writeBytes uint64
	readTime, writeTime   uint64 // nanoseconds
}

func (a *accesses) sum(all *[Classes]ClassStats) {
	for class := range all {
		c := &all[class]
		switch OpClass(class) {
		case ClassRead:
			a.reads += c.Good
			a.readBytes += c.Bytes
			a.readTime += c.Nanoseconds
		case ClassWrite, ClassCompareAndWrite, ClassOrWrite, ClassWriteAtomic:
			a.writes += c.Good
			a.writeBytes += c.Bytes
			a.writeTime += c.Nanoseconds
		}
	}
}

func (a accesses) since(b accesses) accesses {
	return accesses{
		a.reads - b.reads, a.writes - b.writes, a.readBytes - b.readBytes, a.writeBytes - b.writeBytes,
		a.readTime - b.readTime, a.writeTime - b.writeTime,
	}
}

// accesses returns what the unit did since LOG SELECT set the log to zero.
func (lu *logicalUnit) accesses() accesses {
	var now accesses
	all := lu.stats()
	now.sum(&all.Classes)
	lu.mu.Lock()
	defer lu.mu.Unlock()
	return now.since(lu.logged)
}

// statisticsLog is General Statistics and Performance, with intervals of a microsecond.
func statisticsLog(t *Task, b []byte) []byte {
	const (
		statistics = 0x0001
		interval   = 0x0003
	)
	a := t.state.itl.lu.accesses()
	shift := t.state.unit.shift
	var v [64]byte
	for i, n := range [...]uint64{
		a.reads, a.writes, a.writeBytes >> shift, a.readBytes >> shift, a.readTime / 1000, a.writeTime / 1000,
		a.reads + a.writes, (a.readTime + a.writeTime) / 1000,
	} {
		binary.BigEndian.PutUint64(v[8*i:], n)
	}
	b = logParameter(b, statistics, v[:]...)
	return logParameter(b, interval, 0, 0, 0, 6, 0, 0, 0, 1) // 1 * 10^-6 s
}

// informationalLog is Informational Exceptions: the threshold that was crossed,
// if any. There is no temperature.
func informationalLog(t *Task, b []byte) []byte {
	var a attention
	if t.state.itl.lu.short() {
		a = attentionSpace
	}
	return logParameter(b, 0x0000, a.asc, a.ascq, 0xff, 0)
}

// beginLogSelect is begin of LOG SELECT: it sets the statistics to zero (PCR=1)
// and changes nothing else.
func beginLogSelect(_ *Server, t *Task) Verdict {
	const (
		reset        = 0x02
		pageField    = 2
		subpageField = 3
		lengthField  = 7
	)
	code, subpage := t.CDB[pageField]&0x3f, t.CDB[subpageField]
	var field uint16
	switch {
	case binary.BigEndian.Uint16(t.CDB[lengthField:]) != 0:
		field = lengthField // no parameter can be set
	case findLogPage(t.state.unit, code, 0) == nil:
		field = pageField
	case subpage != 0 && subpage != 0xff:
		field = subpageField
	}
	if field != 0 {
		sense := invalidField(field)
		return t.refuse(&sense)
	}
	if t.CDB[1]&reset != 0 && (code == 0 || code == pageStatistics) {
		itl := t.state.itl
		itl.lu.resetLog()
		for _, i := range itl.lu.members() {
			if i.nexus != itl.nexus {
				i.raise(attentionLog)
			}
		}
	}
	t.Status = 0
	return Finished
}

func (lu *logicalUnit) resetLog() {
	var now accesses
	all := lu.stats()
	now.sum(&all.Classes)
	lu.mu.Lock()
	defer lu.mu.Unlock()
	lu.logged = now
}
