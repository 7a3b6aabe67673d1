package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server"
)

// maxReplyBytes bounds an answer: a thousand volumes and their replicas are about 1 MiB.
const maxReplyBytes = 64 << 20

// connectParams make a node that comes back seen within a fraction of a second.
var connectParams = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
	MinConnectTimeout: 2 * time.Second,
}

// Client is a connection to the API of one node.
type Client struct {
	Cluster  v1.ClusterClient
	Nodes    v1.NodesClient
	Devices  v1.DevicesClient
	Volumes  v1.VolumesClient
	Hosts    v1.HostsClient
	Sessions v1.SessionsClient
	// Snapshots manages the snapshots of volumes.
	Snapshots v1.SnapshotsClient

	Replicas    v1.ReplicasClient
	Operations  v1.OperationsClient
	Maintenance v1.MaintenanceClient

	conn *grpc.ClientConn
}

// The files of a remote administrator, in the directory given to Dial.
const (
	AdminCertificate = "admin.crt"
	AdminKey         = "admin.key"
	AdminCA          = "ca.crt"
)

// Dial prepares a connection to address: "unix:///path", a path, or host:port.
// For host:port the directory certificates holds the files that "twinsan
// cluster admin-cert" writes. It does no I/O on the network; the first call connects.
func Dial(address, certificates string) (*Client, error) {
	var creds credentials.TransportCredentials
	target := address
	switch {
	case strings.HasPrefix(address, "unix:"), filepath.IsAbs(address):
		path := strings.TrimPrefix(strings.TrimPrefix(address, "unix:"), "//")
		absolute, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		target, creds = "unix://"+absolute, insecure.NewCredentials()
	default:
		if _, _, err := net.SplitHostPort(address); err != nil {
			return nil, fmt.Errorf("API address %q is neither unix:///path nor host:port", address)
		}
		config, err := adminTLS(certificates)
		if err != nil {
			return nil, err
		}
		target, creds = "passthrough:///"+address, credentials.NewTLS(config)
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReplyBytes)), grpc.WithConnectParams(connectParams))
	if err != nil {
		return nil, err
	}
	return &Client{
		Cluster: v1.NewClusterClient(conn), Nodes: v1.NewNodesClient(conn), Devices: v1.NewDevicesClient(conn),
		Volumes: v1.NewVolumesClient(conn), Hosts: v1.NewHostsClient(conn), Sessions: v1.NewSessionsClient(conn), conn: conn,
		Replicas: v1.NewReplicasClient(conn), Operations: v1.NewOperationsClient(conn), Maintenance: v1.NewMaintenanceClient(conn),
		Snapshots: v1.NewSnapshotsClient(conn),
	}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

func adminTLS(dir string) (*tls.Config, error) {
	certificate, err := tls.LoadX509KeyPair(filepath.Join(dir, AdminCertificate), filepath.Join(dir, AdminKey))
	if err != nil {
		return nil, fmt.Errorf("no administrator's certificate (make one on a node with: twinsan cluster admin-cert --out DIR): %w", err)
	}
	ca, err := os.ReadFile(filepath.Join(dir, AdminCA))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s holds no certificate", filepath.Join(dir, AdminCA))
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{certificate},
		// A node is known by the identity in its certificate and not by its address:
		// VerifyConnection checks the chain and the identity.
		InsecureSkipVerify: true,
		VerifyConnection:   func(state tls.ConnectionState) error { return verifyNode(state, roots) },
	}, nil
}

// verifyNode accepts any node of the cluster whose CA is in roots.
func verifyNode(state tls.ConnectionState, roots *x509.CertPool) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("the node shows no certificate")
	}
	options := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, c := range state.PeerCertificates[1:] {
		options.Intermediates.AddCert(c)
	}
	if _, err := state.PeerCertificates[0].Verify(options); err != nil {
		return err
	}
	kind, name, err := Identity(state.PeerCertificates[0])
	if err == nil && kind != "node" {
		err = fmt.Errorf("%s %s answers in the place of a node", kind, name)
	}
	return err
}

// Peers asks other nodes for their reports over their API. It implements
// server.Peers and keeps one connection to each node.
type Peers struct {
	tls func(replication.NodeID) *tls.Config

	mu    sync.Mutex
	conns map[peerKey]*grpc.ClientConn // bounded by the nodes of the cluster
	done  bool
}

type peerKey struct {
	node    replication.NodeID
	address string
}

// NewPeers makes a Peers. config gives this node's end of a connection to a
// node: its certificate, and that only this node is accepted. It is called for
// each connection, so that a renewed certificate is used.
func NewPeers(config func(replication.NodeID) *tls.Config) *Peers {
	return &Peers{tls: config, conns: map[peerKey]*grpc.ClientConn{}}
}

// Report asks one node. It fails at once when nobody listens there.
func (p *Peers) Report(ctx context.Context, node replication.NodeID, address string) (*server.Report, error) {
	conn, err := p.conn(peerKey{node, address})
	if err != nil {
		return nil, err
	}
	m, err := v1.NewPeersClient(conn).Report(ctx, &v1.ReportRequest{})
	if err != nil {
		return nil, err
	}
	return reportOf(m), nil
}

// CheckVolume asks the owner of a volume to compare its replicas.
func (p *Peers) CheckVolume(ctx context.Context, node replication.NodeID, address, volume string) ([]server.Digest, bool, error) {
	conn, err := p.conn(peerKey{node, address})
	if err != nil {
		return nil, false, err
	}
	r, err := v1.NewVolumesClient(conn).CheckVolume(ctx, &v1.CheckVolumeRequest{Name: volume, OwnerOnly: true})
	if err != nil {
		return nil, false, err
	}
	return each(r.Digests, digestOf), r.Equal, nil
}

// MoveVolume asks the owner of a volume to hand it over.
func (p *Peers) MoveVolume(ctx context.Context, node replication.NodeID, address, volume, to string) error {
	conn, err := p.conn(peerKey{node, address})
	if err != nil {
		return err
	}
	_, err = v1.NewVolumesClient(conn).MoveVolume(ctx, &v1.MoveVolumeRequest{Name: volume, To: to, OwnerOnly: true})
	return err
}

// ClearReservations asks the owner of a volume to drop its reservations.
func (p *Peers) ClearReservations(ctx context.Context, node replication.NodeID, address, volume string) error {
	conn, err := p.conn(peerKey{node, address})
	if err != nil {
		return err
	}
	_, err = v1.NewVolumesClient(conn).ClearReservations(ctx, &v1.ClearReservationsRequest{Name: volume, OwnerOnly: true})
	return err
}

// ScrubNode asks a node to show, start or stop its scrub.
func (p *Peers) ScrubNode(ctx context.Context, node replication.NodeID, address, name string, action server.ScrubAction, fullSpeed bool) (*server.Scrub, error) {
	conn, err := p.conn(peerKey{node, address})
	if err != nil {
		return nil, err
	}
	m, err := v1.NewNodesClient(conn).ScrubNode(ctx, &v1.ScrubNodeRequest{Name: name, Action: string(action), FullSpeed: fullSpeed, Here: true})
	if err != nil {
		return nil, err
	}
	return scrubOf(m), nil
}

// MergeNode asks a node to show, start or stop its merging of duplicates.
func (p *Peers) MergeNode(ctx context.Context, node replication.NodeID, address, name string, action server.MergeAction) (*server.Merge, error) {
	conn, err := p.conn(peerKey{node, address})
	if err != nil {
		return nil, err
	}
	m, err := v1.NewNodesClient(conn).MergeNode(ctx, &v1.MergeNodeRequest{Name: name, Action: string(action), Here: true})
	if err != nil {
		return nil, err
	}
	return mergeOf(m), nil
}

func (p *Peers) conn(key peerKey) (*grpc.ClientConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done {
		return nil, net.ErrClosed
	}
	if c := p.conns[key]; c != nil {
		return c, nil
	}
	for old, c := range p.conns {
		if old.node == key.node { // it moved
			c.Close()
			delete(p.conns, old)
		}
	}
	c, err := grpc.NewClient("passthrough:///"+key.address,
		grpc.WithTransportCredentials(freshTLS{func() *tls.Config { return p.tls(key.node) }}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReplyBytes)), grpc.WithConnectParams(connectParams))
	if err == nil {
		p.conns[key] = c
	}
	return c, err
}

// Close ends all connections; calls under way fail.
func (p *Peers) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = true
	for _, c := range p.conns {
		c.Close()
	}
	clear(p.conns)
}

// freshTLS makes its configuration anew for each connection.
type freshTLS struct{ config func() *tls.Config }

func (f freshTLS) ClientHandshake(ctx context.Context, authority string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return credentials.NewTLS(f.config()).ClientHandshake(ctx, authority, c)
}

func (freshTLS) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for clients")
}
func (f freshTLS) Info() credentials.ProtocolInfo          { return credentials.NewTLS(&tls.Config{}).Info() }
func (f freshTLS) Clone() credentials.TransportCredentials { return f }
func (freshTLS) OverrideServerName(string) error           { return nil }
