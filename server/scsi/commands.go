package scsi

import (
	"cmp"
	"slices"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// command is a row of the command table.
type command struct {
	name    string
	op      byte
	actions bool // the operation code has service actions; action is this row's
	action  byte

	// usage holds the bits that the command evaluates, with the operation code and
	// service action in place: the CDB USAGE DATA of REPORT SUPPORTED OPERATION
	// CODES. Bits in neither usage nor ignore are refused.
	usage  cdb.Mask
	ignore cdb.Mask

	class         OpClass
	access        Access
	harmless      func(*[16]byte) bool // nil, or: this CDB is AccessAny
	worksIn       uint8                // path states beyond the active ones
	passAttention bool                 // unit attentions stay pending
	tryRead       bool                 // a READ: TryExecute may answer it
	writes        bool                 // refused on write protected units
	atomic        bool                 // its write is all or nothing
	readsState    bool                 // reply needs t.state.ordered, the newest ordered state
	seconds       uint16
	offered       func(*unitConfig) bool // nil: on every unit

	begin func(*Server, *Task) Verdict
	run   func(*Server, *Task)                        // after WantData, or Ready without reply
	reply func(*Server, *Task, []byte) ([]byte, bool) // appends the whole reply; false: refused
	alloc allocField                                  // of commands with a reply

	// Computed.
	size     uint16
	reserved cdb.Mask
}

// allocField says where the allocation length stands in the CDB. Without one
// (width 0) the reply has a fixed length.
type allocField struct {
	at, width uint8
	fixed     uint32
}

// Path states in which a command works besides the active ones (SPC-4
// "Asymmetric logical unit access", the tables of each state).
const (
	inStandby = 1 << iota
	inUnavailable
	inTransition

	inAnyState = inStandby | inUnavailable | inTransition
)

// Bits of CDBs that are evaluated or let pass.
const (
	all     = 0xff
	dpoFUA  = cdb.DPO | cdb.FUA
	oldLUN  = 0xe0 // byte 1 of short CDBs: the LUN of SCSI-2
	hint    = 0x07 // byte 1 of READ: RARC, FUA_NV and obsolete bits
	group   = 0xff // GROUP NUMBER and duration limits: no effect
	control = 0xfb // all but NACA
)

// commands is the table. Rows stand in the order of operation code and service
// action. It is filled by init, since a row's reply reads the table.
var commands []*command

func commandTable() []*command {
	table := slices.Concat(baseCommands(), reservationCommands(), settingCommands(), copyCommands(), mediumCommands())
	slices.SortStableFunc(table, func(a, b *command) int {
		return cmp.Or(cmp.Compare(a.op, b.op), cmp.Compare(a.action, b.action))
	})
	return table
}

func baseCommands() []*command {
	return []*command{
		{name: "TEST UNIT READY", op: cdb.TestUnitReady,
			ignore: cdb.Mask{1: oldLUN, 5: control}, begin: beginNothing},
		{name: "REQUEST SENSE", op: cdb.RequestSense, access: AccessAlways, worksIn: inAnyState, passAttention: true,
			usage: cdb.Mask{1: 0x01, 4: all}, ignore: cdb.Mask{1: oldLUN, 5: control},
			begin: beginReply, reply: requestSense, alloc: allocField{at: 4, width: 1}},
		{name: "READ(6)", op: cdb.Read6, class: ClassRead, access: AccessRead, tryRead: true,
			usage: cdb.Mask{1: 0x1f, 2: all, 3: all, 4: all}, ignore: cdb.Mask{1: oldLUN, 5: control},
			begin: beginRead, run: runRead},
		{name: "WRITE(6)", op: cdb.Write6, class: ClassWrite, access: AccessWrite, writes: true,
			usage: cdb.Mask{1: 0x1f, 2: all, 3: all, 4: all}, ignore: cdb.Mask{1: oldLUN, 5: control},
			begin: beginWrite, run: runWrite},
		{name: "INQUIRY", op: cdb.Inquiry, access: AccessAlways, worksIn: inAnyState, passAttention: true,
			usage: cdb.Mask{1: 0x01, 2: all, 3: all, 4: all}, ignore: cdb.Mask{1: oldLUN, 5: control},
			begin: beginReply, reply: inquiry, alloc: allocField{at: 3, width: 2}},
		{name: "MODE SENSE(6)", op: cdb.ModeSense6, access: AccessRead, worksIn: inStandby,
			usage: cdb.Mask{1: 0x08, 2: all, 3: all, 4: all}, ignore: cdb.Mask{1: oldLUN, 5: control},
			begin: beginReply, reply: modeSense, alloc: allocField{at: 4, width: 1}},
		{name: "START STOP UNIT", op: cdb.StartStopUnit, access: AccessWrite, harmless: harmlessStart,
			usage: cdb.Mask{1: 0x01, 4: 0xf5}, ignore: cdb.Mask{1: oldLUN, 3: 0x0f, 5: control},
			begin: beginStartStop, run: runSynchronize},
		{name: "RECEIVE DIAGNOSTIC RESULTS", op: cdb.ReceiveDiagnosticResults, access: AccessRead, worksIn: inStandby,
			usage: cdb.Mask{1: 0x01, 2: all, 3: all, 4: all}, ignore: cdb.Mask{1: oldLUN, 5: control},
			begin: beginReply, reply: receiveDiagnostic, alloc: allocField{at: 3, width: 2}},
		{name: "SEND DIAGNOSTIC", op: cdb.SendDiagnostic, access: AccessWrite, worksIn: inStandby,
			usage: cdb.Mask{1: 0x14, 3: all, 4: all}, ignore: cdb.Mask{1: 0x03, 5: control},
			begin: beginSendDiagnostic, run: runSendDiagnostic},
		{name: "PREVENT ALLOW MEDIUM REMOVAL", op: cdb.PreventAllow, access: AccessWrite, harmless: harmlessAllow,
			usage: cdb.Mask{4: 0x03}, ignore: cdb.Mask{1: oldLUN, 5: control}, begin: beginNothing},
		{name: "READ CAPACITY(10)", op: cdb.ReadCapacity10, worksIn: inStandby,
			ignore: cdb.Mask{1: 0xff, 2: all, 3: all, 4: all, 5: all, 9: control},
			begin:  beginReply, reply: readCapacity10, alloc: allocField{fixed: 8}},
		{name: "READ(10)", op: cdb.Read10, class: ClassRead, access: AccessRead, tryRead: true,
			usage:  cdb.Mask{1: dpoFUA, 2: all, 3: all, 4: all, 5: all, 7: all, 8: all},
			ignore: cdb.Mask{1: hint, 6: group, 9: control}, begin: beginRead, run: runRead},
		{name: "WRITE(10)", op: cdb.Write10, class: ClassWrite, access: AccessWrite, writes: true,
			usage:  cdb.Mask{1: dpoFUA, 2: all, 3: all, 4: all, 5: all, 7: all, 8: all},
			ignore: cdb.Mask{1: hint, 6: group, 9: control}, begin: beginWrite, run: runWrite},
		{name: "WRITE AND VERIFY(10)", op: cdb.WriteAndVerify10, class: ClassWrite, access: AccessWrite, writes: true, seconds: 60,
			usage:  cdb.Mask{1: cdb.DPO | 0x06, 2: all, 3: all, 4: all, 5: all, 7: all, 8: all},
			ignore: cdb.Mask{1: 0x01, 6: group, 9: control}, begin: beginWriteAndVerify, run: runWriteAndVerify},
		{name: "VERIFY(10)", op: cdb.Verify10, class: ClassVerify, access: AccessRead, seconds: 60,
			usage:  cdb.Mask{1: cdb.DPO | 0x06, 2: all, 3: all, 4: all, 5: all, 7: all, 8: all},
			ignore: cdb.Mask{1: 0x01, 6: group, 9: control}, begin: beginVerify, run: runPieces},
		{name: "PRE-FETCH(10)", op: cdb.PreFetch10, class: ClassVerify, access: AccessRead,
			usage:  cdb.Mask{1: 0x02, 2: all, 3: all, 4: all, 5: all, 7: all, 8: all},
			ignore: cdb.Mask{1: 0x01, 6: group, 9: control}, begin: beginPreFetch, run: runPieces},
		{name: "SYNCHRONIZE CACHE(10)", op: cdb.SynchronizeCache10, class: ClassFlush, access: AccessWrite, seconds: 60,
			usage:  cdb.Mask{1: 0x02, 2: all, 3: all, 4: all, 5: all, 7: all, 8: all},
			ignore: cdb.Mask{1: 0x05, 6: group, 9: control}, begin: beginSynchronize, run: runSynchronize},
		{name: "READ DEFECT DATA(10)", op: cdb.ReadDefectData10, access: AccessRead,
			usage: cdb.Mask{2: 0x1f, 7: all, 8: all}, ignore: cdb.Mask{1: oldLUN, 9: control},
			begin: beginReply, reply: readDefectData10, alloc: allocField{at: 7, width: 2}},
		{name: "WRITE SAME(10)", op: cdb.WriteSame10, class: ClassWriteSame, access: AccessWrite, writes: true, seconds: 60,
			usage:  cdb.Mask{1: 0x08, 2: all, 3: all, 4: all, 5: all, 7: all, 8: all},
			ignore: cdb.Mask{1: 0x01, 6: group, 9: control}, begin: beginWriteSame, run: runWriteSame},
		{name: "UNMAP", op: cdb.Unmap, class: ClassUnmap, access: AccessWrite, writes: true, seconds: 60, offered: thin,
			usage: cdb.Mask{7: all, 8: all}, ignore: cdb.Mask{6: group, 9: control}, begin: beginUnmap, run: runUnmap},
		{name: "MODE SENSE(10)", op: cdb.ModeSense10, access: AccessRead, worksIn: inStandby,
			usage: cdb.Mask{1: 0x18, 2: all, 3: all, 7: all, 8: all}, ignore: cdb.Mask{1: oldLUN, 9: control},
			begin: beginReply, reply: modeSense, alloc: allocField{at: 7, width: 2}},
		{name: "READ(16)", op: cdb.Read16, class: ClassRead, access: AccessRead, tryRead: true,
			usage: cdb.Mask{1: dpoFUA, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all,
				10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{1: hint, 14: group, 15: control}, begin: beginRead, run: runRead},
		{name: "COMPARE AND WRITE", op: cdb.CompareAndWrite, class: ClassCompareAndWrite, access: AccessWrite, writes: true,
			usage:  cdb.Mask{1: dpoFUA, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all, 13: all},
			ignore: cdb.Mask{1: hint, 14: group, 15: control}, begin: beginCompareAndWrite, run: runCompareAndWrite},
		{name: "WRITE(16)", op: cdb.Write16, class: ClassWrite, access: AccessWrite, writes: true,
			usage: cdb.Mask{1: dpoFUA, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all,
				10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{1: hint, 14: group, 15: control}, begin: beginWrite, run: runWrite},
		{name: "WRITE AND VERIFY(16)", op: cdb.WriteAndVerify16, class: ClassWrite, access: AccessWrite, writes: true, seconds: 60,
			usage: cdb.Mask{1: cdb.DPO | 0x06, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all,
				10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{1: 0x01, 14: group, 15: control}, begin: beginWriteAndVerify, run: runWriteAndVerify},
		{name: "VERIFY(16)", op: cdb.Verify16, class: ClassVerify, access: AccessRead, seconds: 60,
			usage: cdb.Mask{1: cdb.DPO | 0x06, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all,
				10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{1: 0x01, 14: group, 15: control}, begin: beginVerify, run: runPieces},
		{name: "PRE-FETCH(16)", op: cdb.PreFetch16, class: ClassVerify, access: AccessRead,
			usage: cdb.Mask{1: 0x02, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all,
				10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{1: 0x01, 14: group, 15: control}, begin: beginPreFetch, run: runPieces},
		{name: "SYNCHRONIZE CACHE(16)", op: cdb.SynchronizeCache16, class: ClassFlush, access: AccessWrite, seconds: 60,
			usage: cdb.Mask{1: 0x02, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all,
				10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{1: 0x05, 14: group, 15: control}, begin: beginSynchronize, run: runSynchronize},
		{name: "WRITE SAME(16)", op: cdb.WriteSame16, class: ClassWriteSame, access: AccessWrite, writes: true, seconds: 60,
			usage: cdb.Mask{1: 0x09, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all,
				10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{14: group, 15: control}, begin: beginWriteSame, run: runWriteSame},
		{name: "READ CAPACITY(16)", op: cdb.ServiceActionIn16, actions: true, action: cdb.ActionReadCapacity16, worksIn: inStandby,
			usage:  cdb.Mask{10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{1: oldLUN, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all, 15: control},
			begin:  beginReply, reply: readCapacity16, alloc: allocField{at: 10, width: 4}},
		{name: "REPORT LUNS", op: cdb.ReportLUNs, access: AccessAlways, worksIn: inAnyState, passAttention: true,
			usage: cdb.Mask{2: all, 6: all, 7: all, 8: all, 9: all}, ignore: cdb.Mask{1: oldLUN, 11: control},
			begin: beginReply, reply: reportLUNs, alloc: allocField{at: 6, width: 4}},
		{name: "REPORT TARGET PORT GROUPS", op: cdb.MaintenanceIn, actions: true, action: cdb.ActionReportTargetPorts, class: ClassPaths, worksIn: inAnyState,
			usage: cdb.Mask{1: 0xe0, 6: all, 7: all, 8: all, 9: all}, ignore: cdb.Mask{11: control},
			begin: beginReply, reply: reportTargetPortGroups, alloc: allocField{at: 6, width: 4}},
		{name: "REPORT SUPPORTED OPERATION CODES", op: cdb.MaintenanceIn, actions: true, action: cdb.ActionReportOpcodes, access: AccessRead,
			usage: cdb.Mask{2: 0x87, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all}, ignore: cdb.Mask{11: control},
			begin: beginReply, reply: reportOpcodes, alloc: allocField{at: 6, width: 4}},
		{name: "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", op: cdb.MaintenanceIn, actions: true, action: cdb.ActionReportTaskManagement, access: AccessRead,
			usage: cdb.Mask{2: 0x80, 6: all, 7: all, 8: all, 9: all}, ignore: cdb.Mask{11: control},
			begin: beginReply, reply: reportTaskManagement, alloc: allocField{at: 6, width: 4}},
		{name: "READ(12)", op: cdb.Read12, class: ClassRead, access: AccessRead, tryRead: true,
			usage:  cdb.Mask{1: dpoFUA, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all},
			ignore: cdb.Mask{1: hint, 10: group, 11: control}, begin: beginRead, run: runRead},
		{name: "WRITE(12)", op: cdb.Write12, class: ClassWrite, access: AccessWrite, writes: true,
			usage:  cdb.Mask{1: dpoFUA, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all},
			ignore: cdb.Mask{1: hint, 10: group, 11: control}, begin: beginWrite, run: runWrite},
		{name: "WRITE AND VERIFY(12)", op: cdb.WriteAndVerify12, class: ClassWrite, access: AccessWrite, writes: true, seconds: 60,
			usage:  cdb.Mask{1: cdb.DPO | 0x06, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all},
			ignore: cdb.Mask{1: 0x01, 10: group, 11: control}, begin: beginWriteAndVerify, run: runWriteAndVerify},
		{name: "VERIFY(12)", op: cdb.Verify12, class: ClassVerify, access: AccessRead, seconds: 60,
			usage:  cdb.Mask{1: cdb.DPO | 0x06, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all},
			ignore: cdb.Mask{1: 0x01, 10: group, 11: control}, begin: beginVerify, run: runPieces},
		{name: "READ DEFECT DATA(12)", op: cdb.ReadDefectData12, access: AccessRead,
			usage: cdb.Mask{1: 0x1f, 6: all, 7: all, 8: all, 9: all}, ignore: cdb.Mask{1: oldLUN, 2: all, 3: all, 4: all, 5: all, 11: control},
			begin: beginReply, reply: readDefectData12, alloc: allocField{at: 6, width: 4}},
	}
}

// opcode is what one operation code leads to: a command, or one for each service action.
type opcode struct {
	cmd     *command
	actions *[32]*command
}

var opcodes [256]opcode

func init() {
	commands = commandTable()
	for _, c := range commands {
		c.size = uint16(cdb.Size(c.op))
		if c.seconds == 0 {
			c.seconds = 30
		}
		o := &opcodes[c.op]
		action := byte(0)
		if c.actions {
			action = 0x1f
			if o.actions == nil {
				o.actions = new([32]*command)
			}
			o.actions[c.action] = c
		} else {
			o.cmd = c
		}
		for i := 1; i < int(c.size); i++ {
			c.reserved[i] = ^(c.usage[i] | c.ignore[i])
		}
		c.reserved[1] &^= action
		c.usage[0] = c.op
		c.usage[1] |= c.action
	}
}

// findCommand returns a CDB's row. Without one, known says that the operation
// code exists and only the service action does not.
func findCommand(c *[16]byte) (cmd *command, known bool) {
	o := &opcodes[c[0]]
	if o.actions != nil {
		return o.actions[c[1]&0x1f], true
	}
	return o.cmd, o.cmd != nil
}

func thin(u *unitConfig) bool { return u.Thin }

// beginNothing is for commands that succeed without effect, TEST UNIT READY
// first of all: whatever stands against the command was checked before.
func beginNothing(_ *Server, t *Task) Verdict {
	t.Status = cdb.Good
	return Finished
}
