package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/replication"
)

const (
	caLife   = 20 * 365 * 24 * time.Hour
	nodeLife = 90 * 24 * time.Hour
	// clockSkew is how far a node's clock may be behind the signer's.
	clockSkew = time.Hour

	// ServerName is a DNS name in every node certificate, so that a client which
	// trusts the cluster's CA can verify any node by ordinary means.
	ServerName = "node.twinsan"
)

// Peer is who presented a certificate of the cluster's CA.
type Peer struct {
	Node  replication.NodeID // a node, or 0
	Admin string             // the name of a remote administrator, or ""
}

func nodeURI(cluster uuid.UUID, id replication.NodeID) *url.URL {
	return &url.URL{Scheme: "twinsan", Host: cluster.String(), Path: fmt.Sprintf("/node/%d", id)}
}

func adminURI(cluster uuid.UUID, name string) *url.URL {
	return &url.URL{Scheme: "twinsan", Host: cluster.String(), Path: "/admin/" + name}
}

// peerOf reads the identity in a certificate whose chain was verified: its only
// URI, twinsan://<cluster uuid>/node/<id> or /admin/<name>.
func peerOf(cluster uuid.UUID, cert *x509.Certificate) (Peer, error) {
	if len(cert.URIs) == 1 && cert.URIs[0].Scheme == "twinsan" && cert.URIs[0].Host == cluster.String() {
		what, name, _ := strings.Cut(strings.TrimPrefix(cert.URIs[0].Path, "/"), "/")
		switch what {
		case "node":
			if id, err := strconv.ParseUint(name, 10, 32); err == nil && id != 0 {
				return Peer{Node: replication.NodeID(id)}, nil
			}
		case "admin":
			if validName(name) {
				return Peer{Admin: name}, nil
			}
		}
	}
	return Peer{}, errorf(ErrNotMember, "the certificate names no member of cluster %s", cluster)
}

// keyPrint identifies a node's key through all its certificates.
func keyPrint(cert *x509.Certificate) [32]byte {
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo)
}

func newKey() (*ecdsa.PrivateKey, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic("cluster: random serial: " + err.Error())
	}
	return n
}

// newCA makes the cluster's certificate authority. It signs leaves only.
func newCA(name string, cluster uuid.UUID, now time.Time) (cert []byte, key *ecdsa.PrivateKey, err error) {
	key, err = newKey()
	if err != nil {
		return nil, nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{"twinsan"}, CommonName: name + " " + cluster.String()},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(caLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	cert, err = x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	return cert, key, err
}

// authority signs certificates of one cluster.
type authority struct {
	cluster uuid.UUID
	cert    *x509.Certificate
	key     crypto.Signer
}

// openAuthority unseals the CA key.
func openAuthority(cluster uuid.UUID, cert []byte, sealed Sealed, k *sealKey) (*authority, error) {
	c, err := x509.ParseCertificate(cert)
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	b, err := k.open(purposeCA, sealed)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(b)
	if err != nil {
		return nil, fmt.Errorf("CA key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("CA key: not a signing key")
	}
	return &authority{cluster, c, signer}, nil
}

// parseCSR checks that the sender has the key of its request. Nothing else in the
// request is believed.
func parseCSR(der []byte) (*x509.CertificateRequest, error) {
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, errorf(ErrInvalid, "certificate request: %v", err)
	}
	if _, ok := r.PublicKey.(*ecdsa.PublicKey); !ok {
		return nil, errorf(ErrInvalid, "certificate request: the key is not ECDSA")
	}
	if err := r.CheckSignature(); err != nil {
		return nil, errorf(ErrInvalid, "certificate request: %v", err)
	}
	return r, nil
}

func newCSR(key crypto.Signer) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}

// signNode signs the certificate of a node, for both ends of connections.
func (a *authority) signNode(key crypto.PublicKey, id replication.NodeID, role Role, addr Addresses, now time.Time) ([]byte, error) {
	t := &x509.Certificate{
		Subject:     pkix.Name{Organization: []string{"twinsan"}, OrganizationalUnit: []string{role.String()}, CommonName: fmt.Sprintf("node %d", id)},
		NotAfter:    now.Add(nodeLife),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{nodeURI(a.cluster, id)},
		DNSNames:    []string{ServerName},
	}
	t.IPAddresses = addr.ips()
	return a.sign(t, key, now)
}

// ips are the addresses that a node's certificate names.
func (a *Addresses) ips() []net.IP {
	var ips []net.IP
	for _, s := range []string{a.Sync, a.Control(), a.API, a.Metrics} {
		host, _, err := net.SplitHostPort(s)
		ip := net.ParseIP(host)
		if err == nil && ip != nil && !ip.IsUnspecified() && !slices.ContainsFunc(ips, ip.Equal) {
			ips = append(ips, ip)
		}
	}
	return ips
}

// names says whether the certificate names all addresses of its node.
func (c *credentials) names(a Addresses) bool {
	for _, ip := range a.ips() {
		if !slices.ContainsFunc(c.leaf.IPAddresses, ip.Equal) {
			return false
		}
	}
	return true
}

// signAdmin signs the certificate of a remote administrator, for clients only.
func (a *authority) signAdmin(key crypto.PublicKey, name string, now time.Time) ([]byte, error) {
	return a.sign(&x509.Certificate{
		Subject:     pkix.Name{Organization: []string{"twinsan"}, OrganizationalUnit: []string{"admin"}, CommonName: name},
		NotAfter:    now.Add(nodeLife),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{adminURI(a.cluster, name)},
	}, key, now)
}

func (a *authority) sign(t *x509.Certificate, key crypto.PublicKey, now time.Time) ([]byte, error) {
	t.SerialNumber = serial()
	t.NotBefore = now.Add(-clockSkew)
	t.KeyUsage = x509.KeyUsageDigitalSignature
	return x509.CreateCertificate(rand.Reader, t, a.cert, key, a.key)
}

// credentials are a node's certificate, its key and the CA.
type credentials struct {
	cert tls.Certificate // leaf and CA
	leaf *x509.Certificate
	ca   *x509.Certificate
	pool *x509.CertPool
}

func newCredentials(leaf, ca []byte, key crypto.Signer) (*credentials, error) {
	l, err := x509.ParseCertificate(leaf)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	c, err := x509.ParseCertificate(ca)
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	pub, ok := l.PublicKey.(*ecdsa.PublicKey)
	if !ok || !pub.Equal(key.Public()) {
		return nil, errors.New("node certificate: it is not for this node's key")
	}
	if err := l.CheckSignatureFrom(c); err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(c)
	return &credentials{
		cert: tls.Certificate{Certificate: [][]byte{leaf, ca}, PrivateKey: key, Leaf: l},
		leaf: l, ca: c, pool: pool,
	}, nil
}

// renewAt is when a certificate is replaced: at two thirds of its life.
func (c *credentials) renewAt() time.Time {
	life := c.leaf.NotAfter.Sub(c.leaf.NotBefore)
	return c.leaf.NotBefore.Add(life * 2 / 3)
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func fromPEM(kind string, b []byte) ([]byte, error) {
	p, _ := pem.Decode(b)
	if p == nil || p.Type != kind {
		return nil, fmt.Errorf("no PEM block %q", kind)
	}
	return p.Bytes, nil
}
