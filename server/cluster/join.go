package cluster

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/raft"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/replication"
)

const (
	// TokenTTL is the life of a join token unless another is asked for; those that
	// Bootstrap makes live InitTokenTTL.
	TokenTTL     = 15 * time.Minute
	InitTokenTTL = time.Hour
	maxTokenTTL  = 24 * time.Hour

	// joinMax bounds a join at both ends.
	joinMax = 30 * time.Second
	// joinBurst attempts are answered at once, then one in joinEvery: a token of 128
	// bits cannot be guessed anyway, this keeps the attempts from costing anything.
	joinBurst = 10
	joinEvery = 2 * time.Second
)

// InitConfig describes a new cluster and its first node.
type InitConfig struct {
	Name     string // of the cluster: 1 to 63 of a-z, 0-9, hyphen
	NodeName string
	Addresses
}

// InitResult is what Bootstrap made.
type InitResult struct {
	Identity Identity
	// The tokens with which a second data node and a witness may join. They are
	// kept nowhere else.
	DataToken, WitnessToken string
	TokensExpire            time.Time
}

// JoinConfig describes a node that joins.
type JoinConfig struct {
	Addr     string // where any data node of the cluster answers (Addresses.Control)
	Token    string
	NodeName string
	Role     Role
	Addresses
}

// Bootstrap makes a new cluster with one data node, in dir. Nothing runs yet:
// Open does. It fails with ErrExists when dir belongs to a cluster already; after
// any other failure it may be called again.
func Bootstrap(ctx context.Context, dir string, cfg InitConfig) (*InitResult, error) {
	if !validName(cfg.Name) {
		return nil, errorf(ErrInvalid, "%q is not a cluster name: %s", cfg.Name, nameRule)
	}
	if !validName(cfg.NodeName) {
		return nil, errorf(ErrInvalid, "%q is not a node name: %s", cfg.NodeName, nameRule)
	}
	if err := checkAddresses(cfg.Addresses); err != nil {
		return nil, errorf(ErrInvalid, "%v", err)
	}
	lock, err := freshDir(dir)
	if err != nil {
		return nil, err
	}
	res, err := bootstrap(dir, cfg, time.Now().UTC().Truncate(time.Millisecond))
	return res, errors.Join(err, lock.Close())
}

func bootstrap(dir string, cfg InitConfig, now time.Time) (*InitResult, error) {
	info := ClusterInfo{
		Name: cfg.Name, UUID: uuid.New(), Created: now,
		Target: "iqn.2026-11.io.twinsan:" + cfg.Name, FeatureLevel: FeatureLevel,
	}
	ca, caKey, err := newCA(cfg.Name, info.UUID, now)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(caKey)
	if err != nil {
		return nil, err
	}
	var fingerprint dedup.Key
	rand.Read(fingerprint[:])
	sk := newSealKey()
	info.CA = ca
	info.CAKey = sk.seal(purposeCA, der)
	info.Fingerprint = sk.seal(purposeFingerprint, fingerprint[:])

	key, err := nodeKey(dir)
	if err != nil {
		return nil, err
	}
	auth, err := openAuthority(info.UUID, ca, info.CAKey, &sk)
	if err != nil {
		return nil, err
	}
	cert, err := auth.signNode(key.Public(), 1, RoleData, cfg.Addresses, now)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(cert)
	if err != nil {
		return nil, err
	}

	dataToken, witnessToken := newTokenParts(ca), newTokenParts(ca)
	expires := now.Add(InitTokenTTL)
	init := &cmdInit{
		Cluster: info,
		Node: Node{
			ID: 1, Name: cfg.NodeName, Role: RoleData, Addresses: cfg.Addresses,
			KeyPrint: keyPrint(leaf), Joined: now,
		},
		Tokens: []token{
			{Hash: dataToken.hash(), Role: RoleData, Expires: expires},
			{Hash: witnessToken.hash(), Role: RoleWitness, Expires: expires},
		},
	}
	if err := bootstrapRaft(filepath.Join(dir, dirRaft), init, now); err != nil {
		return nil, err
	}
	id := Identity{
		Cluster: info.Name, UUID: info.UUID, Created: now, Target: info.Target, Node: 1, Name: cfg.NodeName,
		Role: RoleData, Addresses: cfg.Addresses, CAKey: info.CAKey, Fingerprint: info.Fingerprint,
	}
	if err := writeMember(dir, &id, cert, ca, sk[:]); err != nil {
		return nil, err
	}
	return &InitResult{id, dataToken.String(), witnessToken.String(), expires}, nil
}

// bootstrapRaft writes the first two entries of the log: a configuration with one
// voter and the init command. They commit when that voter becomes leader.
func bootstrapRaft(dir string, init *cmdInit, now time.Time) (err error) {
	env := envelope{Now: now, By: 1}
	rand.Read(env.Request[:])
	data, err := encodeCommand(env, init)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	quiet := newRaftLog(slog.New(slog.DiscardHandler))
	store, snaps, err := openRaftStore(dir, quiet, func(error) {})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	conf := raft.DefaultConfig()
	conf.LocalID = raftID(1)
	conf.Logger = quiet
	servers := raft.Configuration{Servers: []raft.Server{{
		Suffrage: raft.Voter, ID: raftID(1), Address: raftAddress(1, init.Node.Control()),
	}}}
	if err := raft.BootstrapCluster(conf, store, store, snaps, nil, servers); err != nil {
		return fmt.Errorf("bootstrap raft: %w", err)
	}
	return store.StoreLog(&raft.Log{Index: 2, Term: 1, Type: raft.LogCommand, Data: data, AppendedAt: now})
}

// nodeKey returns the node's key, which an earlier attempt may have made: a join
// whose answer was lost is recognised by it.
func nodeKey(dir string) (crypto.Signer, error) {
	key, err := readKey(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if key, err = newKey(); err == nil {
			err = writeKey(dir, key)
		}
	}
	if err != nil {
		return nil, err
	}
	return key, nil
}

// writeMember writes the files of a member; the identity comes last.
func writeMember(dir string, id *Identity, cert, ca, sk []byte) error {
	if len(sk) > 0 {
		if err := writeFile(dir, fileSealKey, sk); err != nil {
			return err
		}
	}
	if err := writeFile(dir, fileCA, pemOf("CERTIFICATE", ca)); err != nil {
		return err
	}
	if err := writeFile(dir, fileNodeCert, pemOf("CERTIFICATE", cert)); err != nil {
		return err
	}
	b, err := marshalIdentity(id)
	if err != nil {
		return err
	}
	return writeFile(dir, fileIdentity, b)
}

// joinRequest is the one frame that a joining node sends.
type joinRequest struct {
	Secret    [16]byte
	Name      string
	Role      Role
	Addresses Addresses
	CSR       []byte
}

func (r *joinRequest) walk(c *codec) {
	c.raw(r.Secret[:])
	text(c, &r.Name)
	u8(c, &r.Role)
	r.Addresses.walk(c)
	blob(c, &r.CSR)
	r.Addresses.walkManagement(c)
}

// encodeJoin encodes a request in a form that a cluster of any level knows, if it
// can be said in that; decodeJoin is its inverse.
func encodeJoin(r *joinRequest) ([]byte, error) {
	if r.Addresses.Management == "" {
		return encodeVersion(r, joinVersion)
	}
	return encode(r)
}

func decodeJoin(b []byte, r *joinRequest) error {
	if decodeVersion(b, joinVersion, r) == nil {
		return nil
	}
	*r = joinRequest{}
	if err := decode(b, r); err != nil {
		return err
	}
	if r.Addresses.Management == "" {
		return fmt.Errorf("%w: the newer form of a join without need", errEncoding)
	}
	return nil
}

// joinVersion is the encoding of a join without a management address, and of
// every answer.
const joinVersion = 4

// joinAnswer is the one frame that it gets. SealKey, CAKey and Fingerprint are
// empty for a witness.
type joinAnswer struct {
	Code    code
	Text    string
	Node    replication.NodeID
	Cert    []byte
	Cluster ClusterInfo
	SealKey []byte
}

func (a *joinAnswer) walk(c *codec) {
	u8(c, &a.Code)
	text(c, &a.Text)
	u32(c, &a.Node)
	blob(c, &a.Cert)
	a.Cluster.walk(c)
	blob(c, &a.SealKey)
}

// Kinds of the frames of twinsan-join/1.
const (
	joinAsk    = 1
	joinReturn = 2
)

// JoinCluster makes dir a member of the cluster that issued the token. Nothing
// runs yet: Open does. It fails with ErrToken when the cluster at Addr is another
// one or refuses the token, and with ErrExists when dir or the name or address is
// taken. After a lost answer it may be repeated with the same token and directory.
func JoinCluster(ctx context.Context, dir string, cfg JoinConfig) error {
	tok, err := parseToken(cfg.Token)
	if err != nil {
		return err
	}
	if err := checkAddresses(cfg.Addresses); err != nil {
		return errorf(ErrInvalid, "%v", err)
	}
	lock, err := freshDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(joinCluster(ctx, dir, cfg, tok), lock.Close())
}

func joinCluster(ctx context.Context, dir string, cfg JoinConfig, tok tokenParts) error {
	key, err := nodeKey(dir)
	if err != nil {
		return err
	}
	csr, err := newCSR(key)
	if err != nil {
		return err
	}
	a, ca, err := askToJoin(ctx, cfg.Addr, tok, &joinRequest{tok.Secret, cfg.NodeName, cfg.Role, cfg.Addresses, csr})
	if err != nil {
		return err
	}
	if a.Code != codeOK {
		r := result{Code: a.Code, Text: a.Text}
		return r.err()
	}
	if string(a.Cluster.CA) != string(ca) {
		return errorf(ErrToken, "the cluster at %s answered with another CA than it showed", cfg.Addr)
	}
	if _, err := newCredentials(a.Cert, ca, key); err != nil {
		return fmt.Errorf("join: %w", err)
	}
	id := Identity{
		Cluster: a.Cluster.Name, UUID: a.Cluster.UUID, Created: a.Cluster.Created, Target: a.Cluster.Target,
		Node: a.Node, Name: cfg.NodeName, Role: cfg.Role, Addresses: cfg.Addresses,
		CAKey: a.Cluster.CAKey, Fingerprint: a.Cluster.Fingerprint,
	}
	if cfg.Role == RoleData && len(a.SealKey) != len(sealKey{}) {
		return errors.New("join: the answer has no seal key")
	}
	return writeMember(dir, &id, a.Cert, ca, a.SealKey)
}

// askToJoin sends the request, and with it the secret of the token, only after
// the other side has proved to be the cluster that issued it.
func askToJoin(ctx context.Context, addr string, tok tokenParts, req *joinRequest) (*joinAnswer, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, joinMax)
	defer cancel()
	var ca []byte
	t, err := dialTLS(ctx, addr, &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{protoJoin},
		// There is no root to trust yet: VerifyConnection verifies against the
		// certificate that the token names.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) (err error) {
			ca, err = verifyByDigest(cs, tok.CA)
			return err
		},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("connect to the cluster at %s: %w", addr, err)
	}
	defer t.Close()
	body, err := encodeJoin(req)
	if err != nil {
		return nil, nil, errorf(ErrInvalid, "%v", err)
	}
	kind, b, err := roundTrip(ctx, t, joinAsk, body)
	if err != nil {
		return nil, nil, fmt.Errorf("ask %s to join: %w", addr, err)
	}
	a := new(joinAnswer)
	if err := decodeVersion(b, joinVersion, a); err != nil || kind != joinReturn {
		return nil, nil, fmt.Errorf("ask %s to join: %w", addr, errEncoding)
	}
	return a, ca, nil
}

// verifyByDigest verifies a server's chain to the CA with the given digest.
func verifyByDigest(cs tls.ConnectionState, digest [32]byte) ([]byte, error) {
	for _, ca := range cs.PeerCertificates[1:] {
		if sha256.Sum256(ca.Raw) != digest {
			continue
		}
		pool := x509.NewCertPool()
		pool.AddCert(ca)
		_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, DNSName: ServerName})
		return ca.Raw, err
	}
	return nil, errorf(ErrToken, "the cluster there is not the one that issued the token")
}

// joinGate limits the rate and the number of joins at one node.
type joinGate struct {
	mu      sync.Mutex
	tokens  int
	last    time.Time
	running int
}

func (g *joinGate) enter(now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.last.IsZero() {
		g.tokens, g.last = joinBurst, now
	}
	if n := int(now.Sub(g.last) / joinEvery); n > 0 {
		g.tokens = min(joinBurst, g.tokens+n)
		g.last = g.last.Add(time.Duration(n) * joinEvery)
	}
	if g.tokens == 0 || g.running >= joinBurst {
		return false
	}
	g.tokens--
	g.running++
	return true
}

func (g *joinGate) leave() {
	g.mu.Lock()
	g.running--
	g.mu.Unlock()
}

// serveJoin answers one joining node.
func (c *Cluster) serveJoin(conn *tls.Conn) {
	if !c.joins.enter(c.now()) {
		return
	}
	defer c.joins.leave()
	ctx, cancel := context.WithTimeout(c.ctx, joinMax)
	defer cancel()
	// The listener no longer tracks this connection; the end of ctx ends it.
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if conn.SetReadDeadline(time.Now().Add(c.cfg.handshakeMax)) != nil {
		return
	}
	kind, b, err := readFrame(conn)
	if err != nil || kind != joinAsk {
		return
	}
	var req joinRequest
	var a joinAnswer
	if err := decodeJoin(b, &req); err != nil {
		a = joinAnswer{Code: codeInvalid, Text: err.Error()}
	} else if err := c.admit(ctx, &req, &a); err != nil {
		a = joinAnswer{Code: codeOf(err), Text: err.Error()}
	}
	if b, err = encodeVersion(&a, joinVersion); err == nil {
		err = writeFrame(conn, joinReturn, b)
	}
	if err != nil {
		c.log.Warn("answer to a joining node was lost", "node", req.Name, "err", err)
	}
}

func codeOf(err error) code {
	for k, e := range codeErrors {
		if errors.Is(err, e) {
			return k
		}
	}
	return codeRefused
}

// admit takes a node in: the quorum checks and consumes the token and hands out
// the id, then this node signs the certificate.
func (c *Cluster) admit(ctx context.Context, req *joinRequest, a *joinAnswer) error {
	if c.seal == nil {
		return errorf(ErrRefused, "%s is a witness: join through a data node", c.id.Name)
	}
	csr, err := parseCSR(req.CSR)
	if err != nil {
		return err
	}
	r, err := c.proposeSync(ctx, &cmdJoin{
		Token: tokenParts{Secret: req.Secret}.hash(), Name: req.Name, Role: req.Role,
		Addresses: req.Addresses, KeyPrint: sha256.Sum256(csr.RawSubjectPublicKeyInfo),
	})
	if err != nil {
		return err
	}
	s := c.State()
	auth, err := openAuthority(s.Cluster.UUID, s.Cluster.CA, s.Cluster.CAKey, c.seal)
	if err != nil {
		return err
	}
	a.Node = replication.NodeID(r.ID)
	a.Cluster = s.Cluster
	if a.Cert, err = auth.signNode(csr.PublicKey, a.Node, req.Role, req.Addresses, c.now()); err != nil {
		return err
	}
	if req.Role == RoleData {
		a.SealKey = c.seal[:]
	} else {
		a.Cluster.CAKey, a.Cluster.Fingerprint = nil, nil
	}
	return nil
}
