package cluster

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"strings"
)

// A join token is "tw1-" and, in lower-case base32 without padding, 16 bytes of
// secret and the SHA-256 of the cluster's CA certificate. The secret shows the
// cluster that the node was invited; the digest shows the node that it talks to
// the cluster that invited it.
const tokenPrefix = "tw1-"

var base32Lower = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

type tokenParts struct {
	Secret [16]byte
	CA     [32]byte
}

func newTokenParts(ca []byte) (t tokenParts) {
	rand.Read(t.Secret[:])
	t.CA = sha256.Sum256(ca)
	return t
}

func (t tokenParts) String() string {
	return tokenPrefix + base32Lower.EncodeToString(append(t.Secret[:], t.CA[:]...))
}

// hash is what the cluster keeps of a token. The secret has 128 random bits, so a
// plain hash cannot be reversed.
func (t tokenParts) hash() [32]byte { return sha256.Sum256(t.Secret[:]) }

func parseToken(s string) (t tokenParts, err error) {
	rest, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(s)), tokenPrefix)
	if !ok || base32Lower.DecodedLen(len(rest)) != len(t.Secret)+len(t.CA) {
		return t, errorf(ErrToken, "this is not a join token: one looks like tw1-... and has %d characters", len(tokenPrefix)+base32Lower.EncodedLen(48))
	}
	b, err := base32Lower.DecodeString(rest)
	if err != nil || base32Lower.EncodeToString(b) != rest {
		return t, errorf(ErrToken, "the join token is mistyped")
	}
	copy(t.Secret[:], b)
	copy(t.CA[:], b[len(t.Secret):])
	return t, nil
}
