package scsi

import (
	"encoding/binary"
	"slices"
)

// reportOpcodes is the reply of REPORT SUPPORTED OPERATION CODES, from the rows
// of the command table that this unit offers.
func reportOpcodes(_ *Server, t *Task, b []byte) ([]byte, bool) {
	const (
		optionField = 2
		opcodeField = 3
		actionField = 4
	)
	timeouts := t.CDB[optionField]&0x80 != 0 // RCTD
	op := t.CDB[opcodeField]
	action := binary.BigEndian.Uint16(t.CDB[actionField:])
	row := &opcodes[op]
	if row.actions != nil && !row.offeredOn(t.state.unit) {
		row = new(opcode) // nothing of it is known here
	}
	var cmd *command
	switch t.CDB[optionField] & 7 {
	case 0:
		return appendAllCommands(b, t.state.unit, timeouts), true
	case 1:
		if row.actions != nil {
			return t.deny(invalidField(optionField))
		}
		cmd = row.cmd
	case 2:
		if row.cmd != nil {
			return t.deny(invalidField(optionField))
		}
		cmd = row.byAction(action)
	case 3:
		cmd = row.byAction(action)
		if row.cmd != nil && action == 0 {
			cmd = row.cmd
		}
	default:
		return t.deny(invalidField(optionField))
	}
	return appendOneCommand(b, t.state.unit, cmd, timeouts), true
}

func (o *opcode) byAction(action uint16) *command {
	if o.actions == nil || int(action) >= len(o.actions) {
		return nil
	}
	return o.actions[action]
}

func (c *command) offeredOn(u *unitConfig) bool { return c.offered == nil || c.offered(u) }

// offeredOn says whether a unit knows the operation code, with any service action.
func (o *opcode) offeredOn(u *unitConfig) bool {
	if o.actions == nil {
		return o.cmd != nil && o.cmd.offeredOn(u)
	}
	return slices.ContainsFunc(o.actions[:], func(c *command) bool { return c != nil && c.offeredOn(u) })
}

func appendAllCommands(b []byte, u *unitConfig, timeouts bool) []byte {
	const (
		ctdp     = 0x02
		servactv = 0x01
	)
	start := len(b)
	b = append(b, 0, 0, 0, 0)
	for _, c := range commands {
		if !c.offeredOn(u) {
			continue
		}
		var flags byte
		if c.actions {
			flags |= servactv
		}
		if timeouts {
			flags |= ctdp
		}
		b = append(b, c.op, 0, 0, c.action, 0, flags, 0, byte(c.size))
		if timeouts {
			b = c.appendTimeouts(b)
		}
	}
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-4))
	return b
}

func appendOneCommand(b []byte, u *unitConfig, c *command, timeouts bool) []byte {
	const (
		supported   = 3
		unsupported = 1
		ctdp        = 0x80
	)
	if c == nil || !c.offeredOn(u) {
		return append(b, 0, unsupported, 0, 0)
	}
	var flags byte = supported
	if timeouts {
		flags |= ctdp
	}
	b = append(b, 0, flags, 0, byte(c.size))
	b = append(b, c.usage[:c.size]...)
	if timeouts {
		b = c.appendTimeouts(b)
	}
	return b
}

// appendTimeouts adds a command timeouts descriptor: no nominal time, the
// recommended timeout in seconds.
func (c *command) appendTimeouts(b []byte) []byte {
	b = append(b, 0, 0x0a, 0, 0, 0, 0, 0, 0)
	return binary.BigEndian.AppendUint32(b, uint32(c.seconds))
}

// reportTaskManagement is the reply of REPORT SUPPORTED TASK MANAGEMENT
// FUNCTIONS: what TaskManagement does.
func reportTaskManagement(_ *Server, t *Task, b []byte) ([]byte, bool) {
	const allocField = 6
	if t.state.alloc < 4 {
		return t.deny(invalidField(allocField))
	}
	const functions = 0x80 | 0x40 | 0x10 | 0x08 | 0x02 // ATS, ATSS, CTSS, LURS, TRS
	b = append(b, functions, 0, 0, 0)
	if t.CDB[2]&0x80 != 0 { // REPD: the long form, without timeouts of its own
		b[len(b)-1] = 0x0c
		b = append(b, make([]byte, 12)...)
	}
	return b, true
}

// sortedUnits returns the logical units in order of LUN.
func (s *Server) sortedUnits() []*logicalUnit {
	s.mu.Lock()
	defer s.mu.Unlock()
	units := make([]*logicalUnit, 0, len(s.units))
	for _, lu := range s.units {
		units = append(units, lu)
	}
	slices.SortFunc(units, func(a, b *logicalUnit) int { return int(a.lun) - int(b.lun) })
	return units
}
