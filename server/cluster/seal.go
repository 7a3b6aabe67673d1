package cluster

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
)

// Sealed is a secret under AES-256-GCM with the cluster's seal key: a random
// 96-bit nonce and the ciphertext with its tag. The purpose is authenticated
// along, so that one secret cannot be put in the place of another.
//
// What this protects: raft logs, snapshots, backups of the state and everything
// that a witness holds contain ciphertexts only. What it does not protect: the
// seal key lies in the file seal.key (mode 0600) of each data node, beside the
// state. Whoever reads that file as root has the secrets. It is handed to a
// joining data node inside the TLS connection that the token authenticates, and
// never to a witness.
type Sealed []byte

// sealKey is the key of all sealed secrets of one cluster.
type sealKey [32]byte

var errSeal = errors.New("sealed secret does not open: it is damaged, or of another cluster")

func newSealKey() (k sealKey) {
	rand.Read(k[:])
	return k
}

func (k *sealKey) aead() cipher.AEAD {
	b, err := aes.NewCipher(k[:])
	if err != nil {
		panic("cluster: AES-256 key: " + err.Error())
	}
	a, err := cipher.NewGCM(b)
	if err != nil {
		panic("cluster: GCM: " + err.Error())
	}
	return a
}

func (k *sealKey) seal(purpose string, secret []byte) Sealed {
	a := k.aead()
	nonce := make([]byte, a.NonceSize(), a.NonceSize()+len(secret)+a.Overhead())
	rand.Read(nonce)
	return a.Seal(nonce, nonce, secret, []byte(purpose))
}

func (k *sealKey) open(purpose string, s Sealed) ([]byte, error) {
	a := k.aead()
	if len(s) < a.NonceSize() {
		return nil, fmt.Errorf("%s: %w", purpose, errSeal)
	}
	b, err := a.Open(nil, s[:a.NonceSize()], s[a.NonceSize():], []byte(purpose))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", purpose, errSeal)
	}
	return b, nil
}

// The purposes of sealed secrets.
const (
	purposeCA          = "ca key"
	purposeFingerprint = "fingerprint key"
)

func purposeDiscovery(mutual bool) string {
	if mutual {
		return "mutual discovery chap"
	}
	return "discovery chap"
}

func purposeCHAP(host string, mutual bool) string {
	if mutual {
		return "mutual chap/" + host
	}
	return "chap/" + host
}
