package cluster

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/replication"
)

// stranger makes credentials signed by ca for a node id of a cluster.
func stranger(t testing.TB, auth *authority, id replication.NodeID) *credentials {
	t.Helper()
	key := must(newKey())(t)
	cert := must(auth.signNode(key.Public(), id, RoleData, Addresses{}, time.Now()))(t)
	return must(newCredentials(cert, auth.cert.Raw, key))(t)
}

func labAuthority(t testing.TB, m *member) *authority {
	t.Helper()
	return must(openAuthority(m.id.UUID, m.creds.Load().ca.Raw, m.id.CAKey, m.seal))(t)
}

// knock dials a member with credentials and reports whether it was welcomed.
func knock(t testing.TB, m *member, proto string, certs ...tls.Certificate) error {
	t.Helper()
	conn, err := dialTLS(testContext(t), m.addr.Sync, &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: ServerName, RootCAs: m.creds.Load().pool,
		Certificates: certs, NextProtos: []string{proto},
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	var b [1]byte
	_, err = io.ReadFull(conn, b[:])
	return err
}

func TestOutsiders(t *testing.T) {
	l := newLab(t)
	a := l.members["a"]
	l.ready(a)
	l.crash("a")
	cfg := l.members["a"].cfg
	cfg.OnData = func(_ replication.NodeID, c net.Conn) { c.Close() }
	cfg.handshakeMax = time.Second
	a = l.open("a", cfg)
	l.ready(a)
	own := a.creds.Load().cert
	for _, proto := range []string{protoRaft, protoRPC, protoData} {
		if err := knock(t, a, proto, own); err != nil {
			t.Errorf("a member may not speak %s: %v", proto, err)
		}
	}

	caDER, caKey, err := newCA("lab", a.id.UUID, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	foreign := &authority{a.id.UUID, must(x509.ParseCertificate(caDER))(t), caKey}
	auth := labAuthority(t, a)
	otherCluster := *auth
	otherCluster.cluster = uuid.New()
	expired := must(auth.signNode(own.Leaf.PublicKey, 1, RoleData, Addresses{}, time.Now().Add(-nodeLife-time.Hour)))(t)
	admin := must(auth.signAdmin(own.Leaf.PublicKey, "root", time.Now()))(t)
	withOwnKey := func(cert []byte) tls.Certificate {
		return must(newCredentials(cert, auth.cert.Raw, own.PrivateKey.(crypto.Signer)))(t).cert
	}
	tests := []struct {
		what  string
		certs []tls.Certificate
	}{
		{"no certificate", nil},
		{"certificate of another CA", []tls.Certificate{stranger(t, foreign, 1).cert}},
		{"certificate for another cluster", []tls.Certificate{stranger(t, &otherCluster, 1).cert}},
		{"another key for a member's id", []tls.Certificate{stranger(t, auth, 1).cert}},
		{"expired", []tls.Certificate{withOwnKey(expired)}},
		{"administrator", []tls.Certificate{withOwnKey(admin)}},
	}
	for _, tt := range tests {
		for _, proto := range []string{protoRaft, protoRPC, protoData} {
			if err := knock(t, a, proto, tt.certs...); err == nil {
				t.Errorf("%s: welcomed for %s", tt.what, proto)
			}
		}
	}
	// A node that joined while this one was away may speak raft, and nothing else.
	future := stranger(t, auth, 9).cert
	if err := knock(t, a, protoRaft, future); err != nil {
		t.Errorf("a newer member may not speak raft: %v", err)
	}
	for _, proto := range []string{protoRPC, protoData} {
		if err := knock(t, a, proto, future); err == nil {
			t.Errorf("an unknown node may speak %s", proto)
		}
	}
	if err := knock(t, a, "h2", own); err == nil {
		t.Error("unknown protocol is served")
	}
	if err := knock(t, a, protoJoin); err == nil {
		t.Error("a silent join gets an answer")
	}

	// The other direction: another node answers at the address of node 2.
	tok := must(a.CreateToken(testContext(t), RoleData, 0))(t)
	dir := filepath.Join(t.TempDir(), "b")
	if err := JoinCluster(testContext(t), dir, JoinConfig{Addr: a.addr.Sync, Token: tok.Text, NodeName: "b", Role: RoleData, Addresses: Addresses{Sync: "localhost:" + port(t, a.addr.Sync)}}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Dial(testContext(t), 2); !errors.Is(err, ErrNotMember) {
		t.Errorf("node 1 passes for node 2: %v", err)
	}
	if _, err := a.Dial(testContext(t), 7); !errors.Is(err, ErrNotFound) {
		t.Errorf("dial of an unknown node: %v", err)
	}
}

func port(t testing.TB, addr string) string {
	_, p, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestStalledHandshakes(t *testing.T) {
	l := newLab(t)
	l.ready(l.members["a"])
	l.crash("a")
	cfg := l.members["a"].cfg
	cfg.handshakeMax = 300 * time.Millisecond
	a := l.open("a", cfg)
	l.ready(a)
	// A flood from one address is bounded, and each of its connections is cut.
	var conns []net.Conn
	for range maxHandshakesPerIP + 20 {
		conn, err := net.Dial("tcp", a.addr.Sync)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	for _, conn := range conns {
		if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("a stalled connection was not cut: %v", err)
		}
	}
	a.lis.mu.Lock()
	half, halves := len(a.lis.half), a.lis.halves
	a.lis.mu.Unlock()
	if half != 0 || halves != 0 {
		eventually(t, "all handshakes are over", func() bool {
			a.lis.mu.Lock()
			defer a.lis.mu.Unlock()
			return len(a.lis.half) == 0 && a.lis.halves == 0
		})
	}
	if err := knock(t, a, protoRPC, a.creds.Load().cert); err != nil {
		t.Errorf("after the flood: %v", err)
	}
}

func TestConnectionsPerPeer(t *testing.T) {
	l := newLab(t)
	a := l.members["a"]
	l.ready(a)
	var conns []net.Conn
	for range maxConns + 2 {
		conn, err := a.dial(testContext(t), 1, "", protoRPC)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	served := 0
	for _, conn := range conns {
		if status, b, err := roundTrip(testContext(t), conn, rpcPing, nil); err == nil && status == rpcOK && len(b) > 0 {
			served++
		}
	}
	if served != maxConns {
		t.Errorf("%d connections of one peer are served, want %d", served, maxConns)
	}
}

func TestData(t *testing.T) {
	l := newLab(t)
	a := l.members["a"]
	l.ready(a)
	got := make(chan replication.NodeID, 1)
	b := l.join("b", RoleData, l.init.DataToken)
	l.ready(b)
	l.crash("b")
	cfg := l.members["b"].cfg
	cfg.OnData = func(peer replication.NodeID, c net.Conn) {
		got <- peer
		io.Copy(c, c)
		c.Close()
	}
	b = l.open("b", cfg)
	l.ready(b)
	conn := must(a.Dial(testContext(t), 2))(t)
	if peer := <-got; peer != 1 {
		t.Errorf("peer %d", peer)
	}
	if _, err := conn.Write([]byte("echo")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "echo" {
		t.Errorf("%q %v", buf, err)
	}
	conn.Close()

	// A witness neither makes nor takes data connections.
	w := l.join("w", RoleWitness, l.init.WitnessToken)
	l.ready(w)
	if _, err := w.Dial(testContext(t), 1); err == nil {
		t.Error("a witness has a data connection")
	}
	if _, err := a.Dial(testContext(t), 3); err == nil {
		t.Error("a data connection to a witness")
	}
}

func TestRemovedNode(t *testing.T) {
	for _, gone := range []string{"a", "b"} {
		t.Run(gone, func(t *testing.T) {
			l, a, b, w := full(t)
			ctx := testContext(t)
			eventually(t, "a leads", func() bool { return a.Leader() == a.Self() })
			out, rest := l.members[gone], a
			if gone == "a" {
				rest = b // the leader itself goes
			}
			if err := rest.RemoveNode(ctx, out.Self()); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the removed node is refused", func() bool {
				_, err := out.Ping(ctx, w.Self())
				_, err2 := out.Dial(ctx, rest.Self())
				return err != nil && err2 != nil
			})
			eventually(t, "the other data node votes alone", func() bool {
				return rest.Leader() == rest.Self() && slices.Equal(rest.Voters(), []replication.NodeID{rest.Self()})
			})
			l.agree2(rest.id.Name, "w")
			if _, err := out.Sync(shortContext(t)); err == nil {
				t.Error("a removed node reads linearizably")
			}
		})
	}
}

func shortContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func TestRenewal(t *testing.T) {
	l := newLab(t)
	l.ready(l.members["a"])
	w := l.join("w", RoleWitness, l.init.WitnessToken)
	l.ready(w)
	old := l.members["a"].creds.Load().leaf
	if at := l.members["a"].creds.Load().renewAt(); at.Before(time.Now().Add(59*24*time.Hour)) || at.After(time.Now().Add(61*24*time.Hour)) {
		t.Errorf("renewal at %s", at)
	}
	// A witness asks a data node.
	before := w.creds.Load().leaf
	if err := w.renew(testContext(t)); err != nil {
		t.Fatal(err)
	}
	after := w.creds.Load().leaf
	if after.SerialNumber.Cmp(before.SerialNumber) == 0 || keyPrint(after) != keyPrint(before) || !slices.Contains(after.Subject.OrganizationalUnit, "witness") {
		t.Errorf("renewed certificate %v", after.Subject)
	}
	if disk := must(readCredentials(w.cfg.Dir))(t); disk.leaf.SerialNumber.Cmp(after.SerialNumber) != 0 {
		t.Error("the renewed certificate is not on disk")
	}
	// It does not sign for another key.
	other := must(newKey())(t)
	if _, _, err := w.call(testContext(t), 1, rpcSign, must(newCSR(other))(t)); err == nil {
		t.Error("a certificate for a foreign key")
	}

	// A data node that was off for longer than its certificate lives renews it alone.
	l.crash("w")
	l.crash("a")
	cfg := l.members["a"].cfg
	cfg.now = func() time.Time { return time.Now().Add(nodeLife + 24*time.Hour) }
	a := l.open("a", cfg)
	l.ready(a)
	if leaf := a.creds.Load().leaf; leaf.SerialNumber.Cmp(old.SerialNumber) == 0 || leaf.NotAfter.Before(cfg.now()) {
		t.Errorf("certificate until %s", leaf.NotAfter)
	}
}

func TestAdminCertificate(t *testing.T) {
	l := newLab(t)
	a := l.members["a"]
	l.ready(a)
	key := must(newKey())(t)
	cert, ca, expires, err := a.IssueAdminCertificate(testContext(t), must(newCSR(key))(t), "alice")
	if err != nil || expires.Before(time.Now()) {
		t.Fatal(err)
	}
	_, _, _, err = a.IssueAdminCertificate(testContext(t), must(newCSR(key))(t), "Not A Name")
	wantErr(t, err, ErrInvalid)
	_, _, _, err = a.IssueAdminCertificate(testContext(t), []byte("junk"), "alice")
	wantErr(t, err, ErrInvalid)
	if e := a.State().Events; e[len(e)-1].Code != "admin-certificate" || !strings.Contains(e[len(e)-1].Text, "alice") {
		t.Error("no event")
	}

	serve := func(client *tls.Config) (Peer, error) {
		c1, c2 := net.Pipe()
		defer c1.Close()
		s := tls.Server(c2, a.ServerTLS())
		defer s.Close()
		done := make(chan error, 1)
		go func() {
			err := tls.Client(c1, client).HandshakeContext(testContext(t))
			done <- err
			io.Copy(io.Discard, c1)
		}()
		err := s.HandshakeContext(testContext(t))
		if err := errors.Join(err, <-done); err != nil {
			return Peer{}, err
		}
		return a.PeerOf(s.ConnectionState())
	}
	pool := x509.NewCertPool()
	pool.AddCert(must(x509.ParseCertificate(ca))(t))
	conf := &tls.Config{ServerName: ServerName, RootCAs: pool, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}}
	if p, err := serve(conf); err != nil || p.Admin != "alice" || p.Node != 0 {
		t.Errorf("%+v %v", p, err)
	}
	if p, err := serve(a.ClientTLS(1)); err != nil || p.Node != 1 {
		t.Errorf("%+v %v", p, err)
	}
	conf.Certificates[0] = stranger(t, labAuthority(t, a), 5).cert
	if p, err := serve(conf); err == nil {
		t.Errorf("a node that never joined: %+v", p)
	}
}
