package initiator

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"strings"
)

// Key is one pair of a text or login, in the order in which it is sent.
type Key struct{ Name, Value string }

// DefaultKeys are the operational keys of an ordinary host.
func DefaultKeys() []Key {
	return []Key{
		{"HeaderDigest", "None"}, {"DataDigest", "None"},
		{"InitialR2T", "No"}, {"ImmediateData", "Yes"},
		{"MaxRecvDataSegmentLength", "262144"}, {"MaxBurstLength", "1048576"}, {"FirstBurstLength", "262144"},
		{"MaxOutstandingR2T", "4"}, {"MaxConnections", "1"}, {"ErrorRecoveryLevel", "0"},
		{"DefaultTime2Wait", "2"}, {"DefaultTime2Retain", "20"},
		{"DataPDUInOrder", "Yes"}, {"DataSequenceInOrder", "Yes"},
	}
}

// WithKeys gives the default keys with some of them changed or added; an empty
// value takes a key out.
func WithKeys(changes ...Key) []Key {
	keys := DefaultKeys()
next:
	for _, c := range changes {
		for i, k := range keys {
			if k.Name == c.Name {
				if keys[i].Value = c.Value; c.Value == "" {
					keys = append(keys[:i], keys[i+1:]...)
				}
				continue next
			}
		}
		keys = append(keys, c)
	}
	return keys
}

// Params is what a login agreed on.
type Params struct {
	TSIH    uint16
	Answers map[string]string // everything that the target said, the last word on each

	HeaderDigest, DataDigest  bool
	InitialR2T, ImmediateData bool
	MaxBurstLength            int
	FirstBurstLength          int
	MaxOutstandingR2T         int
	SendLimit                 int // the target's MaxRecvDataSegmentLength
	ReceiveLimit              int // ours
}

// LoginError is a login response with a status other than success.
type LoginError struct {
	Class, Detail byte
	Answers       map[string]string // TargetAddress of a redirection
}

func (e *LoginError) Error() string {
	return fmt.Sprintf("login refused with status %02x%02x", e.Class, e.Detail)
}

// loginRounds bounds a login that does not come to an end.
const loginRounds = 32

type login struct {
	c       *Conn
	answers map[string]string
	stage   int // the stage that the target has agreed to be in
	rounds  int
}

// Login goes through the login phase of a connection that Open made, and starts
// the full feature phase.
func (c *Conn) Login(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { c.nc.Close() })
	defer stop()
	if err := c.login(); err != nil {
		c.nc.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("login to %s: %w", c.cfg.Addr, err)
	}
	c.startFullFeature()
	return nil
}

func (c *Conn) login() error {
	l := &login{c: c, answers: map[string]string{}}
	names := []Key{{"InitiatorName", c.cfg.InitiatorName}}
	if c.cfg.TargetName == "" {
		names = append(names, Key{"SessionType", "Discovery"})
	} else {
		names = append(names, Key{"SessionType", "Normal"}, Key{"TargetName", c.cfg.TargetName})
	}
	names = append(names, c.cfg.SecurityKeys...)
	operational := c.cfg.Keys
	if operational == nil {
		operational = DefaultKeys()
		if c.cfg.TargetName == "" { // the others are irrelevant in a discovery session
			operational = []Key{{"HeaderDigest", "None"}, {"DataDigest", "None"}, {"MaxRecvDataSegmentLength", "262144"}}
		}
	}
	if c.cfg.SkipSecurity {
		operational = append(names, operational...)
	} else {
		method := "None"
		if c.cfg.CHAP != nil {
			method = "CHAP"
		}
		answer, err := l.exchange(0, 1, method == "None", append(names, Key{"AuthMethod", method}))
		if err != nil {
			return err
		}
		if got := answer["AuthMethod"]; got != method {
			return violation("12.1", "AuthMethod=%s is answered %q", method, got)
		}
		if c.cfg.CHAP != nil {
			if err := c.authenticate(l); err != nil {
				return err
			}
		}
		for l.stage == 0 {
			if _, err := l.exchange(0, 1, true, nil); err != nil {
				return err
			}
		}
	}
	if l.stage != 3 {
		if _, err := l.exchange(1, 3, true, operational); err != nil {
			return err
		}
	}
	for l.stage != 3 {
		if _, err := l.exchange(1, 3, true, nil); err != nil {
			return err
		}
	}
	return c.settle(l.answers, operational)
}

// exchange sends keys in one stage and collects the whole answer, asking for the
// next stage with transit. It follows the C bit both ways.
func (l *login) exchange(csg, nsg byte, transit bool, keys []Key) (map[string]string, error) {
	text := encodeKeys(keys)
	for {
		part := text
		if n := l.c.cfg.LoginSegment; n > 0 && len(part) > n {
			part = part[:n]
		}
		text = text[len(part):]
		more := len(text) > 0
		p, err := l.roundTrip(csg, nsg, transit && !more, more, part)
		if err != nil {
			return nil, err
		}
		if more {
			if len(p.Data) > 0 || p.BHS[1]&(final|cont) != 0 {
				return nil, violation("6.2", "answer to a part of a text: %v", p)
			}
			continue
		}
		var answer []byte
		for {
			answer = append(answer, p.Data...)
			if p.BHS[1]&cont == 0 {
				break
			}
			if p.Final() {
				return nil, violation("11.13.2", "T and C set in %v", p)
			}
			if p, err = l.roundTrip(csg, nsg, false, false, nil); err != nil {
				return nil, err
			}
		}
		if got := int(p.BHS[1] >> 2 & 3); got != int(csg) {
			return nil, violation("11.13.3", "answer in stage %d to a request in stage %d", got, csg)
		}
		if p.Final() {
			if !transit {
				return nil, violation("11.13.1", "the target goes to the next stage unasked")
			}
			l.stage = int(p.BHS[1] & 3)
			if l.stage <= int(csg) || l.stage > int(nsg) || l.stage == 2 {
				return nil, violation("11.13.3", "next stage %d after %d, asked for %d", l.stage, csg, nsg)
			}
		}
		decoded, err := decodeKeys(answer)
		if err != nil {
			return nil, err
		}
		for k, v := range decoded {
			l.answers[k] = v
		}
		return decoded, nil
	}
}

func (l *login) roundTrip(csg, nsg byte, transit, more bool, text []byte) (*PDU, error) {
	if l.rounds++; l.rounds > loginRounds {
		return nil, fmt.Errorf("login does not end after %d exchanges", loginRounds)
	}
	p := l.c.loginRequest(csg, nsg, transit, more, text)
	r, err := l.c.Exchange(p)
	if err != nil {
		return nil, err
	}
	if r.Opcode() != OpLoginResponse || r.ITT() != p.ITT() {
		return nil, violation("6.3", "answer to a login request: %v", r)
	}
	if r.BHS[36] != 0 {
		answers, _ := decodeKeys(r.Data)
		return nil, &LoginError{Class: r.BHS[36], Detail: r.BHS[37], Answers: answers}
	}
	c := l.c
	if l.rounds > 1 && r.U32(24) != c.expStatSN {
		return nil, violation("11.13.4", "StatSN %d, expected %d", r.U32(24), c.expStatSN)
	}
	c.expStatSN = r.U32(24) + 1
	c.expCmdSN, c.maxCmdSN = r.U32(28), r.U32(32)
	if !bytes.Equal(r.BHS[8:14], c.cfg.ISID[:]) {
		return nil, violation("11.13.5", "ISID %x, sent %x", r.BHS[8:14], c.cfg.ISID)
	}
	tsih := r.U16(14)
	switch full := r.Final() && r.BHS[1]&3 == 3; {
	case full && tsih == 0:
		return nil, violation("11.13.5", "TSIH 0 in the last response")
	case !full && tsih != c.cfg.TSIH:
		return nil, violation("11.13.5", "TSIH %d before the last response", tsih)
	}
	c.params.TSIH = tsih
	return r, nil
}

// loginRequest makes a login request with the session's identity and numbers.
func (c *Conn) loginRequest(csg, nsg byte, transit, more bool, text []byte) *PDU {
	p := NewPDU(OpLogin|Immediate, c.loginITT)
	p.BHS[1] = csg << 2
	if transit {
		p.BHS[1] |= final | nsg
	}
	if more {
		p.BHS[1] |= cont
	}
	copy(p.BHS[8:], c.cfg.ISID[:])
	p.Put16(14, c.cfg.TSIH)
	p.Put16(20, c.cfg.CID)
	p.Put32(24, c.cmdSN)
	p.Put32(28, c.expStatSN)
	p.Data = text
	return p
}

// LoginRequest makes a login request to be changed and exchanged by hand.
func (c *Conn) LoginRequest(csg, nsg byte, transit bool, keys []Key) *PDU {
	return c.loginRequest(csg, nsg, transit, false, encodeKeys(keys))
}

// Exchange sends a PDU and reads one, before the full feature phase only.
func (c *Conn) Exchange(p *PDU) (*PDU, error) {
	if c.cfg.Outgoing != nil {
		c.cfg.Outgoing(p)
	}
	if !p.Drop {
		if _, err := c.nc.Write(p.appendTo(nil, false, false)); err != nil {
			return nil, err
		}
	}
	return readPDU(c.r, false, false, 1<<24)
}

func encodeKeys(keys []Key) []byte {
	var b []byte
	for _, k := range keys {
		b = append(b, k.Name...)
		b = append(b, '=')
		b = append(b, k.Value...)
		b = append(b, 0)
	}
	return b
}

func decodeKeys(b []byte) (map[string]string, error) {
	m := map[string]string{}
	for len(b) > 0 {
		pair, rest, ok := bytes.Cut(b, []byte{0})
		name, value, eq := strings.Cut(string(pair), "=")
		if !ok || !eq || name == "" || len(name) > 63 {
			return nil, violation("6.1", "text %q", b)
		}
		if old, twice := m[name]; twice && name != "TargetName" && name != "TargetAddress" {
			return nil, violation("6.2", "%s=%s and %s in one answer", name, old, value)
		}
		m[name] = value
		b = rest
	}
	return m, nil
}

// settle works out what was agreed, by the rules for each key of section 13.
func (c *Conn) settle(answers map[string]string, offers []Key) error {
	offered := map[string]string{}
	for _, k := range offers {
		offered[k.Name] = k.Value
	}
	number := func(name string, def int, combine func(...int) int) (int, error) {
		o, a := offered[name], answers[name]
		if o == "" && a == "" || a == "Irrelevant" || a == "Reject" {
			return def, nil
		}
		if a == "" {
			return 0, violation("6.2.2", "%s=%s has no answer", name, o)
		}
		got, err := strconv.ParseInt(a, 0, 64)
		if err != nil {
			return 0, violation("6.1", "%s=%s", name, a)
		}
		if want, err := strconv.ParseInt(o, 0, 64); err == nil && combine(int(got), int(want)) != int(got) {
			return 0, violation("13", "%s=%s is answered %s", name, o, a)
		}
		return int(got), nil
	}
	boolean := func(name string, def bool, or bool) (bool, error) {
		o, a := offered[name], answers[name]
		if o == "" && a == "" || a == "Irrelevant" {
			return def, nil
		}
		if a != "Yes" && a != "No" {
			return false, violation("6.2.2", "%s=%s is answered %q", name, o, a)
		}
		// With OR a Yes decides, with AND a No.
		if decided := o == "Yes" && or || o == "No" && !or; decided && a != o {
			return false, violation("13", "%s=%s is answered %s", name, o, a)
		}
		return a == "Yes", nil
	}
	list := func(name string) (bool, error) {
		o, a := offered[name], answers[name]
		if o == "" {
			return false, nil
		}
		for _, v := range strings.Split(o, ",") {
			if v == a {
				return a == "CRC32C", nil
			}
		}
		return false, violation("6.2.1", "%s=%s is answered %q", name, o, a)
	}
	least := func(v ...int) int { return min(v[0], v[1]) }
	p := &c.params
	p.Answers = answers
	var errs [8]error
	p.HeaderDigest, errs[0] = list("HeaderDigest")
	p.DataDigest, errs[1] = list("DataDigest")
	p.InitialR2T, errs[2] = boolean("InitialR2T", true, true)
	p.ImmediateData, errs[3] = boolean("ImmediateData", true, false)
	p.MaxBurstLength, errs[4] = number("MaxBurstLength", 262144, least)
	p.FirstBurstLength, errs[5] = number("FirstBurstLength", 65536, least)
	p.MaxOutstandingR2T, errs[6] = number("MaxOutstandingR2T", 1, least)
	// Declared, not negotiated: each side's own.
	p.SendLimit = 8192
	if a := answers["MaxRecvDataSegmentLength"]; a != "" {
		n, err := strconv.ParseInt(a, 0, 32)
		if err != nil || n < 512 {
			errs[7] = violation("13.12", "MaxRecvDataSegmentLength=%s", a)
		}
		p.SendLimit = int(n)
	}
	p.ReceiveLimit = 8192
	if n, err := strconv.ParseInt(offered["MaxRecvDataSegmentLength"], 0, 32); err == nil {
		p.ReceiveLimit = int(n)
	}
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	if answers["FirstBurstLength"] == "Irrelevant" || offered["FirstBurstLength"] == "" {
		p.FirstBurstLength = min(p.FirstBurstLength, p.MaxBurstLength)
	}
	if p.FirstBurstLength > p.MaxBurstLength {
		return violation("13.14", "FirstBurstLength %d above MaxBurstLength %d", p.FirstBurstLength, p.MaxBurstLength)
	}
	if c.cfg.TargetName != "" {
		if _, err := strconv.ParseUint(answers["TargetPortalGroupTag"], 0, 16); err != nil {
			return violation("13.9", "TargetPortalGroupTag=%q in a normal session", answers["TargetPortalGroupTag"])
		}
	}
	return nil
}
