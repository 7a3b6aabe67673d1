package initiator

import (
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha3"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strconv"
	"strings"
)

// CHAP algorithms (RFC 7143, section 12.1.3, and the IANA registry).
const (
	CHAPMD5     = 5
	CHAPSHA256  = 7
	CHAPSHA3256 = 8
)

// CHAP are the secrets of a login.
type CHAP struct {
	Name, Secret string
	// Algorithms are offered in this order; none is SHA-256 and MD5. Offer is the
	// list as it is to stand there instead.
	Algorithms []int
	Offer      *string
	// MutualSecret, if there is one, asks the target to prove that it knows it;
	// MutualName is what the target must call itself, if there is one.
	MutualName, MutualSecret string
	// Base64 sends binary values as 0b instead of 0x.
	Base64 bool
	// Challenge is what the target is challenged by; nil is 16 random bytes. Reflect
	// sends the target's own challenge back, which it must refuse.
	Challenge []byte
	Reflect   bool
	// Response replaces the right response, RawResponse even its encoding. OnResponse
	// is shown what is sent.
	Response    []byte
	RawResponse string
	OnResponse  func(string)
}

// ErrTargetNotAuthentic is a target that does not know the mutual secret.
var ErrTargetNotAuthentic = errors.New("target did not prove the mutual CHAP secret")

func (c *CHAP) offer() string {
	if c.Offer != nil {
		return *c.Offer
	}
	list := c.Algorithms
	if list == nil {
		list = []int{CHAPSHA256, CHAPMD5}
	}
	var s []string
	for _, a := range list {
		s = append(s, strconv.Itoa(a))
	}
	return strings.Join(s, ",")
}

func (c *CHAP) encode(b []byte) string {
	if c.Base64 {
		return "0b" + base64.StdEncoding.EncodeToString(b)
	}
	return "0x" + hex.EncodeToString(b)
}

func decodeBinary(s string) ([]byte, error) {
	switch {
	case len(s) < 2:
	case strings.EqualFold(s[:2], "0x"):
		return hex.DecodeString(s[2:])
	case strings.EqualFold(s[:2], "0b"):
		return base64.StdEncoding.DecodeString(s[2:])
	}
	return nil, fmt.Errorf("%q is not a binary value", s)
}

// digest is the response to a challenge: the hash of identifier, secret, challenge.
func digest(algorithm int, id byte, secret string, challenge []byte) ([]byte, error) {
	var h hash.Hash
	switch algorithm {
	case CHAPMD5:
		h = md5.New()
	case CHAPSHA256:
		h = sha256.New()
	case CHAPSHA3256:
		h = sha3.New256()
	default:
		return nil, violation("12.1.3", "target chose CHAP algorithm %d", algorithm)
	}
	h.Write([]byte{id})
	h.Write([]byte(secret))
	h.Write(challenge)
	return h.Sum(nil), nil
}

// authenticate goes through the security stage that has just begun with
// AuthMethod=CHAP.
func (c *Conn) authenticate(l *login) error {
	chap := c.cfg.CHAP
	answer, err := l.exchange(0, 0, false, []Key{{"CHAP_A", chap.offer()}})
	if err != nil {
		return err
	}
	algorithm, err := strconv.Atoi(answer["CHAP_A"])
	if err != nil {
		return violation("12.1.3", "CHAP_A=%q", answer["CHAP_A"])
	}
	id, err := strconv.ParseUint(answer["CHAP_I"], 0, 8)
	if err != nil {
		return violation("12.1.3", "CHAP_I=%q", answer["CHAP_I"])
	}
	challenge, err := decodeBinary(answer["CHAP_C"])
	if err != nil || len(challenge) < 16 {
		return violation("12.1.3", "CHAP_C=%q", answer["CHAP_C"])
	}
	response, err := digest(algorithm, byte(id), chap.Secret, challenge)
	if err != nil {
		return err
	}
	if chap.Response != nil {
		response = chap.Response
	}
	text := chap.encode(response)
	if chap.RawResponse != "" {
		text = chap.RawResponse
	}
	if chap.OnResponse != nil {
		chap.OnResponse(text)
	}
	keys := []Key{{"CHAP_N", chap.Name}, {"CHAP_R", text}}
	ours := chap.Challenge
	const ourID = 0x5a
	if chap.MutualSecret != "" {
		if ours == nil {
			ours = make([]byte, 16)
			rand.Read(ours)
		}
		if chap.Reflect {
			ours = challenge
		}
		keys = append(keys, Key{"CHAP_I", strconv.Itoa(ourID)}, Key{"CHAP_C", chap.encode(ours)})
	}
	if answer, err = l.exchange(0, 1, true, keys); err != nil {
		return err
	}
	if chap.MutualSecret == "" {
		return nil
	}
	want, err := digest(algorithm, ourID, chap.MutualSecret, ours)
	if err != nil {
		return err
	}
	got, err := decodeBinary(answer["CHAP_R"])
	if err != nil || string(got) != string(want) || chap.MutualName != "" && answer["CHAP_N"] != chap.MutualName {
		return ErrTargetNotAuthentic
	}
	return nil
}
