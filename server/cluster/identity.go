package cluster

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/replication"
)

// The files of a node's cluster directory, all mode 0600, replaced as a whole:
//
//	cluster.json  who this node is; written last by init and join, so that its
//	              presence means that they were completed
//	node.key      the node's private key, PKCS #8 PEM; never leaves the node
//	node.crt      its certificate, PEM; replaced by renewal
//	ca.crt        the cluster's CA certificate, PEM
//	seal.key      32 bytes; data nodes only (see Sealed)
//	lock          held by the running process
//	lost.json     nodes declared lost when the quorum was recovered; usually absent
//	raft/         log and snapshots
const (
	fileIdentity = "cluster.json"
	fileNodeKey  = "node.key"
	fileNodeCert = "node.crt"
	fileCA       = "ca.crt"
	fileSealKey  = "seal.key"
	fileLock     = "lock"
	dirRaft      = "raft"
)

// Identity is who a node is. It is written once, by init or join.
type Identity struct {
	Cluster string             `json:"cluster"`
	UUID    uuid.UUID          `json:"uuid"`
	Created time.Time          `json:"created"`
	Target  string             `json:"target"` // the IQN
	Node    replication.NodeID `json:"node"`
	Name    string             `json:"name"`
	Role    Role               `json:"role"`
	// Addresses are those given to init or join.
	Addresses Addresses `json:"addresses"`
	// CAKey and Fingerprint repeat the sealed secrets of the state, so that a node
	// can renew its certificate and open its store before it has met the others.
	// A witness has neither.
	CAKey       Sealed `json:"ca_key,omitempty"`
	Fingerprint Sealed `json:"fingerprint,omitempty"`
}

const castagnoliName = "crc32c"

// identityFile is cluster.json: the identity with a checksum over its exact bytes.
type identityFile struct {
	Version  int             `json:"version"`
	Sum      string          `json:"crc32c"`
	Identity json.RawMessage `json:"identity"`
}

const identityVersion = 1

func sum(b []byte) string {
	return fmt.Sprintf("%08x", crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

func marshalIdentity(id *Identity) ([]byte, error) {
	raw, err := json.Marshal(id)
	if err != nil {
		return nil, err
	}
	return json.Marshal(identityFile{identityVersion, sum(raw), raw})
}

func unmarshalIdentity(b []byte) (*Identity, error) {
	var f identityFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, err
	}
	if f.Version != identityVersion {
		return nil, fmt.Errorf("it has version %d; this program reads %d", f.Version, identityVersion)
	}
	if got := sum(f.Identity); got != f.Sum {
		return nil, fmt.Errorf("its %s is %s and should be %s: the file was damaged or edited", castagnoliName, got, f.Sum)
	}
	id := new(Identity)
	if err := json.Unmarshal(f.Identity, id); err != nil {
		return nil, err
	}
	if id.Node == 0 || !validName(id.Name) || !validName(id.Cluster) || id.UUID == (uuid.UUID{}) || id.Role != RoleData && id.Role != RoleWitness {
		return nil, errors.New("it is incomplete")
	}
	return id, nil
}

// ReadIdentity returns who the node of a directory is. An error that is
// fs.ErrNotExist means that neither init nor join was completed there.
func ReadIdentity(dir string) (*Identity, error) {
	path := filepath.Join(dir, fileIdentity)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	id, err := unmarshalIdentity(b)
	if err != nil {
		return nil, fmt.Errorf("%s is not usable: %w", path, err)
	}
	return id, nil
}

// ReadFingerprintKey returns the key of the cluster's fingerprints from a data
// node's directory. It needs no quorum.
func ReadFingerprintKey(dir string) (dedup.Key, error) {
	id, err := ReadIdentity(dir)
	if err != nil {
		return dedup.Key{}, err
	}
	k, err := readSealKey(dir)
	if err != nil {
		return dedup.Key{}, err
	}
	b, err := k.open(purposeFingerprint, id.Fingerprint)
	if err != nil {
		return dedup.Key{}, err
	}
	var key dedup.Key
	if len(b) != len(key) {
		return dedup.Key{}, fmt.Errorf("fingerprint key has %d bytes", len(b))
	}
	copy(key[:], b)
	return key, nil
}

func writeFile(dir, name string, b []byte) error {
	if err := renameio.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Join(dir, name), err)
	}
	return syncDir(dir)
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func readSealKey(dir string) (*sealKey, error) {
	b, err := os.ReadFile(filepath.Join(dir, fileSealKey))
	if err != nil {
		return nil, err
	}
	k := new(sealKey)
	if len(b) != len(k) {
		return nil, fmt.Errorf("%s has %d bytes, not %d", filepath.Join(dir, fileSealKey), len(b), len(k))
	}
	copy(k[:], b)
	return k, nil
}

func readCredentials(dir string) (*credentials, error) {
	read := func(name, kind string) ([]byte, error) {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		der, err := fromPEM(kind, b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
		}
		return der, nil
	}
	ca, err := read(fileCA, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	cert, err := read(fileNodeCert, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	key, err := readKey(dir)
	if err != nil {
		return nil, err
	}
	return newCredentials(cert, ca, key)
}

func readKey(dir string) (*ecdsa.PrivateKey, error) {
	b, err := os.ReadFile(filepath.Join(dir, fileNodeKey))
	if err != nil {
		return nil, err
	}
	der, err := fromPEM("PRIVATE KEY", b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, fileNodeKey), err)
	}
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, fileNodeKey), err)
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: not an ECDSA key", filepath.Join(dir, fileNodeKey))
	}
	return key, nil
}

func writeKey(dir string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writeFile(dir, fileNodeKey, pemOf("PRIVATE KEY", der))
}

// lockDir keeps a second process off the directory.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, fileLock)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		err = fmt.Errorf("%s is locked: is another twinsan running on this directory? %w", path, err)
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// freshDir prepares a directory for init or join: locked, without an identity,
// and without what an interrupted attempt left behind.
func freshDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(dir, fileIdentity)); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = errorf(ErrExists, "%s belongs to a cluster already", dir)
		}
		return nil, errors.Join(err, lock.Close())
	}
	// Without an identity no member ever ran here, so no vote and no entry counts.
	if err := os.RemoveAll(filepath.Join(dir, dirRaft)); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}
