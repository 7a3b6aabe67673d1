package iscsi

import (
	"crypto/hmac"
	"crypto/md5"
	"crypto/sha256"
	"crypto/sha3"
	"io"
	"strconv"
	"strings"
	"sync"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

// CHAP algorithms (RFC 7143 section 12.1.3 and the IANA registry "PPP
// Authentication Algorithms"). SHA-1 (6) is not offered.
const (
	chapMD5     = 5
	chapSHA256  = 7
	chapSHA3256 = 8
)

const (
	// challengeLen is the length of our challenges, bytes; 16 would do.
	challengeLen = 32
	// maxChallenge is the longest challenge that we take from an initiator, bytes.
	maxChallenge = 1024
)

// chapHash computes the response to a challenge, nil for an unknown algorithm.
func chapHash(algorithm int, id byte, secret string, challenge []byte) []byte {
	message := make([]byte, 0, 1+len(secret)+len(challenge))
	message = append(message, id)
	message = append(message, secret...)
	message = append(message, challenge...)
	switch algorithm {
	case chapMD5:
		sum := md5.Sum(message)
		return sum[:]
	case chapSHA256:
		sum := sha256.Sum256(message)
		return sum[:]
	case chapSHA3256:
		sum := sha3.Sum256(message)
		return sum[:]
	}
	return nil
}

// chooseAlgorithm takes the first algorithm of a CHAP_A list that we have. Each
// element is compared as a whole number.
func chooseAlgorithm(list string) (int, bool) {
	for v := range strings.SplitSeq(list, ",") {
		switch n, err := pdu.ParseNumber(v); {
		case err != nil:
			return 0, false
		case n == chapMD5, n == chapSHA256, n == chapSHA3256:
			return int(n), true
		}
	}
	return 0, false
}

// chap is the target's side of one CHAP exchange (RFC 7143 section 12.1.3).
type chap struct {
	access     Access
	challenges *challengeLedger
	random     io.Reader

	algorithm int
	id        byte
	challenge []byte
}

// offer answers CHAP_A with the algorithm and our challenge.
func (c *chap) offer(list string, reply []byte) ([]byte, bool) {
	algorithm, ok := chooseAlgorithm(list)
	if !ok {
		return nil, false
	}
	c.algorithm = algorithm
	var b [1 + challengeLen]byte
	if _, err := io.ReadFull(c.random, b[:]); err != nil {
		return nil, false
	}
	c.id, c.challenge = b[0], b[1:]
	c.challenges.add(c.challenge)
	reply = pdu.AppendText(reply, "CHAP_A", strconv.Itoa(algorithm))
	reply = pdu.AppendText(reply, "CHAP_I", strconv.Itoa(int(c.id)))
	return pdu.AppendText(reply, "CHAP_C", pdu.FormatBinary(c.challenge)), true
}

// chapAnswer is what the initiator sends in reply to our challenge.
type chapAnswer struct {
	name, response      string // CHAP_N, CHAP_R
	id, challenge       string // CHAP_I, CHAP_C: the initiator wants us to prove ourselves, too
	hasID, hasChallenge bool
}

// verify checks the initiator's response and, when asked to, appends ours. Every
// failure looks the same from outside.
func (c *chap) verify(a chapAnswer, reply []byte) ([]byte, bool) {
	want := chapHash(c.algorithm, c.id, c.access.Secret, c.challenge)
	got, err := pdu.ParseBinary(a.response, len(want))
	// CHAP_N is a plain string, whatever it begins with. Both comparisons are always
	// made, in constant time, so that a wrong name looks like a wrong secret.
	good := hmac.Equal([]byte(a.name), []byte(c.access.User))
	good = hmac.Equal(got, want) && good && err == nil && len(c.access.Secret) > 0
	if !good {
		return nil, false
	}
	if a.hasID != a.hasChallenge {
		return nil, false
	}
	if !a.hasID {
		return reply, true
	}
	id, err := pdu.ParseNumber(a.id)
	if err != nil || id > 255 {
		return nil, false
	}
	challenge, err := pdu.ParseBinary(a.challenge, maxChallenge)
	if err != nil || c.challenges.contains(challenge) {
		return nil, false // unreadable, or our own challenge reflected
	}
	if c.access.MutualSecret == "" || c.access.MutualSecret == c.access.Secret {
		return nil, false
	}
	proof := chapHash(c.algorithm, byte(id), c.access.MutualSecret, challenge)
	reply = pdu.AppendText(reply, "CHAP_N", c.access.MutualUser)
	return pdu.AppendText(reply, "CHAP_R", pdu.FormatBinary(proof)), true
}

// close forgets our challenge.
func (c *chap) close() {
	if c.challenge != nil {
		c.challenges.remove(c.challenge)
		c.challenge = nil
	}
}

// challengeLedger knows the challenges of all live logins, so that one of them
// cannot be answered by handing it back to us on another connection. Its size
// is bounded by the number of connections in login phase.
type challengeLedger struct {
	mu   sync.Mutex
	open map[string]struct{}
}

func (l *challengeLedger) add(challenge []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == nil {
		l.open = make(map[string]struct{})
	}
	l.open[string(challenge)] = struct{}{}
}

func (l *challengeLedger) contains(challenge []byte) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.open[string(challenge)]
	return ok
}

func (l *challengeLedger) remove(challenge []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.open, string(challenge))
}
