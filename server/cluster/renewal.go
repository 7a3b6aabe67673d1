package cluster

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"time"

	"github.com/twinsan/twinsan/replication"
)

// renewRetry is the pause after a failed renewal. The last third of a
// certificate's life, a month, is left for retries.
const renewRetry = 10 * time.Minute

// renewLoop replaces the node's certificate at two thirds of its life. Open
// connections go on with the old one.
func (c *Cluster) renewLoop() {
	for {
		wait := c.creds.Load().renewAt().Sub(c.now())
		if wait <= 0 {
			ctx, cancel := context.WithTimeout(c.ctx, proposeMax)
			err := c.renew(ctx)
			cancel()
			if err == nil {
				continue
			}
			if c.ctx.Err() == nil {
				c.log.Warn("certificate of this node was not renewed", "err", err, "expires", c.creds.Load().leaf.NotAfter)
			}
			wait = renewRetry
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-c.ctx.Done():
			t.Stop()
			return
		}
	}
}

func (c *Cluster) renew(ctx context.Context) error {
	if c.seal != nil {
		return c.renewAlone()
	}
	key, ok := c.creds.Load().cert.PrivateKey.(crypto.Signer)
	if !ok {
		return errors.New("node key: not a signing key")
	}
	csr, err := newCSR(key)
	if err != nil {
		return err
	}
	err = errors.New("no data node is known")
	for _, n := range c.State().DataNodes() {
		var cert []byte
		if cert, _, err = c.call(ctx, n, rpcSign, csr); err == nil {
			return c.adopt(cert)
		}
	}
	return err
}

// renewAlone signs this node's certificate with the CA key, which every data node
// holds sealed. It needs nobody else, so that nodes which were all switched off
// for longer than a certificate lives come up again.
func (c *Cluster) renewAlone() error {
	cr := c.creds.Load()
	auth, err := openAuthority(c.id.UUID, cr.ca.Raw, c.id.CAKey, c.seal)
	if err != nil {
		return err
	}
	cert, err := auth.signNode(cr.leaf.PublicKey, c.id.Node, c.id.Role, c.addr, c.now())
	if err != nil {
		return err
	}
	return c.adopt(cert)
}

// adopt makes a certificate the node's own, on disk first.
func (c *Cluster) adopt(cert []byte) error {
	old := c.creds.Load()
	key, ok := old.cert.PrivateKey.(crypto.Signer)
	if !ok {
		return errors.New("node key: not a signing key")
	}
	cr, err := newCredentials(cert, old.ca.Raw, key)
	if err != nil {
		return err
	}
	if err := writeFile(c.cfg.Dir, fileNodeCert, pemOf("CERTIFICATE", cert)); err != nil {
		return err
	}
	c.creds.Store(cr)
	c.log.Info("certificate of this node was renewed", "expires", cr.leaf.NotAfter)
	return nil
}

// signFor signs a new certificate for a member with the key that it joined with.
func (c *Cluster) signFor(peer replication.NodeID, der []byte) ([]byte, error) {
	if c.seal == nil {
		return nil, errorf(ErrRefused, "%s is a witness and signs nothing", c.id.Name)
	}
	csr, err := parseCSR(der)
	if err != nil {
		return nil, err
	}
	s := c.State()
	n := s.Node(peer)
	if n == nil || n.KeyPrint != sha256.Sum256(csr.RawSubjectPublicKeyInfo) {
		return nil, errorf(ErrNotMember, "node %d did not join with this key", peer)
	}
	auth, err := openAuthority(s.Cluster.UUID, s.Cluster.CA, s.Cluster.CAKey, c.seal)
	if err != nil {
		return nil, err
	}
	return auth.signNode(csr.PublicKey, peer, n.Role, n.Addresses, c.now())
}

// IssueAdminCertificate signs a client certificate for a remote administrator,
// valid for 90 days, from a PKCS #10 request in DER. It returns the certificate
// and the CA's, both DER. A witness cannot do it (ErrRefused).
func (c *Cluster) IssueAdminCertificate(ctx context.Context, csrDER []byte, name string) (cert, ca []byte, expires time.Time, err error) {
	if !validName(name) {
		return nil, nil, expires, errorf(ErrInvalid, "%q is not an administrator's name: %s", name, nameRule)
	}
	if c.seal == nil {
		return nil, nil, expires, errorf(ErrRefused, "%s is a witness and signs nothing: ask a data node", c.id.Name)
	}
	csr, err := parseCSR(csrDER)
	if err != nil {
		return nil, nil, expires, err
	}
	cr := c.creds.Load()
	auth, err := openAuthority(c.id.UUID, cr.ca.Raw, c.id.CAKey, c.seal)
	if err != nil {
		return nil, nil, expires, err
	}
	now := c.now()
	// The record comes first: no certificate without its trace.
	if err := c.AddEvent(ctx, Warning, "admin-certificate", "certificate issued for administrator "+name); err != nil {
		return nil, nil, expires, err
	}
	cert, err = auth.signAdmin(csr.PublicKey, name, now)
	return cert, cr.ca.Raw, now.Add(nodeLife), err
}

// ServerTLS is the configuration of another listener of this node, such as the
// admin API: TLS 1.3, the node's newest certificate, and a client certificate of
// the cluster that belongs to a member or an administrator.
func (c *Cluster) ServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			cr := c.creds.Load()
			return &tls.Config{
				MinVersion:             tls.VersionTLS13,
				Time:                   c.now,
				Certificates:           []tls.Certificate{cr.cert},
				ClientAuth:             tls.RequireAndVerifyClientCert,
				ClientCAs:              cr.pool,
				NextProtos:             []string{"h2", "http/1.1"},
				SessionTicketsDisabled: true,
				VerifyConnection: func(cs tls.ConnectionState) error {
					_, err := c.PeerOf(cs)
					return err
				},
			}, nil
		},
	}
}

// PeerOf says who is at the other end of a connection under ServerTLS. It fails
// with ErrNotMember for a node that was removed.
func (c *Cluster) PeerOf(cs tls.ConnectionState) (Peer, error) {
	if len(cs.PeerCertificates) == 0 {
		return Peer{}, errorf(ErrNotMember, "the client has no certificate")
	}
	p, err := peerOf(c.id.UUID, cs.PeerCertificates[0])
	if err == nil && p.Node != 0 {
		n := c.State().Node(p.Node)
		if n == nil || n.KeyPrint != keyPrint(cs.PeerCertificates[0]) {
			err = errorf(ErrNotMember, "node %d is not a member", p.Node)
		}
	}
	return p, err
}

// ClientTLS is the configuration for a connection of this node to another
// listener of node n under ServerTLS.
func (c *Cluster) ClientTLS(n replication.NodeID) *tls.Config {
	return c.dialTLS(n, "h2")
}
