package api

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	v1 "github.com/twinsan/twinsan/api/v1"
)

// Config is what a Server needs.
type Config struct {
	Backend Backend
	// Socket is the path of the unix socket, mode 0660; empty: none. A socket that
	// a dead process left behind is replaced, one that answers is not.
	Socket string
	// Address is host:port for mutual TLS; empty: none.
	Address string
	// Detour is host:port where the other nodes find the API while Address does not
	// answer; empty: nowhere else.
	Detour string
	// TLS is the node's end: its certificate, and ClientCAs with the cluster's CA.
	// Needed with Address. Version and client authentication are set here.
	TLS    *tls.Config
	Logger *slog.Logger
}

// The limits of one listener. At a limit the client is told RESOURCE_EXHAUSTED
// or waits for its turn.
const (
	maxMessageBytes      = 4 << 20
	maxConcurrentStreams = 64
	maxConnections       = 128
	handshakeMax         = 5 * time.Second
)

// Server serves the API until Close.
type Server struct {
	servers []*grpc.Server
	address net.Addr // the first of TCP, nil without
	running sync.WaitGroup
}

// Serve starts to listen and to answer. On error nothing is left open.
func Serve(c Config) (*Server, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{}
	if c.Socket != "" {
		l, err := listenUnix(c.Socket)
		if err != nil {
			return nil, fmt.Errorf("listen for the API on %s: %w", c.Socket, err)
		}
		s.start(c, l, socketCredentials{})
	}
	for _, address := range []string{c.Address, c.Detour} {
		if address == "" {
			continue
		}
		if c.TLS == nil {
			s.Close()
			return nil, errors.New("the API on TCP needs a certificate")
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("listen for the API: %w", err)
		}
		config := c.TLS.Clone()
		config.MinVersion, config.ClientAuth = tls.VersionTLS13, tls.RequireAndVerifyClientCert
		if s.address == nil {
			s.address = l.Addr()
		}
		s.start(c, l, credentials.NewTLS(config))
	}
	return s, nil
}

// Addr is the TCP address, or nil.
func (s *Server) Addr() net.Addr { return s.address }

// Close ends running calls, removes the socket and waits for all goroutines.
func (s *Server) Close() {
	for _, g := range s.servers {
		g.Stop()
	}
	s.running.Wait()
}

func (s *Server) start(c Config, l net.Listener, creds credentials.TransportCredentials) {
	gate := &gate{backend: c.Backend, logger: c.Logger}
	g := grpc.NewServer(
		grpc.Creds(creds),
		grpc.ConnectionTimeout(handshakeMax),
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxConcurrentStreams(maxConcurrentStreams),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(gate.unary),
		grpc.StreamInterceptor(gate.stream),
	)
	v1.RegisterClusterServer(g, &clusterService{backend: c.Backend})
	v1.RegisterNodesServer(g, &nodeService{backend: c.Backend})
	v1.RegisterDevicesServer(g, &deviceService{backend: c.Backend})
	v1.RegisterVolumesServer(g, &volumeService{backend: c.Backend})
	v1.RegisterSnapshotsServer(g, &snapshotService{backend: c.Backend})
	v1.RegisterHostsServer(g, &hostService{backend: c.Backend})
	v1.RegisterSessionsServer(g, &sessionService{backend: c.Backend})
	v1.RegisterReplicasServer(g, &replicaService{backend: c.Backend})
	v1.RegisterOperationsServer(g, &operationService{backend: c.Backend})
	v1.RegisterMaintenanceServer(g, &maintenanceService{backend: c.Backend})
	v1.RegisterPeersServer(g, &peerService{backend: c.Backend})
	s.servers = append(s.servers, g)
	s.running.Go(func() {
		if err := g.Serve(limit(l, maxConnections)); err != nil {
			c.Logger.Error("the API ended", "err", err)
		}
	})
}

// listenUnix binds a socket that only its owner and group may open. The mode is
// set before the socket has its final name, so it is never open to others.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		conn.Close()
		return nil, syscall.EADDRINUSE
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	staged := path + ".new"
	os.Remove(staged)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: staged, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(staged, 0o660); err == nil {
		err = os.Rename(staged, path)
	}
	if err != nil {
		l.Close()
		os.Remove(staged)
		return nil, err
	}
	return &socket{UnixListener: l, path: path}, nil
}

// socket removes its file when it is closed.
type socket struct {
	*net.UnixListener
	path string
	once sync.Once
}

func (s *socket) Close() error {
	s.once.Do(func() { os.Remove(s.path) })
	return s.UnixListener.Close()
}

// limited accepts no more than a number of connections at a time; the others
// wait in the kernel's queue.
type limited struct {
	net.Listener
	slots chan struct{}
	done  chan struct{}
	once  sync.Once
}

func limit(l net.Listener, n int) net.Listener {
	return &limited{Listener: l, slots: make(chan struct{}, n), done: make(chan struct{})}
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &slot{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

func (l *limited) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

type slot struct {
	net.Conn
	release func()
}

func (s *slot) Close() error {
	defer s.release()
	return s.Conn.Close()
}

// SyscallConn lets the handshake ask for the peer of a unix socket.
func (s *slot) SyscallConn() (syscall.RawConn, error) {
	if c, ok := s.Conn.(syscall.Conn); ok {
		return c.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}
