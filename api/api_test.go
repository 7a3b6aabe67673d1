package api_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/twinsan/twinsan/api"
	"github.com/twinsan/twinsan/api/apitest"
	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var _ api.Backend = (*apitest.Backend)(nil)

func serveUnix(t *testing.T, b *apitest.Backend) *api.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "api.sock")
	s, err := api.Serve(api.Config{Backend: b, Socket: path})
	if err != nil {
		t.Fatal(err)
	}
	c, err := api.Dial("unix://"+path, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		s.Close()
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left behind: %v", err)
		}
	})
	return c
}

func TestStatusCrossesTheAPI(t *testing.T) {
	b := apitest.New()
	b.State.Problems = []server.Problem{{Severity: server.Degraded, Code: "x", Cause: "c", Risk: "r", Remedy: "do"}}
	c := serveUnix(t, b)
	s, err := c.Cluster.GetStatus(t.Context(), &v1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if s.Cluster != "lab" || api.Word(s.Health, "HEALTH_") != "healthy" || len(s.Nodes) != 3 || s.Nodes[2].Role != v1.Role_ROLE_WITNESS || s.Nodes[2].Pool != nil {
		t.Errorf("status %v", s)
	}
	v := s.Volumes[0]
	if v.SizeBytes != 2<<40 || v.State != v1.VolumeState_VOLUME_STATE_ONLINE || v.Replicas[1].State != v1.ReplicaState_REPLICA_STATE_IN_SYNC || v.Lun != 0 {
		t.Errorf("volume %v", v)
	}
	if p := s.Problems[0]; p.Severity != v1.Health_HEALTH_DEGRADED || p.Remedy != "do" {
		t.Errorf("problem %v", p)
	}
}

// Each error has its code, and keeps its text.
func TestErrorsHaveCodes(t *testing.T) {
	b := apitest.New()
	c := serveUnix(t, b)
	for _, test := range []struct {
		err  error
		code codes.Code
	}{
		{server.ErrNotFound, codes.NotFound}, {server.ErrExists, codes.AlreadyExists}, {server.ErrInvalid, codes.InvalidArgument},
		{server.ErrRefused, codes.FailedPrecondition}, {server.ErrNoQuorum, codes.Unavailable}, {server.ErrNotReady, codes.Unavailable},
		{server.ErrOutcomeUnknown, codes.Unknown}, {context.DeadlineExceeded, codes.DeadlineExceeded}, {io.ErrShortWrite, codes.Internal},
	} {
		b.Mu.Lock()
		b.Fail = fmt.Errorf("volume x: %w", test.err)
		b.Mu.Unlock()
		_, err := c.Volumes.ListVolumes(t.Context(), &v1.ListVolumesRequest{})
		if status.Code(err) != test.code || !strings.Contains(err.Error(), "volume x: "+test.err.Error()) {
			t.Errorf("%v: got %v", test.err, err)
		}
	}
}

func TestPanicFailsOneCall(t *testing.T) {
	b := apitest.New()
	b.Panic = true
	c := serveUnix(t, b)
	_, err := c.Hosts.ListHosts(t.Context(), &v1.ListHostsRequest{})
	if status.Code(err) != codes.Internal {
		t.Errorf("got %v", err)
	}
	b.Mu.Lock()
	b.Panic = false
	b.Mu.Unlock()
	if _, err := c.Hosts.ListHosts(t.Context(), &v1.ListHostsRequest{}); err != nil {
		t.Errorf("after it: %v", err)
	}
}

func TestBadRequests(t *testing.T) {
	b := apitest.New()
	c := serveUnix(t, b)
	calls := len(b.Calls)
	for name, call := range map[string]func() error{
		"volume name": func() error {
			_, err := c.Volumes.CreateVolume(t.Context(), &v1.CreateVolumeRequest{Name: "a/b", SizeBytes: 1 << 30})
			return err
		},
		"request id": func() error {
			_, err := c.Volumes.CreateVolume(t.Context(), &v1.CreateVolumeRequest{Name: "ab", RequestId: strings.Repeat("x", 65)})
			return err
		},
		"host name": func() error {
			_, err := c.Hosts.AddHost(t.Context(), &v1.AddHostRequest{Name: ""})
			return err
		},
		"token life": func() error {
			_, err := c.Cluster.CreateToken(t.Context(), &v1.CreateTokenRequest{Ttl: durationpb.New(1000 * time.Hour)})
			return err
		},
		"negative token life": func() error {
			_, err := c.Cluster.CreateToken(t.Context(), &v1.CreateTokenRequest{Ttl: durationpb.New(-time.Hour)})
			return err
		},
		"token role": func() error {
			_, err := c.Cluster.CreateToken(t.Context(), &v1.CreateTokenRequest{Role: 77})
			return err
		},
		"certificate name": func() error {
			_, err := c.Cluster.IssueCertificate(t.Context(), &v1.IssueCertificateRequest{Name: "../x"})
			return err
		},
		"certificate request": func() error {
			_, err := c.Cluster.IssueCertificate(t.Context(), &v1.IssueCertificateRequest{Name: "x", Csr: make([]byte, 1<<20)})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(b.Calls) != calls {
		t.Errorf("a bad request reached the backend: %v", b.Calls[calls:])
	}
}

func TestCreateVolumeIsIdempotent(t *testing.T) {
	c := serveUnix(t, apitest.New())
	r := &v1.CreateVolumeRequest{Name: "vm", SizeBytes: 1 << 30, RequestId: "once"}
	first, err := c.Volumes.CreateVolume(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	second, err := c.Volumes.CreateVolume(t.Context(), r)
	if err != nil || first.Uuid != second.Uuid {
		t.Errorf("got %v, %v", second, err)
	}
}

func TestEventsFollow(t *testing.T) {
	b := apitest.New()
	c := serveUnix(t, b)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := c.Cluster.ListEvents(ctx, &v1.ListEventsRequest{After: 1, Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := stream.Recv(); err != nil || e.Number != 2 || e.Severity != v1.Severity_SEVERITY_WARNING {
		t.Fatalf("got %v, %v", e, err)
	}
	b.Emit(server.Event{Number: 3, Time: apitest.Epoch, Severity: server.Failure, Code: "x"})
	if e, err := stream.Recv(); err != nil || e.Number != 3 {
		t.Fatalf("got %v, %v", e, err)
	}
	cancel()
	if _, err := stream.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("after cancel: %v", err)
	}
}

func TestSocketIsNotStolen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	s, err := api.Serve(api.Config{Backend: apitest.New(), Socket: path})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if second, err := api.Serve(api.Config{Backend: apitest.New(), Socket: path}); err == nil {
		second.Close()
		t.Error("a second server took the socket of a living one")
	}
}

func TestDeadSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := api.Serve(api.Config{Backend: apitest.New(), Socket: path})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// authority is a CA as a cluster has one.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{cert, key, x509.NewCertPool()}
	a.pool.AddCert(cert)
	return a
}

func (a *authority) issue(t *testing.T, uri string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	if uri != "" {
		u, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = []*url.URL{u}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *authority) serve(t *testing.T, b *apitest.Backend, id int) string {
	t.Helper()
	cert := a.issue(t, fmt.Sprintf("twinsan://uuid/node/%d", id))
	s, err := api.Serve(api.Config{Backend: b, Address: "127.0.0.1:0", TLS: &tls.Config{Certificates: []tls.Certificate{*cert}, ClientCAs: a.pool}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s.Addr().String()
}

// peerTLS is what a node uses towards others.
func (a *authority) peerTLS(cert *tls.Certificate) func(replication.NodeID) *tls.Config {
	return func(want replication.NodeID) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{*cert}, InsecureSkipVerify: true, VerifyConnection: func(s tls.ConnectionState) error {
			if _, name, err := api.Identity(s.PeerCertificates[0]); err != nil || name != fmt.Sprint(want) {
				return fmt.Errorf("node %s answers in the place of node %d", name, want)
			}
			return nil
		}}
	}
}

// adminDir writes what "cluster admin-cert" writes.
func (a *authority) adminDir(t *testing.T, uri string) string {
	t.Helper()
	dir, cert := t.TempDir(), a.issue(t, uri)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		api.AdminCertificate: {Type: "CERTIFICATE", Bytes: cert.Certificate[0]},
		api.AdminKey:         {Type: "PRIVATE KEY", Bytes: key},
		api.AdminCA:          {Type: "CERTIFICATE", Bytes: a.cert.Raw},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Who may do what over the network, by the identity in the certificate.
func TestAuthorisation(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	b := apitest.New()
	address := ca.serve(t, b, 1)
	for _, test := range []struct {
		name        string
		ca          *authority
		uri         string
		read, write codes.Code
	}{
		{"administrator", ca, "twinsan://uuid/admin/alice", codes.OK, codes.OK},
		{"data node", ca, "twinsan://uuid/node/2", codes.OK, codes.OK},
		{"witness", ca, "twinsan://uuid/node/3", codes.OK, codes.PermissionDenied},
		{"removed node", ca, "twinsan://uuid/node/9", codes.PermissionDenied, codes.PermissionDenied},
		{"no identity", ca, "", codes.PermissionDenied, codes.PermissionDenied},
		{"other scheme", ca, "https://uuid/admin/x", codes.PermissionDenied, codes.PermissionDenied},
		{"other kind", ca, "twinsan://uuid/host/x", codes.PermissionDenied, codes.PermissionDenied},
		{"node that is no number", ca, "twinsan://uuid/node/2x", codes.PermissionDenied, codes.PermissionDenied},
		{"other CA", stranger, "twinsan://uuid/admin/alice", codes.Unavailable, codes.Unavailable},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := test.ca.adminDir(t, test.uri)
			if test.ca != ca { // it still trusts the cluster, which must refuse it
				if err := os.WriteFile(filepath.Join(dir, api.AdminCA), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw}), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			c, err := api.Dial(address, dir)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, err = c.Cluster.GetStatus(t.Context(), &v1.GetStatusRequest{})
			if status.Code(err) != test.read {
				t.Errorf("read: %v", err)
			}
			_, err = c.Volumes.ResizeVolume(t.Context(), &v1.ResizeVolumeRequest{Name: "csv1", SizeBytes: 3 << 40})
			if status.Code(err) != test.write {
				t.Errorf("write: %v", err)
			}
		})
	}
}

func TestAdministratorRefusesAStrangeServer(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	address := stranger.serve(t, apitest.New(), 1)
	c, err := api.Dial(address, ca.adminDir(t, "twinsan://uuid/admin/alice"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Cluster.GetStatus(t.Context(), &v1.GetStatusRequest{}); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("got %v", err)
	}
}

func TestPeersReport(t *testing.T) {
	ca, b := newAuthority(t), apitest.New()
	address := ca.serve(t, b, 1)
	cert := ca.issue(t, "twinsan://uuid/node/2")
	p := api.NewPeers(ca.peerTLS(cert))
	defer p.Close()
	got, err := p.Report(t.Context(), 1, address)
	if err != nil {
		t.Fatal(err)
	}
	want, err := b.Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if digests, equal, err := p.CheckVolume(t.Context(), 1, address, "csv1"); err != nil || !equal || len(digests) != 2 || len(digests[0].Sum) != 32 {
		t.Errorf("check: %v %v %v", digests, equal, err)
	}
	// The same address does not pass for another node.
	if _, err := p.Report(t.Context(), replication.NodeID(2), address); err == nil || !strings.Contains(err.Error(), "in the place of node 2") {
		t.Errorf("got %v", err)
	}
}

// A node that does not run is an answer at once, not a wait.
func TestPeersRefusedAtOnce(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.issue(t, "twinsan://uuid/node/2")
	p := api.NewPeers(ca.peerTLS(cert))
	defer p.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := p.Report(ctx, 1, "127.0.0.1:1"); status.Code(err) != codes.Unavailable || ctx.Err() != nil {
		t.Errorf("got %v", err)
	}
	p.Close()
	if _, err := p.Report(ctx, 1, "127.0.0.1:1"); err == nil {
		t.Error("works after Close")
	}
}
