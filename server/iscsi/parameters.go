package iscsi

import (
	"strconv"
	"strings"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

// Our side of the negotiation.
const (
	// maxRecvSegment is the longest data segment that we take, bytes.
	maxRecvSegment = 256 << 10
	// maxBurst bounds one R2T and one Data-In sequence, firstBurst what comes
	// without R2T, bytes.
	maxBurst   = 1 << 20
	firstBurst = 256 << 10
	// maxR2T is the number of R2Ts outstanding per task.
	maxR2T = 8
)

// Ranges of RFC 7143 section 13.
const (
	minSegment = 512
	maxSegment = 1<<24 - 1
)

// parameters are the results of a login negotiation, from the defaults of
// RFC 7143 section 13 on.
type parameters struct {
	headerDigest  bool
	dataDigest    bool
	initialR2T    bool
	immediateData bool
	maxSend       uint32 // the initiator's MaxRecvDataSegmentLength, bytes
	maxBurst      uint32 // bytes
	firstBurst    uint32 // bytes
	maxR2T        uint32
	time2Wait     uint32 // seconds
	time2Retain   uint32 // seconds
}

func defaultParameters() parameters {
	return parameters{
		initialR2T:    true,
		immediateData: true,
		maxSend:       8192,
		maxBurst:      256 << 10,
		firstBurst:    64 << 10,
		maxR2T:        1,
		time2Wait:     2,
		time2Retain:   20,
	}
}

// Answers that stand for themselves (RFC 7143 section 6.2).
const (
	answerReject        = "Reject"
	answerIrrelevant    = "Irrelevant"
	answerNotUnderstood = "NotUnderstood"
)

// reservedAnswer reports whether a value is an answer that is never answered.
func reservedAnswer(value string) bool {
	return value == answerReject || value == answerIrrelevant || value == answerNotUnderstood
}

// loginOnly tells the keys that are known but may not be offered after login
// (RFC 7143 section 13, use LO or IO).
func loginOnly(key string) bool {
	switch key {
	case "HeaderDigest", "DataDigest", "MaxConnections", "InitialR2T", "ImmediateData", "MaxBurstLength",
		"FirstBurstLength", "MaxOutstandingR2T", "DataPDUInOrder", "DataSequenceInOrder", "DefaultTime2Wait",
		"DefaultTime2Retain", "ErrorRecoveryLevel", "TaskReporting", "iSCSIProtocolLevel", "IFMarker",
		"OFMarker", "IFMarkInt", "OFMarkInt", "InitiatorName", "TargetName", "SessionType":
		return true
	}
	return securityKey(key)
}

// rank orders the keys of one text so that a key comes after those its answer
// depends on: FirstBurstLength after all others.
func rank(key string) int {
	if key == "FirstBurstLength" {
		return 1
	}
	return 0
}

// negotiate answers one operational key and stores its result. Keys of a
// session are irrelevant in a discovery session. It returns answered=false for
// declarations, and a login status other than 0 when the login cannot go on.
func (p *parameters) negotiate(key, value string, discovery bool) (answer string, answered bool, status uint16) {
	switch key {
	case "HeaderDigest":
		answer, p.headerDigest = chooseDigest(value)
	case "DataDigest":
		answer, p.dataDigest = chooseDigest(value)
	case "MaxRecvDataSegmentLength":
		n, ok := number(value, minSegment, maxSegment)
		if !ok {
			return "", false, statusInitiatorError
		}
		p.maxSend = n
		return "", false, 0
	case "DefaultTime2Wait":
		answer = chooseNumber(value, 0, 3600, 2, larger, &p.time2Wait)
	case "DefaultTime2Retain":
		answer = chooseNumber(value, 0, 3600, 20, smaller, &p.time2Retain)
	case "ErrorRecoveryLevel":
		answer = chooseNumber(value, 0, 2, 0, smaller, nil)
	case "IFMarker", "OFMarker":
		answer = "No"
	case "IFMarkInt", "OFMarkInt", "AuthMethod":
		answer = answerReject
	case "MaxConnections", "InitialR2T", "ImmediateData", "MaxBurstLength", "FirstBurstLength",
		"MaxOutstandingR2T", "DataPDUInOrder", "DataSequenceInOrder", "TaskReporting", "iSCSIProtocolLevel":
		if discovery {
			return answerIrrelevant, true, 0
		}
		answer = p.negotiateSession(key, value)
	default:
		answer = answerNotUnderstood
	}
	return answer, true, 0
}

// negotiateSession answers the keys that only a normal session has.
func (p *parameters) negotiateSession(key, value string) string {
	switch key {
	case "MaxConnections":
		return chooseNumber(value, 1, 65535, 1, smaller, nil)
	case "InitialR2T": // OR; ours is No
		return chooseBool(value, &p.initialR2T, func(offer bool) bool { return offer })
	case "ImmediateData": // AND; ours is Yes
		return chooseBool(value, &p.immediateData, func(offer bool) bool { return offer })
	case "MaxBurstLength":
		return chooseNumber(value, minSegment, maxSegment, maxBurst, smaller, &p.maxBurst)
	case "FirstBurstLength":
		if p.initialR2T && !p.immediateData {
			return answerIrrelevant
		}
		return chooseNumber(value, minSegment, maxSegment, min(firstBurst, p.maxBurst), smaller, &p.firstBurst)
	case "MaxOutstandingR2T":
		return chooseNumber(value, 1, 65535, maxR2T, smaller, &p.maxR2T)
	case "DataPDUInOrder", "DataSequenceInOrder": // OR; ours is Yes
		var inOrder bool
		return chooseBool(value, &inOrder, func(bool) bool { return true })
	case "iSCSIProtocolLevel": // RFC 7144 section 7.1.1
		return chooseNumber(value, 0, 31, 1, smaller, nil)
	default: // TaskReporting
		for v := range strings.SplitSeq(value, ",") {
			if v == "RFC3720" {
				return v
			}
		}
		return answerReject
	}
}

// settle makes the results agree with each other at the end of a login.
func (p *parameters) settle() {
	p.firstBurst = min(p.firstBurst, p.maxBurst)
	p.maxR2T = min(p.maxR2T, maxR2T)
}

// chooseDigest takes the first digest of the offer that we have.
func chooseDigest(offer string) (answer string, crc bool) {
	for v := range strings.SplitSeq(offer, ",") {
		switch v {
		case "CRC32C":
			return v, true
		case "None":
			return v, false
		}
	}
	return answerReject, false
}

func chooseBool(offer string, result *bool, choose func(bool) bool) string {
	switch offer {
	case "Yes":
		*result = choose(true)
	case "No":
		*result = choose(false)
	default:
		return answerReject
	}
	if *result {
		return "Yes"
	}
	return "No"
}

func smaller(a, b uint32) uint32 { return min(a, b) }
func larger(a, b uint32) uint32  { return max(a, b) }

// chooseNumber combines an offer in [lo, hi] with our value. Result may be nil.
func chooseNumber(offer string, lo, hi, ours uint32, choose func(a, b uint32) uint32, result *uint32) string {
	n, ok := number(offer, lo, hi)
	if !ok {
		return answerReject
	}
	n = choose(n, ours)
	if result != nil {
		*result = n
	}
	return strconv.FormatUint(uint64(n), 10)
}

// number reads a numerical value in [lo, hi].
func number(value string, lo, hi uint32) (uint32, bool) {
	n, err := pdu.ParseNumber(value)
	if err != nil || n < uint64(lo) || n > uint64(hi) {
		return 0, false
	}
	return uint32(n), true
}
