package scsi

import (
	"errors"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// What commands are refused with.
var (
	senseOpcode    = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x20}             // INVALID COMMAND OPERATION CODE
	senseLBA       = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x21}             // LOGICAL BLOCK ADDRESS OUT OF RANGE
	senseLUN       = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x25}             // LOGICAL UNIT NOT SUPPORTED
	senseListLen   = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x1a}             // PARAMETER LIST LENGTH ERROR
	senseUnitData  = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x0e, ASCQ: 0x03} // INVALID FIELD IN COMMAND INFORMATION UNIT
	senseNoSaving  = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x39}             // SAVING PARAMETERS NOT SUPPORTED
	senseProtected = cdb.Sense{Key: cdb.DataProtect, ASC: 0x27}                // WRITE PROTECTED
	senseSoftware  = cdb.Sense{Key: cdb.DataProtect, ASC: 0x27, ASCQ: 0x02}    // LOGICAL UNIT SOFTWARE WRITE PROTECTED
	senseRelease   = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x26, ASCQ: 0x04} // INVALID RELEASE OF PERSISTENT RESERVATION
	senseResources = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x55, ASCQ: 0x03} // INSUFFICIENT RESOURCES
	senseFull      = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x55, ASCQ: 0x04} // INSUFFICIENT REGISTRATION RESOURCES
	senseDiffers   = cdb.Sense{Key: cdb.Miscompare, ASC: 0x1d}                 // MISCOMPARE DURING VERIFY OPERATION
	senseSequence  = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x2c}             // COMMAND SEQUENCE ERROR

	senseSanitizing   = cdb.Sense{Key: cdb.NotReady, ASC: 0x04, ASCQ: 0x1b}      // LOGICAL UNIT NOT READY, SANITIZE IN PROGRESS
	senseNotSanitized = cdb.Sense{Key: cdb.MediumError, ASC: 0x31, ASCQ: 0x03}   // SANITIZE COMMAND FAILED
	senseNotOptimized = cdb.Sense{Key: cdb.HardwareError, ASC: 0x67, ASCQ: 0x0a} // SET TARGET PORT GROUPS COMMAND FAILED
)

// invalidField is INVALID FIELD IN CDB with a pointer to a byte of it.
func invalidField(field uint16) cdb.Sense {
	return cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x24, Field: field, HasField: true}
}

// invalidParameter is INVALID FIELD IN PARAMETER LIST with a pointer to a byte of it.
func invalidParameter(field uint16) cdb.Sense {
	return cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x26, Field: field, HasField: true, InData: true}
}

// answerTo is what the initiator hears of an error below.
type answerTo struct {
	err    error
	status byte
	sense  cdb.Sense // with CHECK CONDITION
}

// The one table from a volume's errors to status and sense. ErrUnavailable is
// not here: it has no answer but a lost connection. An error that is not here
// is ours, and the initiator may try again: ABORTED COMMAND, INTERNAL TARGET FAILURE.
var answers = [...]answerTo{
	{ErrBusy, cdb.Busy, cdb.Sense{}},
	{ErrMiscompare, cdb.CheckCondition, senseDiffers},
	{ErrNoSpace, cdb.CheckCondition, cdb.Sense{Key: cdb.DataProtect, ASC: 0x27, ASCQ: 0x07}}, // SPACE ALLOCATION FAILED WRITE PROTECT
	{ErrMedium, cdb.CheckCondition, cdb.Sense{Key: cdb.MediumError, ASC: 0x11}},              // UNRECOVERED READ ERROR
	{ErrReserved, cdb.ReservationConflict, cdb.Sense{}},
	{ErrReadOnly, cdb.CheckCondition, senseSoftware},
	{ErrDeleted, cdb.CheckCondition, senseLUN},
	{errSanitizing, cdb.CheckCondition, senseSanitizing},
}

var senseInternal = cdb.Sense{Key: cdb.AbortedCommand, ASC: 0x44}

// fail sets a started task's result after a request failed.
func (s *Server) fail(t *Task, err error) {
	if !t.Write {
		t.Transfer = 0 // no Data-In follows
	}
	if errors.Is(err, ErrUnavailable) {
		// No SCSI answer fits: the initiator shall try another path now, and only a
		// lost connection says so to every multipath driver. The command is never
		// answered; it may or may not have taken effect.
		t.Status = cdb.Busy
		t.Aborted.Store(true)
		s.dropNexus(t.Nexus)
		return
	}
	for i := range answers {
		a := &answers[i]
		if !errors.Is(err, a.err) {
			continue
		}
		if t.Status = a.status; a.status == cdb.CheckCondition {
			sense := a.sense
			switch a.err {
			case ErrMiscompare:
				sense.Info, sense.HasInfo = t.Req.Miscompare, true
			case ErrMedium:
				if t.Req.Op != OpRead && t.Req.Op != OpExtents {
					sense.ASC = 0x0c // WRITE ERROR
				}
				sense.Info, sense.HasInfo = max(t.Req.Bad, t.Req.Off)>>t.state.unit.shift, true
			case errSanitizing:
				if wipe := t.state.itl.lu.state.Load().sanitize; wipe != nil {
					sense = wipe.sense(t.state.unit)
				}
			}
			t.check(&sense)
		}
		return
	}
	if !t.state.itl.lu.reported.Swap(true) {
		s.log.Error("volume failed a command for an unknown reason",
			"volume", t.state.unit.Name, "nexus", t.Nexus.Initiator, "err", err)
	}
	t.check(&senseInternal)
}

// dropNexus has the transport reset the connections of the initiator, once.
func (s *Server) dropNexus(n *Nexus) {
	if !n.state.dropped.Swap(true) {
		s.hooks.Load().DropSessions(n.Initiator, "volume cannot be served through this node")
	}
}
