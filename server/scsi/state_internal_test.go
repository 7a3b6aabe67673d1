package scsi

import (
	"errors"
	"strings"
	"testing"
)

// A command's change is refused when a reset has come since Begin that this node
// may not have heard of, when the task was aborted, and when the newest state
// forbids it.
func TestCheckedEdit(t *testing.T) {
	edits := 0
	task := &Task{Nexus: &Nexus{Initiator: portB.initiator, ISID: portB.isid, Port: portB.target}}
	task.state.cmd = &command{access: AccessWrite}
	task.state.aborts = 3
	edit := task.checkedEdit(func(now *luState) (*luState, error) { edits++; return now, nil })
	for _, c := range []struct {
		name  string
		state *luState
		want  error
	}{
		{"as it was", &luState{aborts: 3}, nil},
		{"reset since", &luState{aborts: 4}, ErrBusy},
		{"reserved since", &luState{aborts: 3, legacy: &legacyReserve{port: portA}}, ErrReserved},
		{"persistently", &luState{aborts: 3, pr: registeredState(writeExclusive).pr}, ErrReserved},
		{"registered", &luState{aborts: 3, pr: registeredState(writeExclusiveAll).pr}, nil},
	} {
		edits = 0
		_, err := edit(c.state)
		if !errors.Is(err, c.want) || (edits == 1) != (c.want == nil) {
			t.Errorf("%s: %v, %d edits", c.name, err, edits)
		}
	}
	task.Aborted.Store(true)
	if _, err := edit(&luState{aborts: 3}); !errors.Is(err, ErrBusy) {
		t.Errorf("aborted: %v", err)
	}
}

// What is no state is refused, and says what is wrong.
func TestUnreadableSections(t *testing.T) {
	header := func(kind byte, holder, names, count uint16, rest ...byte) []byte {
		b := []byte{0, 0, 0, 1, 0, kind, byte(holder >> 8), byte(holder), byte(names >> 8), byte(names), byte(count >> 8), byte(count)}
		return append(b, rest...)
	}
	one := append([]byte{1, 'a'}, make([]byte, registrationBytes)...)
	two := append(append([]byte{1, 'a'}, make([]byte, registrationBytes)...), make([]byte, registrationBytes)...)
	for _, c := range []struct {
		want string
		tag  byte
		body []byte
	}{
		{"cut short", sectionReserve, make([]byte, 11)},
		{"unknown type", sectionReserve, header(2, noHolder, 0, 0)},
		{"too many", sectionReserve, header(0, noHolder, 2, 1)},
		{"too many", sectionReserve, header(0, noHolder, 0, maxRegistrations+1)},
		{"name cut short", sectionReserve, header(0, noHolder, 1, 1, 5, 'a')},
		{"registrations cut short", sectionReserve, header(0, noHolder, 1, 1, one[:15]...)},
		{"no such name", sectionReserve, header(0, noHolder, 0, 1, one[2:]...)},
		{"one port twice", sectionReserve, header(0, noHolder, 1, 2, two...)},
		{"holder", sectionReserve, header(7, noHolder, 0, 0)},
		{"holder", sectionReserve, header(8, 0, 1, 1, one...)},
		{"no such holder", sectionReserve, header(1, 1, 1, 1, one...)},
		{"no such holder", sectionReserve, header(1, noHolder, 1, 1, one...)},
		{"reserve cut short", sectionLegacy, make([]byte, 15)},
		{"port cut short", sectionLegacy, make([]byte, 20)},
		{"tail", sectionLegacy, make([]byte, 26)},
		{"timestamp", sectionTimestamp, make([]byte, 7)},
		{"count", sectionAborts, make([]byte, 5)},
	} {
		b := append([]byte{stateVersion, c.tag, byte(len(c.body) >> 8), byte(len(c.body))}, c.body...)
		_, err := decodeState(StateID{}, b)
		if !errors.Is(err, errState) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("section %d, %s: %v", c.tag, c.want, err)
		}
	}
	st, err := decodeState(StateID{}, append([]byte{stateVersion, sectionReserve, 0, byte(12 + len(one))}, header(1, 0, 1, 1, one...)...))
	if err != nil || st.pr.holder.initiator != "a" {
		t.Errorf("%+v, %v", st, err)
	}
}
