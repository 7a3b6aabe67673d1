package iscsi

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

const (
	userSecret  = "initiator-secret"
	otherSecret = "our-own-secret-1"
)

// loginBench drives the login state machine without a socket.
type loginBench struct {
	*login
	dir *testDirectory
	cfg *loginConfig
}

func newLoginBench() *loginBench {
	limits := DefaultLimits()
	dir := &testDirectory{open: true}
	cfg := &loginConfig{target: testTarget, group: 7, limits: &limits, directory: dir, challenges: &challengeLedger{}, random: rand.Reader}
	return &loginBench{newLogin(cfg), dir, cfg}
}

func (b *loginBench) withCHAP() *loginBench {
	b.dir.open = false
	b.dir.access = map[string]Access{testInitiator: {User: "0xuser", Secret: userSecret, MutualUser: "target", MutualSecret: otherSecret}}
	return b
}

// send makes one step and returns the reply with its keys.
func (b *loginBench) send(csg, nsg uint8, transit bool, pairs ...string) (loginReply, map[string]string) {
	r := b.step(&pdu.LoginRequest{Transit: transit, CSG: csg, NSG: nsg, ITT: 1, CmdSN: 5}, text(pairs...))
	keys := make(map[string]string)
	got, err := pdu.ParseText(r.text, 1000)
	if err != nil {
		panic(err)
	}
	for _, p := range got {
		if _, twice := keys[p.Key]; twice {
			panic("key answered twice: " + p.Key)
		}
		keys[p.Key] = p.Value
	}
	return r, keys
}

var who = []string{"InitiatorName=" + testInitiator, "TargetName=" + testTarget}

func with(base []string, more ...string) []string { return append(slices.Clone(base), more...) }

// TestNegotiation is the table of keys: offer, answer, result.
func TestNegotiation(t *testing.T) {
	long := strings.Repeat("x", 300)
	tests := []struct {
		offer, answer string // answer "": none
	}{
		{"HeaderDigest=None,CRC32C", "None"},
		{"HeaderDigest=CRC32C,None", "CRC32C"},
		{"HeaderDigest=MD5,CRC32C", "CRC32C"},
		{"DataDigest=MD5", "Reject"},
		{"DataDigest=crc32c", "Reject"},
		{"MaxConnections=8", "1"},
		{"MaxConnections=0", "Reject"},
		{"InitialR2T=Yes", "Yes"},
		{"InitialR2T=No", "No"},
		{"InitialR2T=no", "Reject"},
		{"ImmediateData=Yes", "Yes"},
		{"ImmediateData=No", "No"},
		{"MaxBurstLength=16776192", "1048576"},
		{"MaxBurstLength=0x4000", "16384"},
		{"MaxBurstLength=511", "Reject"},
		{"MaxBurstLength=16777216", "Reject"},
		{"MaxBurstLength=", "Reject"},
		{"FirstBurstLength=65536", "65536"},
		{"FirstBurstLength=16777215", "262144"},
		{"MaxOutstandingR2T=64", "8"},
		{"MaxOutstandingR2T=1", "1"},
		{"DataPDUInOrder=No", "Yes"},
		{"DataSequenceInOrder=Yes", "Yes"},
		{"DefaultTime2Wait=0", "2"},
		{"DefaultTime2Wait=5", "5"},
		{"DefaultTime2Retain=0", "0"},
		{"DefaultTime2Retain=3600", "20"},
		{"DefaultTime2Retain=3601", "Reject"},
		{"ErrorRecoveryLevel=2", "0"},
		{"TaskReporting=FastAbort,RFC3720", "RFC3720"},
		{"TaskReporting=FastAbort", "Reject"},
		{"iSCSIProtocolLevel=2", "1"},
		{"IFMarker=Yes", "No"},
		{"OFMarker=No", "No"},
		{"IFMarkInt=2048~8192", "Reject"},
		{"OFMarkInt=2048", "Reject"},
		{"RDMAExtensions=Yes", "NotUnderstood"},
		{"X-com.example.key=1", "NotUnderstood"},
		{"maxburstlength=512", "NotUnderstood"},
		{"MaxRecvDataSegmentLength=8192", "262144"}, // our own declaration
		{"InitiatorAlias=me", ""},
		{"TargetAlias=NotUnderstood", ""},
		{"SomeKey=Reject", ""},
	}
	for _, tt := range tests {
		b := newLoginBench()
		r, keys := b.send(1, 3, true, with(who, tt.offer)...)
		key, _, _ := strings.Cut(tt.offer, "=")
		if r.failed() || !r.complete || keys[key] != tt.answer {
			t.Errorf("%s: status %04x, answer %q, want %q", tt.offer, r.response.Status, keys[key], tt.answer)
		}
	}
	for _, offer := range []string{"MaxRecvDataSegmentLength=511", "MaxRecvDataSegmentLength=x", "InitiatorAlias=" + long} {
		if r, _ := newLoginBench().send(1, 3, true, with(who, offer)...); r.response.Status != statusInitiatorError {
			t.Errorf("%s: status %04x", offer, r.response.Status)
		}
	}
}

// TestNegotiationResults checks keys that depend on each other, in any order.
func TestNegotiationResults(t *testing.T) {
	b := newLoginBench()
	r, keys := b.send(1, 3, true, with(who, "FirstBurstLength=262144", "MaxBurstLength=65536")...)
	if !r.complete || keys["FirstBurstLength"] != "65536" || b.params.firstBurst != 65536 {
		t.Errorf("first burst above burst: %v, %+v", keys, b.params)
	}
	if keys["TargetPortalGroupTag"] != "7" {
		t.Errorf("portal group tag %q", keys["TargetPortalGroupTag"])
	}
	b = newLoginBench()
	_, keys = b.send(1, 3, true, with(who, "FirstBurstLength=512", "InitialR2T=Yes", "ImmediateData=No")...)
	if keys["FirstBurstLength"] != "Irrelevant" {
		t.Errorf("first burst without unsolicited data: %v", keys)
	}
	b = newLoginBench()
	b.send(1, 3, true, who...)
	if want := defaultParameters(); b.params != want {
		t.Errorf("defaults: %+v, want %+v", b.params, want)
	}
	b = newLoginBench()
	b.send(1, 3, true, with(who, "MaxBurstLength=512")...)
	if b.params.firstBurst != 512 {
		t.Errorf("first burst %d stays above burst", b.params.firstBurst)
	}
	b = newLoginBench()
	r, keys = b.send(1, 3, true, "InitiatorName="+testInitiator, "SessionType=Discovery",
		"MaxConnections=1", "InitialR2T=No", "MaxBurstLength=512", "FirstBurstLength=512", "MaxOutstandingR2T=1", "TaskReporting=RFC3720", "iSCSIProtocolLevel=1", "HeaderDigest=None", "DefaultTime2Wait=0")
	want := map[string]string{
		"MaxConnections": "Irrelevant", "InitialR2T": "Irrelevant", "MaxBurstLength": "Irrelevant", "FirstBurstLength": "Irrelevant",
		"MaxOutstandingR2T": "Irrelevant", "TaskReporting": "Irrelevant", "iSCSIProtocolLevel": "Irrelevant", "HeaderDigest": "None", "DefaultTime2Wait": "2", "MaxRecvDataSegmentLength": "262144",
	}
	if !r.complete || !maps.Equal(keys, want) {
		t.Errorf("discovery: %v", keys)
	}
}

// TestLoginStatus is the table of logins that fail, and with what.
func TestLoginStatus(t *testing.T) {
	req := func(change func(*pdu.LoginRequest)) pdu.LoginRequest {
		p := pdu.LoginRequest{Transit: true, CSG: 1, NSG: 3, ITT: 1}
		if change != nil {
			change(&p)
		}
		return p
	}
	tests := []struct {
		name   string
		req    pdu.LoginRequest
		text   []byte
		status uint16
	}{
		{"no name", req(nil), text("TargetName=" + testTarget), statusMissingKey},
		{"no target", req(nil), text("InitiatorName=" + testInitiator), statusMissingKey},
		{"unknown target", req(nil), text("InitiatorName="+testInitiator, "TargetName=iqn.other"), statusNotFound},
		{"target in capitals", req(nil), text("InitiatorName="+testInitiator, "TargetName="+strings.ToUpper(testTarget)), statusSuccess},
		{"session type", req(nil), text("InitiatorName="+testInitiator, "SessionType=Strange"), statusSessionType},
		{"version", req(func(p *pdu.LoginRequest) { p.VersionMin, p.VersionMax = 1, 2 }), text(who...), statusVersion},
		{"stage 2", req(func(p *pdu.LoginRequest) { p.CSG = 2 }), text(who...), statusInitiatorError},
		{"stage 3", req(func(p *pdu.LoginRequest) { p.CSG, p.NSG = 3, 3 }), text(who...), statusInitiatorError},
		{"next stage 2", req(func(p *pdu.LoginRequest) { p.NSG = 2 }), text(who...), statusInitiatorError},
		{"backwards", req(func(p *pdu.LoginRequest) { p.NSG = 0 }), text(who...), statusInitiatorError},
		{"T and C", req(func(p *pdu.LoginRequest) { p.Continue = true }), text(who...), statusInitiatorError},
		{"key twice", req(nil), text(with(who, "MaxBurstLength=512", "MaxBurstLength=512")...), statusInitiatorError},
		{"no NUL", req(nil), []byte("InitiatorName=x"), statusInitiatorError},
		{"no equals", req(nil), text(with(who, "MaxBurstLength")...), statusInitiatorError},
		{"long name", req(nil), text("InitiatorName=iqn."+strings.Repeat("x", 220), "TargetName="+testTarget), statusInitiatorError},
		{"CHAP out of turn", req(func(p *pdu.LoginRequest) { p.CSG = 0 }), text(with(who, "CHAP_A=5")...), statusInitiatorError},
		{"only CHAP, none configured", req(func(p *pdu.LoginRequest) { p.CSG = 0 }), text(with(who, "AuthMethod=CHAP")...), statusAuthentication},
	}
	for _, tt := range tests {
		b := newLoginBench()
		if r := b.step(&tt.req, tt.text); r.response.Status != tt.status {
			t.Errorf("%s: status %04x, want %04x", tt.name, r.response.Status, tt.status)
		} else if r.failed() && (r.complete || r.response.Transit) {
			t.Errorf("%s: transit in a failure", tt.name)
		}
	}
	b := newLoginBench()
	b.dir.open = false
	if r, _ := b.send(1, 3, true, who...); r.response.Status != statusForbidden {
		t.Errorf("stranger: status %04x", r.response.Status)
	}
	if r, _ := newLoginBench().withCHAP().send(1, 3, true, who...); r.response.Status != statusAuthentication {
		t.Errorf("security stage left out: status %04x", r.response.Status)
	}
	if r, _ := newLoginBench().withCHAP().send(0, 1, true, with(who, "AuthMethod=None")...); r.response.Status != statusAuthentication {
		t.Errorf("None where CHAP is required: status %04x", r.response.Status)
	}
	if r, _ := newLoginBench().withCHAP().send(0, 3, true, who...); r.response.Status != statusAuthentication {
		t.Errorf("no AuthMethod where CHAP is required: status %04x", r.response.Status)
	}
	b = newLoginBench()
	b.dir.redirect = "192.0.2.9:3260"
	r, keys := b.send(0, 1, true, with(who, "AuthMethod=None")...)
	if r.response.Status != statusMoved || !maps.Equal(keys, map[string]string{"TargetAddress": "192.0.2.9:3260"}) {
		t.Errorf("redirect: status %04x, %v", r.response.Status, keys)
	}
	b = newLoginBench()
	b.dir.redirect = "192.0.2.9:3260"
	if r, _ := b.send(1, 3, true, "InitiatorName=x", "SessionType=Discovery"); r.failed() {
		t.Errorf("discovery redirected: status %04x", r.response.Status)
	}
}

// TestLoginBounds checks the limits on rounds, text, and what may not change.
func TestLoginBounds(t *testing.T) {
	b := newLoginBench()
	var r loginReply
	rounds := 0
	for ; !r.failed() && rounds < 100; rounds++ {
		pairs := who
		if rounds > 0 {
			pairs = nil
		}
		r, _ = b.send(1, 0, false, pairs...)
	}
	if rounds != b.cfg.limits.LoginRounds+1 {
		t.Errorf("%d exchanges", rounds)
	}
	b = newLoginBench().withCHAP()
	r = loginReply{}
	for rounds = 0; !r.failed() && rounds < 100; rounds++ {
		pairs := who
		if rounds > 0 {
			pairs = nil
		}
		r, _ = b.send(0, 0, false, pairs...)
	}
	if rounds != b.cfg.limits.AuthRounds+1 {
		t.Errorf("%d exchanges before authentication", rounds)
	}
	// C bits: the text is put together; the reply to a part is empty.
	b = newLoginBench()
	whole := text(with(who, "MaxBurstLength=16384")...)
	part := b.step(&pdu.LoginRequest{Continue: true, CSG: 1, ITT: 1}, whole[:20])
	if part.failed() || len(part.text) > 0 || part.response.Transit {
		t.Errorf("part: %+v", part)
	}
	rest := b.step(&pdu.LoginRequest{Transit: true, CSG: 1, NSG: 3, ITT: 1}, whole[20:])
	if !rest.complete || b.params.maxBurst != 16384 {
		t.Errorf("rest: %+v, %+v", rest, b.params)
	}
	b = newLoginBench()
	big := bytes.Repeat([]byte("x"), 8000)
	for range 2 {
		r = b.step(&pdu.LoginRequest{Continue: true, CSG: 1, ITT: 1}, big)
	}
	if r.failed() {
		t.Error("16000 bytes refused")
	}
	if r = b.step(&pdu.LoginRequest{Continue: true, CSG: 1, ITT: 1}, big); r.response.Status != statusInitiatorError {
		t.Error("24000 bytes collected")
	}
	for name, change := range map[string]func(*pdu.LoginRequest){
		"ITT":     func(p *pdu.LoginRequest) { p.ITT++ },
		"ISID":    func(p *pdu.LoginRequest) { p.ISID[5]++ },
		"TSIH":    func(p *pdu.LoginRequest) { p.TSIH++ },
		"CID":     func(p *pdu.LoginRequest) { p.CID++ },
		"version": func(p *pdu.LoginRequest) { p.VersionMax++ },
		"stage":   func(p *pdu.LoginRequest) { p.CSG = 0 },
	} {
		b := newLoginBench()
		b.send(1, 0, false, who...)
		p := pdu.LoginRequest{Transit: true, CSG: 1, NSG: 3, ITT: 1, CmdSN: 5}
		change(&p)
		if r := b.step(&p, nil); r.response.Status != statusInitiatorError {
			t.Errorf("%s changed: status %04x", name, r.response.Status)
		}
	}
	// A key offered again in a later PDU.
	b = newLoginBench()
	b.send(1, 0, false, with(who, "MaxBurstLength=512")...)
	if r, _ := b.send(1, 3, true, "MaxBurstLength=512"); r.response.Status != statusInitiatorError {
		t.Errorf("key repeated: status %04x", r.response.Status)
	}
	// The answer to as many unknown keys as are taken fits an initiator that has not said what it takes.
	b = newLoginBench()
	var keys []string
	for i := range maxLoginKeys - len(who) {
		keys = append(keys, fmt.Sprintf("X-%060d=1", i))
	}
	if r, _ := b.send(1, 3, true, with(who, keys...)...); r.failed() || len(r.text) > maxLoginReply {
		t.Errorf("many keys: status %04x, %d bytes", r.response.Status, len(r.text))
	}
	if r, _ := newLoginBench().send(1, 3, true, with(who, append(keys, "X-more=1")...)...); r.response.Status != statusInitiatorError {
		t.Errorf("too many keys: status %04x", r.response.Status)
	}
}

// TestThreeStages goes the long way and checks what is answered when.
func TestThreeStages(t *testing.T) {
	b := newLoginBench()
	r, keys := b.send(0, 1, true, with(who, "AuthMethod=CHAP,None")...)
	if r.failed() || !r.response.Transit || r.response.NSG != 1 || keys["AuthMethod"] != "None" || keys["TargetPortalGroupTag"] != "7" {
		t.Fatalf("security: %+v, %v", r, keys)
	}
	r, keys = b.send(1, 1, false, "HeaderDigest=CRC32C")
	if r.failed() || r.response.Transit || keys["HeaderDigest"] != "CRC32C" || keys["MaxRecvDataSegmentLength"] != "262144" || keys["TargetPortalGroupTag"] != "" {
		t.Fatalf("operational: %+v, %v", r, keys)
	}
	r, keys = b.send(1, 3, true)
	if !r.complete || len(keys) != 0 || !b.params.headerDigest || b.authName != "None" {
		t.Fatalf("end: %+v, %v", r, keys)
	}
	if r, _ := b.send(1, 3, true); !r.failed() {
		t.Error("login goes on after its end")
	}
}

// chapLogin runs CHAP up to the challenge.
func chapLogin(t *testing.T, b *loginBench, algorithms string) map[string]string {
	t.Helper()
	if r, keys := b.send(0, 1, true, with(who, "AuthMethod=CHAP,None")...); r.failed() || r.response.Transit || keys["AuthMethod"] != "CHAP" {
		t.Fatalf("method: %+v, %v", r, keys)
	}
	r, keys := b.send(0, 1, true, "CHAP_A="+algorithms)
	if r.failed() || r.response.Transit {
		t.Fatalf("challenge: %+v, %v", r, keys)
	}
	return keys
}

func respond(t *testing.T, keys map[string]string, secret string) []byte {
	t.Helper()
	a, _ := strconv.Atoi(keys["CHAP_A"])
	id, _ := strconv.Atoi(keys["CHAP_I"])
	challenge, err := pdu.ParseBinary(keys["CHAP_C"], maxChallenge)
	if err != nil || len(challenge) < 16 {
		t.Fatalf("challenge %q", keys["CHAP_C"])
	}
	return chapHash(a, byte(id), secret, challenge)
}

func TestCHAP(t *testing.T) {
	for list, want := range map[string]string{"5": "5", "7,5": "7", "6,8,5": "8", "6,5": "5", "0x7": "7"} {
		b := newLoginBench().withCHAP()
		keys := chapLogin(t, b, list)
		if keys["CHAP_A"] != want {
			t.Errorf("algorithm of %q: %q", list, keys["CHAP_A"])
		}
		answer := respond(t, keys, userSecret)
		r, _ := b.send(0, 1, true, "CHAP_N=0xuser", "CHAP_R="+strings.ToUpper(pdu.FormatBinary(answer)[2:4])+"x")
		if !r.failed() {
			t.Error("nonsense accepted")
		}
		b.close()
		b = newLoginBench().withCHAP()
		keys = chapLogin(t, b, list)
		answer = respond(t, keys, userSecret)
		r, keys = b.send(0, 1, true, "CHAP_N=0xuser", "CHAP_R=0b"+base64.StdEncoding.EncodeToString(answer))
		if r.failed() || !r.response.Transit || len(keys) != 0 || b.authName != "CHAP" {
			t.Errorf("%s: %+v, %v", list, r, keys)
		}
		if r, _ = b.send(1, 3, true); !r.complete {
			t.Errorf("%s: %+v", list, r)
		}
	}
	for _, list := range []string{"", "56", "6", "5x", "05 ", ",5"} {
		b := newLoginBench().withCHAP()
		b.send(0, 1, false, with(who, "AuthMethod=CHAP")...)
		if r, _ := b.send(0, 1, false, "CHAP_A="+list); r.response.Status != statusAuthentication {
			t.Errorf("algorithms %q: status %04x", list, r.response.Status)
		}
	}
}

// TestDiscoveryCHAP: discovery has credentials of its own.
func TestDiscoveryCHAP(t *testing.T) {
	const initiator = "InitiatorName=" + testInitiator
	discovery := func() *loginBench {
		b := newLoginBench().withCHAP()
		b.dir.discovery = map[string]Access{testInitiator: {User: "0bfinder", Secret: otherSecret}}
		return b
	}
	for secret, want := range map[string]uint16{otherSecret: statusSuccess, userSecret: statusAuthentication} {
		b := discovery()
		b.send(0, 1, false, initiator, "SessionType=Discovery", "AuthMethod=CHAP")
		_, keys := b.send(0, 1, false, "CHAP_A=7")
		if r, _ := b.send(0, 1, true, "CHAP_N=0bfinder", "CHAP_R="+pdu.FormatBinary(respond(t, keys, secret))); r.response.Status != want {
			t.Errorf("secret %q: status %04x, want %04x", secret, r.response.Status, want)
		}
	}
	for stage, pairs := range map[uint8][]string{0: {"AuthMethod=None"}, 1: nil} {
		if r, _ := discovery().send(stage, 3, true, with(pairs, initiator, "SessionType=Discovery")...); r.response.Status != statusAuthentication {
			t.Errorf("stage %d without authentication: status %04x", stage, r.response.Status)
		}
	}
	b := discovery()
	delete(b.dir.discovery, testInitiator)
	if r, _ := b.send(1, 3, true, initiator, "SessionType=Discovery"); r.response.Status != statusForbidden {
		t.Errorf("a stranger: status %04x", r.response.Status)
	}
}

// TestCHAPRefusals: every wrong answer looks the same.
func TestCHAPRefusals(t *testing.T) {
	foreign := newLoginBench().withCHAP()
	for name, answer := range map[string]func(good []byte, keys map[string]string) []string{
		"wrong secret": func(_ []byte, keys map[string]string) []string {
			return []string{"CHAP_N=0xuser", "CHAP_R=" + pdu.FormatBinary(respond(t, keys, "guess"))}
		},
		"wrong user": func(good []byte, _ map[string]string) []string {
			return []string{"CHAP_N=user", "CHAP_R=" + pdu.FormatBinary(good)}
		},
		"name decoded": func(good []byte, _ map[string]string) []string {
			return []string{"CHAP_N=\x0f", "CHAP_R=" + pdu.FormatBinary(good)}
		},
		"longer": func(good []byte, _ map[string]string) []string {
			return []string{"CHAP_N=0xuser", "CHAP_R=" + pdu.FormatBinary(append(good, 0))}
		},
		"shorter": func(good []byte, _ map[string]string) []string {
			return []string{"CHAP_N=0xuser", "CHAP_R=" + pdu.FormatBinary(good[:15])}
		},
		"no response": func([]byte, map[string]string) []string { return []string{"CHAP_N=0xuser"} },
		"no name":     func(good []byte, _ map[string]string) []string { return []string{"CHAP_R=" + pdu.FormatBinary(good)} },
		"nothing":     func([]byte, map[string]string) []string { return nil },
		"reflected": func(good []byte, keys map[string]string) []string {
			return []string{"CHAP_N=0xuser", "CHAP_R=" + pdu.FormatBinary(good), "CHAP_I=1", "CHAP_C=" + keys["CHAP_C"]}
		},
		"reflected from another connection": func(good []byte, _ map[string]string) []string {
			return []string{"CHAP_N=0xuser", "CHAP_R=" + pdu.FormatBinary(good), "CHAP_I=1", "CHAP_C=" + pdu.FormatBinary(foreign.chap.challenge)}
		},
		"challenge without id": func(good []byte, _ map[string]string) []string {
			return []string{"CHAP_N=0xuser", "CHAP_R=" + pdu.FormatBinary(good), "CHAP_C=0x1234"}
		},
		"id of two bytes": func(good []byte, _ map[string]string) []string {
			return []string{"CHAP_N=0xuser", "CHAP_R=" + pdu.FormatBinary(good), "CHAP_I=256", "CHAP_C=0x1234"}
		},
		"long challenge": func(good []byte, _ map[string]string) []string {
			return []string{"CHAP_N=0xuser", "CHAP_R=" + pdu.FormatBinary(good), "CHAP_I=1", "CHAP_C=0b" + base64.StdEncoding.EncodeToString(make([]byte, maxChallenge+1))}
		},
	} {
		b := newLoginBench().withCHAP()
		b.cfg = foreign.cfg
		b.login = newLogin(foreign.cfg)
		if foreign.chap.challenge == nil {
			chapLogin(t, foreign, "5")
		}
		keys := chapLogin(t, b, "5")
		r, keys := b.send(0, 1, true, answer(respond(t, keys, userSecret), keys)...)
		if r.response.Status != statusAuthentication || len(keys) != 0 || r.response.Transit {
			t.Errorf("%s: %+v, %v", name, r, keys)
		}
		b.close()
	}
	foreign.close()
	if n := len(foreign.cfg.challenges.open); n != 0 {
		t.Errorf("%d challenges remembered after their logins", n)
	}
	// An initiator that was given no secret is not let in by an empty one.
	b := newLoginBench().withCHAP()
	b.dir.access[testInitiator] = Access{User: "0xuser"}
	keys := chapLogin(t, b, "5")
	if r, _ := b.send(0, 1, true, "CHAP_N=0xuser", "CHAP_R="+pdu.FormatBinary(respond(t, keys, ""))); !r.failed() {
		t.Error("empty secret accepted")
	}
}

func TestMutualCHAP(t *testing.T) {
	mutual := func(b *loginBench) (loginReply, map[string]string) {
		keys := chapLogin(t, b, "7")
		return b.send(0, 1, true, "CHAP_N=0xuser", "CHAP_R="+pdu.FormatBinary(respond(t, keys, userSecret)), "CHAP_I=0x10", "CHAP_C=0b"+base64.StdEncoding.EncodeToString([]byte("sixteen bytes ok")))
	}
	b := newLoginBench().withCHAP()
	r, keys := mutual(b)
	want := pdu.FormatBinary(chapHash(chapSHA256, 16, otherSecret, []byte("sixteen bytes ok")))
	if r.failed() || keys["CHAP_N"] != "target" || keys["CHAP_R"] != want || b.authName != "CHAP mutual" {
		t.Errorf("%+v, %v", r, keys)
	}
	for name, a := range map[string]Access{
		"no secret of ours": {User: "0xuser", Secret: userSecret},
		"equal secrets":     {User: "0xuser", Secret: userSecret, MutualUser: "target", MutualSecret: userSecret},
	} {
		b := newLoginBench().withCHAP()
		b.dir.access[testInitiator] = a
		if r, keys := mutual(b); r.response.Status != statusAuthentication || len(keys) != 0 {
			t.Errorf("%s: %+v, %v", name, r, keys)
		}
	}
	// Two logins never get the same challenge.
	seen := make(map[string]bool)
	for range 100 {
		b := newLoginBench().withCHAP()
		c := chapLogin(t, b, "5")["CHAP_C"]
		if seen[c] {
			t.Fatal("challenge repeated")
		}
		seen[c] = true
	}
}

// FuzzLogin sends sequences of login requests: whatever comes, the state machine
// neither panics nor lets anybody in without the secret, and its replies fit.
func FuzzLogin(f *testing.F) {
	seed := func(parts ...string) []byte {
		var b []byte
		for _, p := range parts {
			b = append(b, byte(len(p)>>8), byte(len(p)))
			b = append(b, p...)
		}
		return b
	}
	name := string(text(who...))
	f.Add(seed("\x87"+name), false)
	f.Add(seed("\x81"+name+"AuthMethod=CHAP\x00", "\x81CHAP_A=5\x00", "\x81CHAP_N=0xuser\x00CHAP_R=0x00\x00"), true)
	f.Add(seed("\x44Initiator", "\x87Name=x\x00SessionType=Discovery\x00"), false)
	f.Fuzz(func(t *testing.T, in []byte, secret bool) {
		b := newLoginBench()
		if secret {
			b.withCHAP()
		}
		defer b.close()
		before, size := heapAllocated(), len(in)
		defer func() {
			if grown := heapAllocated() - before; grown > 1<<20+256*uint64(size) {
				t.Fatalf("%d bytes of input made us allocate %d", size, grown)
			}
		}()
		for len(in) >= 3 {
			n := min(int(in[0])<<8|int(in[1]), len(in)-2)
			if n == 0 {
				return
			}
			part := in[2 : 2+n]
			in = in[2+n:]
			r := b.step(&pdu.LoginRequest{
				Transit: part[0]&0x80 != 0, Continue: part[0]&0x40 != 0, CSG: part[0] >> 2 & 3, NSG: part[0] & 3, ITT: 1,
			}, part[1:])
			if len(r.text) > maxLoginReply {
				t.Fatalf("reply of %d bytes", len(r.text))
			}
			if _, err := pdu.ParseText(r.text, 1000); err != nil {
				t.Fatalf("reply does not parse: %q", r.text)
			}
			if r.complete && (secret || r.failed() || b.params.firstBurst > b.params.maxBurst || b.params.maxR2T > maxR2T || b.params.maxSend < minSegment) {
				t.Fatalf("let in: %+v", b.params)
			}
			if r.failed() || r.complete {
				return
			}
		}
	})
}
