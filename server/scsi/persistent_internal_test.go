package scsi

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// Ports of two nodes: targets 1 and 128.
var (
	portA  = portID{"iqn.a", [6]byte{1}, 1}
	portA2 = portID{"iqn.a", [6]byte{1}, 128}
	portB  = portID{"iqn.b", [6]byte{2}, 1}
	portC  = portID{"iqn.c", [6]byte{3}, 128}
	both   = []uint16{1, 128}
)

var allKinds = []reserveKind{writeExclusive, exclusiveAccess, writeExclusiveRegistrants, exclusiveRegistrants, writeExclusiveAll, exclusiveAll}

// outcome is how reserveOut ended: nil, or an error by its sense.
func outcome(err error) string {
	var r *refusal
	switch {
	case err == nil:
		return "good"
	case errors.Is(err, ErrReserved):
		return "conflict"
	case errors.As(err, &r):
		return fmt.Sprintf("%02x/%02x/%02x", r.sense.Key, r.sense.ASC, r.sense.ASCQ)
	default:
		return err.Error()
	}
}

// show writes registrations as "A=1 B=2", the holder with a star, the type first.
func (st *luState) show() string {
	var b strings.Builder
	fmt.Fprintf(&b, "type%d", st.pr.kind)
	for _, r := range st.pr.registrations {
		name := strings.ToUpper(strings.TrimPrefix(r.port.initiator, "iqn."))
		if r.port.target == 128 && name == "A" {
			name = "A'"
		}
		star := ""
		if st.pr.kind != 0 && !st.pr.kind.heldByAll() && st.pr.holder == r.port {
			star = "*"
		}
		if r.allPorts {
			star += "+"
		}
		fmt.Fprintf(&b, " %s%s=%d", name, star, r.key)
	}
	return b.String()
}

// registeredState is a state with A=1, B=2, C=3 and a reservation of A.
func registeredState(kind reserveKind) *luState {
	st := &luState{}
	st.pr.registrations = []registration{{portA, 1, false}, {portB, 2, false}, {portC, 3, false}}
	st.pr.generation = 3
	if kind != 0 {
		st.pr.hold(kind, portA)
	}
	return st
}

func TestReserveOutRules(t *testing.T) {
	none := registeredState(0)
	we := registeredState(writeExclusive)
	weRO := registeredState(writeExclusiveRegistrants)
	weAR := registeredState(writeExclusiveAll)
	eaAR := registeredState(exclusiveAll)
	shared := registeredState(writeExclusiveRegistrants) // A and B have one key
	shared.pr.registrations[1].key = 1
	to := func(p portID) []portName { return []portName{{p.initiator, p.isid}} }
	portD := portID{"iqn.d", [6]byte{4}, 1}
	const ok, conflict, field = "good", "conflict", "05/26/00"
	for _, c := range []struct {
		name string
		from *luState
		by   portID
		out  reserveOut
		want string
		show string // "" for no change
		gen  uint32 // how much PRgeneration grew
		kind eventKind
	}{
		{"register", &luState{}, portA, reserveOut{serviceKey: 7}, ok, "type0 A=7", 1, eventOther},
		{"register, key not 0", &luState{}, portA, reserveOut{key: 1, serviceKey: 7}, conflict, "", 0, 0},
		{"register nothing", &luState{}, portA, reserveOut{}, ok, "", 0, 0},
		{"register all ports", &luState{}, portA, reserveOut{serviceKey: 7, allPorts: true}, ok, "type0 A+=7 A'+=7", 1, eventOther},
		{"register others", &luState{}, portA, reserveOut{serviceKey: 7, named: true, initiators: append(to(portB), to(portA)...)}, ok, "type0 A=7 B=7", 1, eventOther},
		{"register others that are", none, portD, reserveOut{serviceKey: 7, named: true, initiators: to(portB)}, ok, "type0 A=1 B=2 C=3 D=7", 1, eventOther},
		{"register others, being registered", none, portA, reserveOut{key: 1, serviceKey: 7, named: true, initiators: to(portB)}, field, "", 0, 0},
		{"change key", we, portA, reserveOut{key: 1, serviceKey: 7}, ok, "type1 A*=7 B=2 C=3", 1, eventOther},
		{"change key, wrong", we, portA, reserveOut{key: 2, serviceKey: 7}, conflict, "", 0, 0},
		{"unregister", we, portB, reserveOut{key: 2}, ok, "type1 A*=1 C=3", 1, eventOther},
		{"unregister, wrong key", we, portB, reserveOut{key: 1}, conflict, "", 0, 0},
		{"unregister holder", we, portA, reserveOut{key: 1}, ok, "type0 B=2 C=3", 1, eventReleased},
		{"unregister holder RO", weRO, portA, reserveOut{key: 1}, ok, "type0 B=2 C=3", 1, eventReleased},
		{"unregister registrant RO", weRO, portB, reserveOut{key: 2}, ok, "type5 A*=1 C=3", 1, eventOther},
		{"unregister AR", weAR, portA, reserveOut{key: 1}, ok, "type7 B=2 C=3", 1, eventOther},
		{"ignore, new", we, portD, reserveOut{action: prRegisterAndIgnore, key: 99, serviceKey: 7}, ok, "type1 A*=1 B=2 C=3 D=7", 1, eventOther},
		{"ignore, change", we, portA, reserveOut{action: prRegisterAndIgnore, key: 99, serviceKey: 7}, ok, "type1 A*=7 B=2 C=3", 1, eventOther},
		{"ignore, unregister", we, portA, reserveOut{action: prRegisterAndIgnore, key: 99}, ok, "type0 B=2 C=3", 1, eventReleased},
		{"ignore, nothing", we, portD, reserveOut{action: prRegisterAndIgnore, key: 99}, ok, "", 0, 0},

		{"reserve unregistered", none, portD, reserveOut{action: prReserve, kind: writeExclusive}, conflict, "", 0, 0},
		{"reserve wrong key", none, portA, reserveOut{action: prReserve, key: 2, kind: writeExclusive}, conflict, "", 0, 0},
		{"reserve", none, portA, reserveOut{action: prReserve, key: 1, kind: exclusiveAccess}, ok, "type3 A*=1 B=2 C=3", 0, eventOther},
		{"reserve AR", none, portA, reserveOut{action: prReserve, key: 1, kind: exclusiveAll}, ok, "type8 A=1 B=2 C=3", 0, eventOther},
		{"reserve again", we, portA, reserveOut{action: prReserve, key: 1, kind: writeExclusive}, ok, "", 0, 0},
		{"reserve other type", we, portA, reserveOut{action: prReserve, key: 1, kind: exclusiveAccess}, conflict, "", 0, 0},
		{"reserve held", we, portB, reserveOut{action: prReserve, key: 2, kind: writeExclusive}, conflict, "", 0, 0},
		{"reserve held RO", weRO, portB, reserveOut{action: prReserve, key: 2, kind: writeExclusiveRegistrants}, conflict, "", 0, 0},
		{"reserve AR again", weAR, portB, reserveOut{action: prReserve, key: 2, kind: writeExclusiveAll}, ok, "", 0, 0},

		{"release unregistered", we, portD, reserveOut{action: prRelease, kind: writeExclusive}, conflict, "", 0, 0},
		{"release wrong key", we, portA, reserveOut{action: prRelease, key: 2, kind: writeExclusive}, conflict, "", 0, 0},
		{"release none", none, portA, reserveOut{action: prRelease, key: 1, kind: writeExclusive}, ok, "", 0, 0},
		{"release not holder", we, portB, reserveOut{action: prRelease, key: 2, kind: writeExclusive}, ok, "", 0, 0},
		{"release other type", we, portA, reserveOut{action: prRelease, key: 1, kind: exclusiveAccess}, "05/26/04", "", 0, 0},
		{"release", we, portA, reserveOut{action: prRelease, key: 1, kind: writeExclusive}, ok, "type0 A=1 B=2 C=3", 0, eventReleased},
		{"release AR", eaAR, portC, reserveOut{action: prRelease, key: 3, kind: exclusiveAll}, ok, "type0 A=1 B=2 C=3", 0, eventReleased},

		{"clear", we, portB, reserveOut{action: prClear, key: 2}, ok, "type0", 1, eventCleared},
		{"clear wrong key", we, portB, reserveOut{action: prClear, key: 1}, conflict, "", 0, 0},
		{"clear unregistered", we, portD, reserveOut{action: prClear}, conflict, "", 0, 0},

		{"preempt holder", we, portB, reserveOut{action: prPreempt, key: 2, serviceKey: 1, kind: exclusiveAccess}, ok, "type3 B*=2 C=3", 1, eventPreempted},
		{"preempt holder with others of its key", shared, portC, reserveOut{action: prPreempt, key: 3, serviceKey: 1, kind: writeExclusiveRegistrants}, ok, "type5 C*=3", 1, eventPreempted},
		{"preempt holder with own key", shared, portB, reserveOut{action: prPreempt, key: 1, serviceKey: 1, kind: writeExclusiveRegistrants}, ok, "type5 B*=1 C=3", 1, eventPreempted},
		{"preempt itself", we, portA, reserveOut{action: prPreempt, key: 1, serviceKey: 1, kind: exclusiveAll}, ok, "type8 A=1 B=2 C=3", 1, eventPreempted},
		{"preempt registration", we, portA, reserveOut{action: prPreempt, key: 1, serviceKey: 3, kind: exclusiveAccess}, ok, "type1 A*=1 B=2", 1, eventPreempted},
		{"preempt registration by another", we, portB, reserveOut{action: prPreempt, key: 2, serviceKey: 3, kind: exclusiveAccess}, ok, "type1 A*=1 B=2", 1, eventPreempted},
		{"preempt without reservation", none, portB, reserveOut{action: prPreempt, key: 2, serviceKey: 1, kind: exclusiveAccess}, ok, "type0 B=2 C=3", 1, eventPreempted},
		{"preempt nobody", we, portA, reserveOut{action: prPreempt, key: 1, serviceKey: 9, kind: writeExclusive}, conflict, "", 0, 0},
		{"preempt key 0", we, portA, reserveOut{action: prPreempt, key: 1, kind: writeExclusive}, field, "", 0, 0},
		{"preempt key 0, none", none, portA, reserveOut{action: prPreempt, key: 1, kind: writeExclusive}, field, "", 0, 0},
		{"preempt AR key 0", weAR, portB, reserveOut{action: prPreempt, key: 2, kind: exclusiveAccess}, ok, "type3 B*=2", 1, eventPreempted},
		{"preempt AR key", weAR, portB, reserveOut{action: prPreempt, key: 2, serviceKey: 1, kind: exclusiveAccess}, ok, "type7 B=2 C=3", 1, eventPreempted},
		{"preempt AR nobody", weAR, portB, reserveOut{action: prPreempt, key: 2, serviceKey: 9, kind: exclusiveAccess}, conflict, "", 0, 0},
		{"preempt unregistered", we, portD, reserveOut{action: prPreempt, serviceKey: 1, kind: writeExclusive}, conflict, "", 0, 0},
		{"preempt wrong key", we, portB, reserveOut{action: prPreempt, key: 1, serviceKey: 1, kind: writeExclusive}, conflict, "", 0, 0},
		{"preempt and abort", we, portB, reserveOut{action: prPreemptAbort, key: 2, serviceKey: 1, kind: writeExclusive}, ok, "type1 B*=2 C=3", 1, eventPreemptAborted},

		{"move", we, portA, reserveOut{action: prRegisterAndMove, key: 1, serviceKey: 7, target: 1, initiators: to(portD)}, ok, "type1 A=1 B=2 C=3 D*=7", 1, eventOther},
		{"move and unregister", weRO, portA, reserveOut{action: prRegisterAndMove, key: 1, serviceKey: 7, target: 1, initiators: to(portD), unregister: true}, ok, "type5 B=2 C=3 D*=7", 1, eventOther},
		{"move to a registered one", we, portA, reserveOut{action: prRegisterAndMove, key: 1, serviceKey: 7, target: 128, initiators: to(portC)}, ok, "type1 A=1 B=2 C*=7", 1, eventOther},
		{"move, not holder", we, portB, reserveOut{action: prRegisterAndMove, key: 2, serviceKey: 7, target: 1, initiators: to(portD)}, conflict, "", 0, 0},
		{"move, none", none, portA, reserveOut{action: prRegisterAndMove, key: 1, serviceKey: 7, target: 1, initiators: to(portD)}, conflict, "", 0, 0},
		{"move AR", weAR, portA, reserveOut{action: prRegisterAndMove, key: 1, serviceKey: 7, target: 1, initiators: to(portD)}, conflict, "", 0, 0},
		{"move wrong key", we, portA, reserveOut{action: prRegisterAndMove, key: 2, serviceKey: 7, target: 1, initiators: to(portD)}, conflict, "", 0, 0},
		{"move to itself", we, portA, reserveOut{action: prRegisterAndMove, key: 1, serviceKey: 7, target: 128, initiators: to(portA)}, field, "", 0, 0},
		{"move, no such port", we, portA, reserveOut{action: prRegisterAndMove, key: 1, serviceKey: 7, target: 5, initiators: to(portD)}, field, "", 0, 0},
		{"move, key 0", we, portA, reserveOut{action: prRegisterAndMove, key: 1, target: 1, initiators: to(portD)}, field, "", 0, 0},
	} {
		before := c.from.show()
		next, err := c.from.reserveOut(&c.out, c.by, both)
		if got := outcome(err); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
			continue
		}
		if c.from.show() != before {
			t.Errorf("%s: the old state was changed", c.name)
		}
		if (next == nil) != (c.show == "") {
			t.Errorf("%s: changed %v", c.name, next != nil)
			continue
		}
		if next == nil {
			continue
		}
		if next.show() != c.show || next.pr.generation-c.from.pr.generation != c.gen || next.event != (stateEvent{c.kind, c.by}) {
			t.Errorf("%s: %s, generation +%d, event %d, want %s", c.name, next.show(), next.pr.generation-c.from.pr.generation, next.event.kind, c.show)
		}
	}
}

// What is left of an ALL_TG_PT registration is not one any more.
func TestUnregisterOneOfAllPorts(t *testing.T) {
	st, _ := (&luState{}).reserveOut(&reserveOut{serviceKey: 7, allPorts: true, powerLoss: true}, portA, both)
	if !st.pr.powerLoss {
		t.Error("APTPL is lost")
	}
	st, err := st.reserveOut(&reserveOut{key: 7}, portA2, both)
	if err != nil || st.show() != "type0 A=7" || st.pr.powerLoss {
		t.Errorf("%s, %v", st.show(), err)
	}
}

func TestRegistrationsAreBounded(t *testing.T) {
	fill := func(name func(int) string) int {
		st := &luState{}
		for i := range maxRegistrations + 1 {
			next, err := st.reserveOut(&reserveOut{serviceKey: 1}, portID{name(i), [6]byte{byte(i >> 8), byte(i)}, 1}, both)
			if err != nil {
				if got := outcome(err); got != "05/55/04" {
					t.Fatal(got)
				}
				if n := len(st.encode(nil)); n > stateBytesMax {
					t.Errorf("%d bytes", n)
				}
				return i
			}
			st = next
		}
		return -1
	}
	long := strings.Repeat("n", iscsiNameMax)
	if got := fill(func(int) string { return long }); got != maxRegistrations {
		t.Errorf("%d registrations of one name", got)
	}
	if got := fill(func(i int) string { return fmt.Sprintf("%0223d", i) }); got < 180 || got >= maxRegistrations {
		t.Errorf("%d registrations of long names", got)
	}
	if got := fill(func(i int) string { return fmt.Sprintf("iqn.2026-11.com.example:a-usual-name-%d", i) }); got != maxRegistrations {
		t.Errorf("%d registrations of usual names", got)
	}
}

// What a reservation leaves to its holder, to registrants and to strangers.
func TestGrants(t *testing.T) {
	stranger := portID{"iqn.z", [6]byte{9}, 1}
	for _, kind := range allKinds {
		st := registeredState(kind)
		for _, c := range []struct {
			port                  portID
			registrant, holder    bool
			deniesRead, deniesAny bool
		}{{portA, true, true, false, false}, {portB, true, false, false, false}, {stranger, false, false, false, false}} {
			g := st.grantTo(c.port)
			free := c.holder || kind.forRegistrants() && c.registrant
			if g.denies(AccessWrite) == free || g.denies(AccessRead) != (!free && kind.exclusive()) || g.denies(AccessAny) || g.denies(AccessAlways) {
				t.Errorf("type %d, port %v: denied %04b", kind, c.port, g.denied)
			}
		}
	}
	st := &luState{legacy: &legacyReserve{port: portA}}
	if g := st.grantTo(portA); g.denied != 0 {
		t.Errorf("the holder: %04b", g.denied)
	}
	if g := st.grantTo(portA2); g.denied != 1<<AccessAny|1<<AccessRead|1<<AccessWrite {
		t.Errorf("others: %04b", g.denied)
	}
}

// Random commands keep the invariants of persistent, agree with a plain model of
// who may do what, and survive the codec.
func TestReserveOutModel(t *testing.T) {
	ports := []portID{portA, portA2, portB, portC, {"iqn.d", [6]byte{4}, 1}}
	rapid.Check(t, func(t *rapid.T) {
		st := &luState{}
		model := map[portID]uint64{}
		kind, holder := reserveNone, portID{}
		for range rapid.IntRange(1, 40).Draw(t, "commands") {
			by := rapid.SampledFrom(ports).Draw(t, "by")
			c := reserveOut{
				action:     byte(rapid.IntRange(0, 7).Draw(t, "action")),
				kind:       rapid.SampledFrom(allKinds).Draw(t, "kind"),
				key:        uint64(rapid.IntRange(0, 3).Draw(t, "key")),
				serviceKey: uint64(rapid.IntRange(0, 3).Draw(t, "service key")),
				allPorts:   rapid.Bool().Draw(t, "all ports"),
				unregister: rapid.Bool().Draw(t, "unregister"),
				target:     rapid.SampledFrom([]uint16{1, 128, 7}).Draw(t, "target"),
			}
			if c.action == prRegisterAndMove {
				p := rapid.SampledFrom(ports).Draw(t, "to")
				c.initiators = []portName{{p.initiator, p.isid}}
			}
			if rapid.Bool().Draw(t, "right key") {
				c.key = model[by]
			}
			before := st.encode(nil)
			next, err := st.reserveOut(&c, by, both)
			if !bytes.Equal(before, st.encode(nil)) {
				t.Fatal("the old state was changed")
			}
			if err != nil || next == nil {
				continue
			}
			// The model: what a command that succeeded must have done.
			own := model[by]
			switch c.action {
			case prRegister, prRegisterAndIgnore:
				if c.action == prRegister && own != c.key {
					t.Fatal("a wrong key registered")
				}
				if c.serviceKey == 0 {
					delete(model, by)
					if kind.heldByAll() && len(model) == 0 || !kind.heldByAll() && holder == by {
						kind, holder = reserveNone, portID{}
					}
					break
				}
				model[by] = c.serviceKey
				if c.allPorts {
					for _, target := range both {
						model[portID{by.initiator, by.isid, target}] = c.serviceKey
					}
				}
			case prReserve:
				kind, holder = c.kind, by
			case prRelease:
				kind, holder = reserveNone, portID{}
			case prClear:
				clear(model)
				kind, holder = reserveNone, portID{}
			case prPreempt, prPreemptAbort:
				takes := kind.heldByAll() && c.serviceKey == 0 || kind != reserveNone && !kind.heldByAll() && model[holder] == c.serviceKey
				for p, k := range model {
					if p != by && (k == c.serviceKey || kind.heldByAll() && c.serviceKey == 0) {
						delete(model, p)
					}
				}
				if takes {
					kind, holder = c.kind, by
				}
			case prRegisterAndMove:
				to := portID{c.initiators[0].initiator, c.initiators[0].isid, c.target}
				model[to] = c.serviceKey
				holder = to
				if c.unregister {
					delete(model, by)
				}
			}
			if c.action != prRegister && c.action != prRegisterAndIgnore && (own == 0 || own != c.key) {
				t.Fatal("succeeded without the key")
			}
			st = next
			got := map[portID]uint64{}
			for _, r := range st.pr.registrations {
				got[r.port] = r.key
			}
			if !reflect.DeepEqual(got, model) || st.pr.kind != kind {
				t.Fatalf("%v type %d, want %v type %d", got, st.pr.kind, model, kind)
			}
			for _, p := range ports {
				want := kind != reserveNone && (!kind.heldByAll() && holder == p || kind.heldByAll() && model[p] != 0)
				if st.pr.holds(p) != want {
					t.Fatalf("%v holds %v", p, st.pr.holds(p))
				}
			}
			again, err := decodeState(st.id, st.encode(nil))
			if err != nil || !bytes.Equal(again.encode(nil), st.encode(nil)) || again.show() != st.show() {
				t.Fatalf("codec: %v", err)
			}
		}
	})
}

func TestTransportIDs(t *testing.T) {
	p := portName{"iqn.2026-11.test:host", [6]byte{0x80, 0x12, 0x34, 0x56, 0x00, 0x0a}}
	b := appendTransportID(nil, p)
	want := "\x45\x00\x00\x28iqn.2026-11.test:host,i,0x80123456000a\x00"
	if !bytes.HasPrefix(b, []byte(want)) || len(b) != 4+40 {
		t.Fatalf("%q", b)
	}
	id, rest, ok := cutTransportID(append(b, 9))
	if !ok || id.device || id.portName != p || len(rest) != 1 {
		t.Fatalf("%+v %v", id, ok)
	}
	short := "\x45\x00\x00\x14IQN.a:bcdefgh,i,0xAb\x00\x00\x00"
	short = short[:3] + string(rune(len(short)-4+1)) + short[4:] + "\x00"
	if id, _, ok := cutTransportID([]byte(short)); !ok || id.initiator != "iqn.a:bcdefgh" || id.isid != [6]byte{5: 0xab} {
		t.Errorf("%+v %v", id, ok)
	}
	for name, bad := range map[string]string{
		"empty":       "",
		"protocol":    "\x46\x00\x00\x14iqn.a:bcd,i,0x012345",
		"format":      "\x85\x00\x00\x14iqn.a:bcdefghijklmno\x00",
		"length 16":   "\x05\x00\x00\x10iqn.a:bcdefghij\x00",
		"length 21":   "\x05\x00\x00\x15iqn.a:bcdefghijklmnop\x00",
		"cut":         "\x05\x00\x00\x18iqn.a:bcdefghijklm\x00",
		"no NUL":      "\x05\x00\x00\x14iqn.a:bcdefghijklmno",
		"after NUL":   "\x05\x00\x00\x14iqn.a:bcdefghijk\x00x\x00\x00",
		"no ISID":     "\x45\x00\x00\x14iqn.a:bcdefghijklmn\x00",
		"ISID digits": "\x45\x00\x00\x14iqn.a:bcd,i,0x01zz\x00\x00",
		"ISID long":   "\x45\x00\x00\x18i,i,0x0123456789abc\x00\x00\x00\x00\x00",
		"ISID empty":  "\x45\x00\x00\x14iqn.a:bcdefgh,i,0x\x00\x00",
		"no name":     "\x45\x00\x00\x14,i,0x0123456789ab\x00\x00\x00",
		"long name":   "\x05\x00\x00\xe4" + strings.Repeat("n", 225) + "\x00\x00\x00",
	} {
		if _, _, ok := cutTransportID([]byte(bad)); ok {
			t.Errorf("%s: accepted", name)
		}
	}
	if id, _, ok := cutTransportID([]byte("\x05\x00\x00\x14iqn.a:bcdefghijklmn\x00")); !ok || !id.device {
		t.Errorf("a device: %+v %v", id, ok)
	}
}

func FuzzTransportID(f *testing.F) {
	f.Add(appendTransportID(nil, portName{"iqn.a", [6]byte{1}}))
	f.Add([]byte("\x05\x00\x00\x14iqn.a:bcdefghijklmn\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, rest, ok := cutTransportID(b)
		if !ok {
			return
		}
		if len(rest) >= len(b) || id.initiator == "" || len(id.initiator) > iscsiNameMax {
			t.Fatalf("%+v, %d of %d bytes left", id, len(rest), len(b))
		}
		if id.device {
			return
		}
		again, rest, ok := cutTransportID(appendTransportID(nil, id.portName))
		if !ok || again != id || len(rest) != 0 {
			t.Fatalf("%+v, %+v", id, again)
		}
	})
}

func FuzzReserveOutList(f *testing.F) {
	list := make([]byte, 24)
	list[15] = 7
	f.Add(byte(prRegister), list)
	spec := append(bytes.Clone(list), 0, 0, 0, 0)
	spec[20] = prSpecified
	id := appendTransportID(nil, portName{"iqn.b", [6]byte{1}})
	spec[27] = byte(len(id))
	f.Add(byte(prRegister), append(spec, id...))
	move := bytes.Clone(list)
	move[19], move[23] = 1, byte(len(id))
	f.Add(byte(prRegisterAndMove), append(move, id...))
	f.Fuzz(func(t *testing.T, action byte, list []byte) {
		if len(list) < prListBytes {
			return
		}
		known := func(string) []portName { return []portName{{"iqn.known", [6]byte{1}}} }
		c, sense := parseReserveOut(action%8, writeExclusive, list, known)
		if (c == nil) == (sense == nil) {
			t.Fatal("neither a command nor a refusal")
		}
		if sense != nil {
			if sense.Key != cdb.IllegalRequest || sense.ASC != 0x1a && sense.ASC != 0x26 {
				t.Fatalf("%+v", sense)
			}
			return
		}
		if len(c.initiators) > len(list)/24 {
			t.Fatalf("%d initiators in %d bytes", len(c.initiators), len(list))
		}
		for _, st := range []*luState{{}, registeredState(writeExclusive), registeredState(exclusiveAll)} {
			before := st.encode(nil)
			next, err := st.reserveOut(c, portA, both)
			if !bytes.Equal(before, st.encode(nil)) {
				t.Fatal("the state was changed in place")
			}
			if err != nil || next == nil {
				continue
			}
			if _, err := decodeState(StateID{}, next.encode(nil)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func fullState() *luState {
	st := registeredState(exclusiveRegistrants)
	st.event = stateEvent{eventPreempted, portB}
	st.pr.registrations[2].allPorts = true
	st.pr.powerLoss = true
	st.legacy = &legacyReserve{port: portC, after: StateID{Epoch: 5, Seq: 6}}
	st.protected = true
	st.identity = []byte("disk of the accounts")
	st.clock = &clockSetting{-12345}
	st.aborts = 9
	st.unknown = []section{{200, []byte{1, 2, 3}}}
	return st
}

func TestStateRoundTrip(t *testing.T) {
	for _, st := range []*luState{{}, fullState(), registeredState(writeExclusiveAll)} {
		got, err := decodeState(st.id, st.encode(nil))
		if err != nil || !reflect.DeepEqual(got, st) {
			t.Errorf("%+v, %+v, %v", got, st, err)
		}
	}
}

func FuzzState(f *testing.F) {
	f.Add(fullState().encode(nil))
	f.Add(registeredState(writeExclusiveAll).encode(nil))
	f.Add([]byte{stateVersion, sectionReserve, 0, 12, 0, 0, 0, 1, 1, 0, 0xff, 0xff, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		st, err := decodeState(StateID{}, b)
		if err != nil {
			return
		}
		once := st.encode(nil)
		again, err := decodeState(StateID{}, once)
		if err != nil || !bytes.Equal(again.encode(nil), once) || len(once) > len(b)+1 {
			t.Fatalf("%x: %x, %v", b, once, err)
		}
		st.grantTo(portA)
	})
}
