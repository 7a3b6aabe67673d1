package scsi

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// identityBytesMax is the longest logical unit identifying information.
const identityBytesMax = 64

// Types of identifying information.
const (
	identityOfUnit    = 0x00
	identitySupported = 0x7f
)

// settingCommands are the rows of commands that set what is kept in the ordered
// state, and of those that report it.
func settingCommands() []*command {
	in := func(action byte, name string, usage byte, reply func(*Server, *Task, []byte) ([]byte, bool)) *command {
		return &command{name: name, op: cdb.MaintenanceIn, actions: true, action: action, readsState: true,
			usage: cdb.Mask{6: all, 7: all, 8: all, 9: all, 10: usage}, ignore: cdb.Mask{11: control},
			begin: beginReply, reply: reply, alloc: allocField{at: 6, width: 4}}
	}
	out := func(action byte, name string, usage byte, begin func(*Server, *Task) Verdict, run func(*Server, *Task)) *command {
		return &command{name: name, op: cdb.MaintenanceOut, actions: true, action: action, access: AccessWrite,
			usage: cdb.Mask{6: all, 7: all, 8: all, 9: all, 10: usage}, ignore: cdb.Mask{11: control},
			begin: begin, run: run}
	}
	return []*command{
		{name: "MODE SELECT(6)", op: cdb.ModeSelect6, access: AccessWrite, worksIn: inStandby,
			usage: cdb.Mask{1: modePageFormat, 4: all}, ignore: cdb.Mask{1: oldLUN, 5: control},
			begin: beginModeSelect, run: runModeSelect},
		{name: "MODE SELECT(10)", op: cdb.ModeSelect10, access: AccessWrite, worksIn: inStandby,
			usage: cdb.Mask{1: modePageFormat, 7: all, 8: all}, ignore: cdb.Mask{1: oldLUN, 9: control},
			begin: beginModeSelect, run: runModeSelect},
		in(cdb.ActionIdentifying, "REPORT IDENTIFYING INFORMATION", 0xfe, reportIdentity),
		in(cdb.ActionTimestamp, "REPORT TIMESTAMP", 0, reportTimestamp),
		out(cdb.ActionSetIdentifying, "SET IDENTIFYING INFORMATION", 0xfe, beginSetIdentity, runSetIdentity),
		out(cdb.ActionTimestamp, "SET TIMESTAMP", 0, beginSetTimestamp, runSetTimestamp),
	}
}

// Fields of the CDBs of the MAINTENANCE commands here.
const (
	settingLengthField = 6
	settingTypeField   = 10
)

// reportIdentity is the reply of REPORT IDENTIFYING INFORMATION.
func reportIdentity(_ *Server, t *Task, b []byte) ([]byte, bool) {
	switch t.CDB[settingTypeField] >> 1 {
	case identityOfUnit:
		id := t.state.ordered.identity
		return append(append(b, 0, 0, byte(len(id)>>8), byte(len(id))), id...), true
	case identitySupported:
		return append(b, 0, 0, 0, 4, identityOfUnit, 0, 0, identityBytesMax), true
	default:
		return t.deny(invalidField(settingTypeField))
	}
}

// beginSetIdentity is begin of SET IDENTIFYING INFORMATION. Length 0 takes the
// information away.
func beginSetIdentity(_ *Server, t *Task) Verdict {
	want := binary.BigEndian.Uint32(t.CDB[settingLengthField:])
	switch {
	case t.CDB[settingTypeField]>>1 != identityOfUnit:
		sense := invalidField(settingTypeField)
		return t.refuse(&sense)
	case want > identityBytesMax:
		sense := invalidField(settingLengthField)
		return t.refuse(&sense)
	case t.outExpected() < want:
		return t.refuse(&senseListLen)
	case want == 0:
		return Ready
	}
	t.Transfer, t.OutLen = want, want
	return WantData
}

func runSetIdentity(s *Server, t *Task) {
	id := slices.Clone(t.state.data[:t.OutLen])
	by := t.Nexus.id()
	t.changeState(s, func(now *luState) (*luState, error) {
		next := now.edited(eventIdentity, by)
		next.identity = id
		return next, nil
	})
}

// A timestamp (SPC-4 "REPORT TIMESTAMP command"): milliseconds since 1970, 48 bits,
// at byte 4 of the parameter data, which is 12 bytes long.
const (
	timestampBytes = 12
	timestampField = 4
)

// clockSetting is what SET TIMESTAMP left: how far the initiators' time is ahead
// of the nodes' clocks. Section 9 of the encoded state: i64 milliseconds. Part
// of the wire and disk formats, do not change.
type clockSetting struct{ aheadMillis int64 }

func (st *luState) putTimestamp(b []byte) []byte {
	if st.clock == nil {
		return b
	}
	return binary.BigEndian.AppendUint64(b, uint64(st.clock.aheadMillis))
}

func (st *luState) getTimestamp(b []byte) error {
	if len(b) != 8 {
		return fmt.Errorf("%w: a timestamp of %d bytes", errState, len(b))
	}
	st.clock = &clockSetting{int64(binary.BigEndian.Uint64(b))}
	return nil
}

// reportTimestamp is the reply of REPORT TIMESTAMP.
func reportTimestamp(s *Server, t *Task, b []byte) ([]byte, bool) {
	const (
		originSet   = 2 // by SET TIMESTAMP
		originOther = 3 // by other means: the node's clock
	)
	millis, origin := s.wallMillis(), byte(originOther)
	if c := t.state.ordered.clock; c != nil {
		millis, origin = millis+c.aheadMillis, originSet
	}
	var d [timestampBytes]byte
	binary.BigEndian.PutUint64(d[timestampField-2:], uint64(millis)&(1<<48-1))
	d[1], d[2], d[3] = timestampBytes-2, origin, 0
	return append(b, d[:]...), true
}

func beginSetTimestamp(_ *Server, t *Task) Verdict {
	want := binary.BigEndian.Uint32(t.CDB[settingLengthField:])
	switch {
	case want == 0:
		return Finished
	case want != timestampBytes || t.outExpected() < want:
		return t.refuse(&senseListLen)
	}
	t.Transfer, t.OutLen = want, want
	return WantData
}

func runSetTimestamp(s *Server, t *Task) {
	millis := int64(binary.BigEndian.Uint64(t.state.data[timestampField-2:]) & (1<<48 - 1))
	clock := &clockSetting{millis - s.wallMillis()}
	by := t.Nexus.id()
	t.changeState(s, func(now *luState) (*luState, error) {
		next := now.edited(eventTimestamp, by)
		next.clock = clock
		return next, nil
	})
}
