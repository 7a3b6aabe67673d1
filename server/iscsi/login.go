package iscsi

import (
	"io"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

// Login status, class and detail (RFC 7143 section 11.13.5).
const (
	statusSuccess         = 0x0000
	statusMoved           = 0x0101 // temporarily
	statusInitiatorError  = 0x0200
	statusAuthentication  = 0x0201
	statusForbidden       = 0x0202
	statusNotFound        = 0x0203
	statusVersion         = 0x0205
	statusTooManyConns    = 0x0206
	statusMissingKey      = 0x0207
	statusSessionType     = 0x0209
	statusNoSession       = 0x020a
	statusNotLogin        = 0x020b
	statusUnavailable     = 0x0301
	statusOutOfResources  = 0x0302
	maxLoginKeys          = 64 // of one login, so that even NotUnderstood for each fits our reply
	maxNameLen            = 223
	maxValueLen           = 255
	maxChallengeTextBytes = 2*maxChallenge + 2
)

// loginConfig is what a login asks of its target.
type loginConfig struct {
	target     string
	group      uint16
	limits     *Limits
	directory  Directory
	challenges *challengeLedger
	random     io.Reader
	drain      atomic.Pointer[drainage] // nil: the portals take sessions
}

// login is the negotiation of one connection as a state machine: step takes a
// request and returns the reply. It has no socket and no clock.
//
//	                    AuthMethod=None, or none needed
//	first PDU -> security ---------------------------------> operational -> full feature
//	     |          | AuthMethod=CHAP                         ^
//	     |          +-> CHAP_A -> CHAP_N, CHAP_R -------------+
//	     +-> operational, when no authentication is needed
//
// Any reply with a status other than success or a redirect is the last.
type login struct {
	cfg    *loginConfig
	params parameters

	started    bool
	first      pdu.LoginRequest // ITT, ISID, TSIH, CID, CmdSN and versions bind the whole login
	stage      uint8
	rounds     int
	textBytes  int
	text       []byte // collected with C bits
	offered    []string
	greeted    bool // TargetPortalGroupTag was sent
	declared   bool // MaxRecvDataSegmentLength was sent
	identified bool
	initiator  string
	discovery  bool
	access     Access

	auth     authState
	chap     chap
	authName string // "None" or "CHAP", with "mutual" when we proved ourselves
}

type authState uint8

const (
	authOpen      authState = iota // nothing negotiated yet
	authAlgorithm                  // CHAP was chosen, CHAP_A is next
	authResponse                   // our challenge is out
	authDone
)

// loginReply is the answer to one login request.
type loginReply struct {
	response pdu.LoginResponse // StatSN, ExpCmdSN, MaxCmdSN and TSIH are the caller's
	text     []byte
	complete bool // status is success and full feature phase follows
}

// newLogin returns a login before its first PDU. close must be called at its end.
func newLogin(cfg *loginConfig) *login {
	return &login{cfg: cfg, params: defaultParameters(), authName: "None"}
}

// close forgets what the login shares with others.
func (l *login) close() { l.chap.close() }

// failed reports whether a reply is the last of a login that came to nothing.
func (r *loginReply) failed() bool { return r.response.Status != statusSuccess }

// step processes one login request with its data segment. Text is not kept.
func (l *login) step(req *pdu.LoginRequest, text []byte) loginReply {
	reply := loginReply{response: pdu.LoginResponse{
		CSG: req.CSG, ISID: req.ISID, TSIH: req.TSIH, ITT: req.ITT,
	}}
	if status := l.admit(req, len(text)); status != statusSuccess {
		reply.response.Status = status
		return reply
	}
	if len(l.text)+len(text) > l.cfg.limits.NegotiationText {
		reply.response.Status = statusInitiatorError
		return reply
	}
	if req.Continue {
		l.text = append(l.text, text...)
		return reply // empty, so that the initiator sends the rest
	}
	if len(l.text) > 0 {
		text = append(l.text, text...)
		l.text = nil
	}
	pairs, err := pdu.ParseText(text, maxLoginKeys)
	if err != nil {
		reply.response.Status = statusInitiatorError
		return reply
	}
	out, status := l.negotiate(req, pairs)
	reply.text = out
	reply.response.Status = status
	if status != statusSuccess {
		return reply
	}
	if req.Transit && (l.stage != pdu.StageSecurity || l.auth == authDone) {
		reply.response.Transit = true
		reply.response.NSG = req.NSG
		l.stage = req.NSG
		if l.stage == pdu.StageFull {
			l.params.settle()
			reply.complete = true
		}
	}
	return reply
}

// admit checks a request's header against the login so far.
func (l *login) admit(req *pdu.LoginRequest, textLen int) uint16 {
	l.rounds++
	l.textBytes += textLen
	if !l.started {
		l.started = true
		l.first = *req
		l.stage = req.CSG
		if req.VersionMin > 0 {
			return statusVersion
		}
	}
	f := &l.first
	switch {
	case req.ITT != f.ITT, req.ISID != f.ISID, req.TSIH != f.TSIH, req.CID != f.CID,
		req.VersionMin != f.VersionMin, req.VersionMax != f.VersionMax:
		return statusInitiatorError
	case req.CSG != l.stage, l.stage > pdu.StageOperational:
		return statusInitiatorError
	case req.Transit && (req.Continue || req.NSG <= req.CSG || req.NSG == 2):
		return statusInitiatorError
	case l.rounds > l.cfg.limits.LoginRounds:
		return statusInitiatorError
	case l.auth != authDone && (l.rounds > l.cfg.limits.AuthRounds || l.textBytes > l.cfg.limits.LoginText):
		return statusInitiatorError
	}
	return statusSuccess
}

// negotiate answers all pairs of a complete text.
func (l *login) negotiate(req *pdu.LoginRequest, pairs []pdu.Pair) (reply []byte, status uint16) {
	for _, p := range pairs {
		if slices.Contains(l.offered, p.Key) || len(l.offered) >= maxLoginKeys || !validLength(p) {
			return nil, statusInitiatorError
		}
		l.offered = append(l.offered, p.Key)
	}
	if !l.identified {
		if address, status := l.identify(pairs); status != statusSuccess {
			if status == statusMoved {
				reply = pdu.AppendText(nil, "TargetAddress", address)
			}
			return reply, status
		}
	}
	if !l.greeted && !l.discovery {
		l.greeted = true
		reply = pdu.AppendText(reply, "TargetPortalGroupTag", strconv.Itoa(int(l.cfg.group)))
	}
	if l.stage == pdu.StageSecurity {
		reply, status = l.authenticate(req, pairs, reply)
		if status != statusSuccess {
			return nil, status
		}
	} else if l.auth != authDone {
		if l.access.User != "" {
			return nil, statusAuthentication
		}
		l.auth = authDone
	}
	slices.SortStableFunc(pairs, func(a, b pdu.Pair) int { return rank(a.Key) - rank(b.Key) })
	for _, p := range pairs {
		if declaration(p.Key) || securityKey(p.Key) && l.stage == pdu.StageSecurity || reservedAnswer(p.Value) {
			continue
		}
		answer, answered, status := l.params.negotiate(p.Key, p.Value, l.discovery)
		if status != statusSuccess {
			return nil, status
		}
		if answered {
			reply = pdu.AppendText(reply, p.Key, answer)
		}
	}
	if l.stage == pdu.StageOperational && !l.declared {
		l.declared = true
		reply = pdu.AppendText(reply, "MaxRecvDataSegmentLength", strconv.Itoa(maxRecvSegment))
	}
	return reply, statusSuccess
}

// declaration tells the keys that say who is there; they are never answered.
func declaration(key string) bool {
	switch key {
	case "InitiatorName", "InitiatorAlias", "SessionType", "TargetName",
		"TargetAlias", "TargetAddress", "TargetPortalGroupTag":
		return true
	}
	return false
}

func securityKey(key string) bool {
	return key == "AuthMethod" || strings.HasPrefix(key, "CHAP_")
}

func validLength(p pdu.Pair) bool {
	if p.Key == "CHAP_C" {
		return len(p.Value) <= maxChallengeTextBytes
	}
	return len(p.Value) <= maxValueLen
}

// identify reads from the first text who wants what, and finds whether it may.
// With statusMoved it returns where to go.
func (l *login) identify(pairs []pdu.Pair) (address string, status uint16) {
	var initiator, target, kind string
	kind = "Normal"
	for _, p := range pairs {
		switch p.Key {
		case "InitiatorName":
			initiator = p.Value
		case "TargetName":
			target = p.Value
		case "SessionType":
			kind = p.Value
		}
	}
	if initiator == "" || reservedAnswer(initiator) {
		return "", statusMissingKey
	}
	if !validName(initiator) {
		return "", statusInitiatorError
	}
	// iSCSI names are compared without regard to case (RFC 7143 section 4.2.7.2).
	l.initiator = strings.ToLower(initiator)
	var known bool
	switch kind {
	case "Discovery":
		l.discovery = true
		l.access, known = l.cfg.directory.Discovery(l.initiator)
	case "Normal":
		if target == "" {
			return "", statusMissingKey
		}
		if !strings.EqualFold(target, l.cfg.target) {
			return "", statusNotFound
		}
		if address, status := l.cfg.redirect(l.initiator); status != statusSuccess {
			return address, status
		}
		l.access, known = l.cfg.directory.Access(l.initiator)
	default:
		return "", statusSessionType
	}
	if !known {
		return "", statusForbidden
	}
	l.identified = true
	return "", statusSuccess
}

// validName checks length and characters of an iSCSI name.
func validName(name string) bool {
	if len(name) > maxNameLen {
		return false
	}
	for i := range len(name) {
		if name[i] <= ' ' || name[i] == 0x7f || name[i] == ',' {
			return false
		}
	}
	return true
}

// authenticate makes one step in security stage.
func (l *login) authenticate(req *pdu.LoginRequest, pairs []pdu.Pair, reply []byte) ([]byte, uint16) {
	var method, list string
	var answer chapAnswer
	var hasMethod, hasList, hasName, hasResponse bool
	for _, p := range pairs {
		switch p.Key {
		case "AuthMethod":
			method, hasMethod = p.Value, true
		case "CHAP_A":
			list, hasList = p.Value, true
		case "CHAP_N":
			answer.name, hasName = p.Value, true
		case "CHAP_R":
			answer.response, hasResponse = p.Value, true
		case "CHAP_I":
			answer.id, answer.hasID = p.Value, true
		case "CHAP_C":
			answer.challenge, answer.hasChallenge = p.Value, true
		}
	}
	hasAnswer := hasName || hasResponse || answer.hasID || answer.hasChallenge
	switch l.auth {
	case authOpen:
		if hasList || hasAnswer {
			return nil, statusInitiatorError
		}
		if !hasMethod {
			switch {
			case !req.Transit:
				return reply, statusSuccess
			case l.access.User != "":
				return nil, statusAuthentication
			}
			l.auth = authDone
			return reply, statusSuccess
		}
		return l.chooseMethod(method, reply)
	case authAlgorithm:
		if hasAnswer {
			return nil, statusInitiatorError
		}
		if !hasList {
			return nil, statusAuthentication
		}
		reply, ok := l.chap.offer(list, reply)
		if !ok {
			return nil, statusAuthentication
		}
		l.auth = authResponse
		return reply, statusSuccess
	case authResponse:
		if !hasName || !hasResponse {
			return nil, statusAuthentication
		}
		reply, ok := l.chap.verify(answer, reply)
		if !ok {
			return nil, statusAuthentication
		}
		if answer.hasID {
			l.authName = "CHAP mutual"
		}
		l.auth = authDone
		return reply, statusSuccess
	}
	if hasList || hasAnswer {
		return nil, statusInitiatorError
	}
	return reply, statusSuccess
}

// chooseMethod answers AuthMethod: the first of the offer that policy allows.
func (l *login) chooseMethod(offer string, reply []byte) ([]byte, uint16) {
	for v := range strings.SplitSeq(offer, ",") {
		switch {
		case v == "CHAP" && l.access.User != "":
			l.auth = authAlgorithm
			l.authName = "CHAP"
			l.chap = chap{access: l.access, challenges: l.cfg.challenges, random: l.cfg.random}
			return pdu.AppendText(reply, "AuthMethod", v), statusSuccess
		case v == "None" && l.access.User == "":
			l.auth = authDone
			return pdu.AppendText(reply, "AuthMethod", v), statusSuccess
		}
	}
	return nil, statusAuthentication
}
