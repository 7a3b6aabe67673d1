package api

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server"
)

// caller is who makes a call.
type caller struct {
	name  string // for the log: "uid 0", "admin alice", "node 2"
	admin bool   // may change things
	node  bool   // a node of the cluster: may ask for reports
}

// socketCredentials takes the user at the other end of a unix socket from the
// kernel and admits root and the user of this process.
type socketCredentials struct{}

type socketUser struct {
	credentials.CommonAuthInfo
	uid uint32
}

func (socketUser) AuthType() string { return "peercred" }

func (socketCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil, nil, errors.New("not a unix socket")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, nil, err
	}
	if credErr != nil {
		return nil, nil, credErr
	}
	return c, socketUser{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, cred.Uid}, nil
}

func (socketCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for servers")
}
func (socketCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (s socketCredentials) Clone() credentials.TransportCredentials { return s }
func (socketCredentials) OverrideServerName(string) error           { return nil }

// gate stands before every call: it finds out who calls and whether they may,
// logs changes, and turns a panic into an error of that one call.
type gate struct {
	backend Backend
	logger  *slog.Logger
}

// readOnly are the methods that change nothing, by their verb.
func readOnly(method string) bool {
	verb := method[strings.LastIndexByte(method, '/')+1:]
	return strings.HasPrefix(verb, "Get") || strings.HasPrefix(verb, "List") || strings.HasPrefix(verb, "Check") || strings.HasPrefix(verb, "Explain")
}

func (g *gate) authorise(ctx context.Context, method string) (caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, status.Error(codes.Unauthenticated, "no peer")
	}
	who, err := g.identify(p.AuthInfo)
	if err != nil {
		return who, status.Error(codes.PermissionDenied, err.Error())
	}
	switch {
	case strings.HasPrefix(method, "/twinsan.v1.Peers/"):
		if !who.node && !who.admin {
			return who, status.Error(codes.PermissionDenied, "only nodes of the cluster may ask this")
		}
	case !who.admin && !readOnly(method):
		return who, status.Errorf(codes.PermissionDenied, "%s may not change the cluster", who.name)
	}
	return who, nil
}

func (g *gate) identify(info credentials.AuthInfo) (caller, error) {
	switch info := info.(type) {
	case socketUser:
		who := caller{name: fmt.Sprintf("uid %d", info.uid), admin: true}
		if info.uid != 0 && int(info.uid) != os.Getuid() {
			return caller{name: who.name}, fmt.Errorf("uid %d may not administer this node: use root or uid %d", info.uid, os.Getuid())
		}
		return who, nil
	case credentials.TLSInfo:
		if len(info.State.VerifiedChains) == 0 {
			return caller{}, errors.New("the certificate is not verified")
		}
		kind, name, err := Identity(info.State.VerifiedChains[0][0])
		if err != nil {
			return caller{}, err
		}
		if kind == "admin" {
			return caller{name: "admin " + name, admin: true}, nil
		}
		id, err := strconv.ParseUint(name, 10, 32)
		if err != nil {
			return caller{}, fmt.Errorf("the certificate names node %q", name)
		}
		role, member := g.backend.Member(replication.NodeID(id))
		if !member {
			return caller{}, fmt.Errorf("node %d is not a member of the cluster", id)
		}
		return caller{name: "node " + name, admin: role == server.Data, node: true}, nil
	}
	return caller{}, errors.New("unknown kind of connection")
}

// Identity reads who a certificate is for: kind "node" with the node's number,
// or kind "admin" with a name, from its one URI twinsan://UUID/KIND/NAME.
func Identity(c *x509.Certificate) (kind, name string, err error) {
	if len(c.URIs) != 1 || c.URIs[0].Scheme != "twinsan" {
		return "", "", errors.New("the certificate names no twinsan identity")
	}
	kind, name, ok := strings.Cut(strings.TrimPrefix(c.URIs[0].Path, "/"), "/")
	if !ok || name == "" || (kind != "node" && kind != "admin") {
		return "", "", fmt.Errorf("the certificate names %q, which is neither a node nor an administrator", c.URIs[0].Path)
	}
	return kind, name, nil
}

func (g *gate) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (response any, err error) {
	who, err := g.authorise(ctx, info.FullMethod)
	start := time.Now()
	defer func() {
		err = g.finish(who, info.FullMethod, start, recover(), err)
		if err != nil {
			response = nil
		}
	}()
	if err != nil {
		return nil, err
	}
	return handler(ctx, request)
}

func (g *gate) stream(service any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	who, err := g.authorise(stream.Context(), info.FullMethod)
	start := time.Now()
	defer func() { err = g.finish(who, info.FullMethod, start, recover(), err) }()
	if err != nil {
		return err
	}
	return handler(service, stream)
}

// finish logs a call and translates its error.
func (g *gate) finish(who caller, method string, start time.Time, panicked any, err error) error {
	if panicked != nil {
		g.logger.Error("panic in an API call", "method", method, "caller", who.name, "panic", fmt.Sprint(panicked), "stack", string(debug.Stack()))
		return status.Error(codes.Internal, "a bug in the node; its log has the details")
	}
	err = toStatus(err)
	level := slog.LevelInfo
	if readOnly(method) || strings.HasPrefix(method, "/twinsan.v1.Peers/") {
		level = slog.LevelDebug
	}
	attributes := []any{"method", method, "caller", who.name, "took", time.Since(start).Round(time.Millisecond)}
	if err != nil {
		attributes = append(attributes, "err", err)
	}
	g.logger.Log(context.Background(), level, "API call", attributes...)
	return err
}
