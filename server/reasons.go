package server

import "fmt"

// Statuses (SAM-5) and sense keys (SPC-4) of commands that did not end GOOD.
const (
	statusGood     = 0x00 // in a Refusal: several others, too many kinds to count each
	statusCheck    = 0x02 // CHECK CONDITION: there is a sense
	statusBusy     = 0x08
	statusConflict = 0x18 // RESERVATION CONFLICT
	statusFull     = 0x28 // TASK SET FULL
	statusAborted  = 0x40 // TASK ABORTED

	keyNotReady   = 0x2
	keyMedium     = 0x3
	keyHardware   = 0x4
	keyIllegal    = 0x5
	keyAttention  = 0x6
	keyProtect    = 0x7
	keyCopy       = 0xa // COPY ABORTED
	keyAborted    = 0xb
	keyMiscompare = 0xe
)

// Code writes the end of a command as in the standards: "07/27/07" (sense key,
// additional sense code and qualifier), or "18h" (a status without sense).
func (r Refusal) Code() string {
	if r.Status == statusGood {
		return "--"
	}
	if r.Status == statusCheck && r.Key|r.ASC|r.ASCQ != 0 {
		return fmt.Sprintf("%02X/%02X/%02X", r.Key, r.ASC, r.ASCQ)
	}
	return fmt.Sprintf("%02Xh", r.Status)
}

// Reason says what the end of a command means: a label for metrics, of which
// there is a fixed number, and words for people.
func (r Refusal) Reason() (label, words string) {
	if r.Status == statusGood {
		return "other", "other reasons"
	}
	if r.Status != statusCheck {
		for _, s := range statusReasons {
			if s.status == r.Status {
				return s.label, s.words
			}
		}
		return "other", "another status"
	}
	if r.Key|r.ASC|r.ASCQ == 0 {
		return "check_condition", "refused with sense data"
	}
	best := -1
	for i := range senseReasons {
		s := &senseReasons[i]
		if s.key != r.Key || (s.asc != any8 && s.asc != int16(r.ASC)) || (s.ascq != any8 && s.ascq != int16(r.ASCQ)) {
			continue
		}
		best = i
		break // exact rows stand before families
	}
	if best < 0 {
		return "other", "another reason"
	}
	return senseReasons[best].label, senseReasons[best].words
}

var statusReasons = []struct {
	status       byte
	label, words string
}{
	{statusConflict, "reservation_conflict", "reservation conflict: another host has reserved the volume"},
	{statusBusy, "busy", "busy: the host is asked to repeat it"},
	{statusFull, "busy", "task set full: the host is asked to repeat it"},
	{statusAborted, "aborted", "aborted by a task management function or the end of a session"},
}

// any8 stands for every value of a byte.
const any8 = -1

// senseReasons gives sense codes their meaning; the first row that fits counts.
var senseReasons = []struct {
	key          byte
	asc, ascq    int16
	label, words string
}{
	{keyNotReady, 0x04, 0x0a, "path_transition", "path in transition: the owner is changing"},
	{keyNotReady, 0x04, 0x0b, "path_unavailable", "path in standby"},
	{keyNotReady, 0x04, 0x0c, "path_unavailable", "path unavailable: use the other node's"},
	{keyNotReady, 0x04, 0x14, "space_short", "pool short of space for a moment"},
	{keyNotReady, 0x04, 0x1b, "sanitize", "sanitize in progress"},
	{keyNotReady, any8, any8, "not_ready", "not ready"},
	{keyMedium, 0x11, any8, "unreadable", "unreadable on every copy"},
	{keyMedium, any8, any8, "medium_error", "medium error"},
	{keyHardware, any8, any8, "internal_error", "internal failure"},
	{keyIllegal, 0x1a, 0x00, "bad_parameters", "wrong length of the parameter list"},
	{keyIllegal, 0x20, 0x00, "not_supported", "command not supported"},
	{keyIllegal, 0x21, any8, "out_of_range", "beyond the end of the volume"},
	{keyIllegal, 0x23, any8, "bad_token", "token not valid: expired, used up, or of another target"},
	{keyIllegal, 0x24, 0x00, "bad_command", "invalid field in the command"},
	{keyIllegal, 0x25, 0x00, "no_such_unit", "no such logical unit for this host"},
	{keyIllegal, 0x26, 0x04, "bad_parameters", "release of a reservation that the host does not hold"},
	{keyIllegal, 0x26, 0x06, "copy_limits", "too many copy targets"},
	{keyIllegal, 0x26, 0x07, "copy_limits", "unsupported kind of copy target"},
	{keyIllegal, 0x26, 0x08, "copy_limits", "too many copy segments"},
	{keyIllegal, 0x26, 0x09, "copy_limits", "unsupported kind of copy segment"},
	{keyIllegal, 0x26, any8, "bad_parameters", "invalid field in the parameter list"},
	{keyIllegal, 0x2c, any8, "bad_sequence", "command out of sequence"},
	{keyIllegal, 0x55, 0x04, "too_many_registrations", "no room for another registration"},
	{keyIllegal, any8, any8, "illegal_request", "illegal request"},
	{keyAttention, any8, any8, "unit_attention", "unit attention: the host was told of a change and repeats it"},
	{keyProtect, 0x27, 0x07, "pool_full", "pool full"},
	{keyProtect, 0x27, any8, "write_protected", "write protected: a read-only mapping, or set so by a host"},
	{keyProtect, any8, any8, "write_protected", "data protected"},
	{keyCopy, 0x0d, 0x02, "copy_unreachable", "copy source or destination not reachable for this host"},
	{keyCopy, any8, any8, "copy_aborted", "copy aborted"},
	{keyAborted, any8, any8, "aborted", "aborted: error in transfer, or to be repeated"},
	{keyMiscompare, any8, any8, "miscompare", "miscompare: another host was first, as it should be"},
}
