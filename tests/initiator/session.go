package initiator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
)

// Options are the initiator's side of a [Session]. The zero value has a name of
// its own, no authentication and no digests.
type Options struct {
	InitiatorName            string  // "": DefaultInitiator
	ISID                     [6]byte // all zero: DefaultISID
	CHAP                     *CHAP   // nil: none
	HeaderDigest, DataDigest bool    // CRC32C
	Keys                     []Key   // changes to DefaultKeys
}

// DefaultInitiator and DefaultISID name the initiator port of a Session that does
// not say otherwise.
const DefaultInitiator = "iqn.2026-01.com.github.twinsan:tests"

var DefaultISID = [6]byte{0x80, 0x74, 0x77, 0x69, 0x6e, 0}

// Session is a host's path to a target for tests of what lies above iSCSI: it
// sends CDBs by LUN and gives back status, sense and data. It lives from Connect
// to Close or Drop; Reconnect makes the same initiator port log in again. Its
// methods may be called concurrently.
type Session struct {
	cfg Config

	mu   sync.Mutex
	conn *Conn
}

// Connect logs in to a target at host:port. The unit attentions of a new nexus
// are the caller's, see [Session.Settle].
func Connect(ctx context.Context, addr, target string, o Options) (*Session, error) {
	cfg := Config{Addr: addr, TargetName: target, InitiatorName: o.InitiatorName, ISID: o.ISID, CHAP: o.CHAP, CmdSN: 1}
	if cfg.InitiatorName == "" {
		cfg.InitiatorName = DefaultInitiator
	}
	if cfg.ISID == ([6]byte{}) {
		cfg.ISID = DefaultISID
	}
	var digests []Key
	if o.HeaderDigest {
		digests = append(digests, Key{"HeaderDigest", "CRC32C"})
	}
	if o.DataDigest {
		digests = append(digests, Key{"DataDigest", "CRC32C"})
	}
	cfg.Keys = WithKeys(append(digests, o.Keys...)...)
	s := &Session{cfg: cfg}
	if err := s.login(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Session) login(ctx context.Context) error {
	conn, err := Dial(ctx, s.cfg)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.conn = conn
	s.mu.Unlock()
	return nil
}

// Conn is the present connection, for all that a Session does not offer.
func (s *Session) Conn() *Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn
}

// Reply is the end of a command. In are the bytes that came.
type Reply struct {
	*Result
	In []byte
}

// Pending is a command on its way.
type Pending struct {
	task *Task
	in   []byte
}

// Done is closed when the command has ended.
func (p *Pending) Done() <-chan struct{} { return p.task.Done() }

// Wait returns the reply when the command has ended. It fails with ErrAborted
// when task management ended it, with ErrClosed or another error when the
// connection went: the command may have taken effect then or not.
func (p *Pending) Wait(ctx context.Context) (*Reply, error) {
	r, err := p.task.Wait(ctx)
	if err != nil {
		return nil, err
	}
	return &Reply{r, p.in[:r.Received]}, nil
}

// Submit sends a command as soon as the command window is open and does not
// wait for its end. Out are its data, or inLen the bytes that it reads at most;
// Out belongs to the session until the end.
func (s *Session) Submit(ctx context.Context, lun uint16, cdb, out []byte, inLen int) (*Pending, error) {
	p := &Pending{in: make([]byte, inLen)}
	var err error
	p.task, err = s.Conn().Start(ctx, &Command{LUN: LUN(lun), CDB: cdb, Out: out, In: p.in, Attr: 1})
	return p, err
}

// Do runs a command to its end. A status other than GOOD is no error.
func (s *Session) Do(ctx context.Context, lun uint16, cdb, out []byte, inLen int) (*Reply, error) {
	p, err := s.Submit(ctx, lun, cdb, out, inLen)
	if err != nil {
		return nil, err
	}
	return p.Wait(ctx)
}

// Settle takes the unit attentions of a LUN until there are none. It returns
// the additional sense of those that it took, as "29/00".
func (s *Session) Settle(ctx context.Context, lun uint16) (taken []string, err error) {
	const unitAttention = 6
	for range 64 {
		r, err := s.Do(ctx, lun, TestUnitReady(), nil, 0)
		if err != nil {
			return taken, err
		}
		key, asc, ascq := r.SenseKey()
		if key != unitAttention {
			return taken, nil
		}
		taken = append(taken, fmt.Sprintf("%02x/%02x", asc, ascq))
	}
	return taken, errors.New("unit attentions do not end")
}

// TaskManagement performs a task management function and returns the response
// code. Ref is the command that AbortTask names.
func (s *Session) TaskManagement(ctx context.Context, function byte, lun uint16, ref *Pending) (byte, error) {
	var task *Task
	if ref != nil {
		task = ref.task
	}
	return s.Conn().TaskManagement(ctx, function, LUN(lun), task)
}

// Reconnect drops the connection, if there still is one, and logs in again as
// the same initiator port: session reinstatement.
func (s *Session) Reconnect(ctx context.Context) error {
	s.Drop()
	return s.login(ctx)
}

// Close logs out and waits until the target has closed.
func (s *Session) Close(ctx context.Context) error {
	conn := s.Conn()
	defer conn.Close()
	switch response, err := conn.Logout(ctx, 0); {
	case err != nil:
		return err
	case response != 0:
		return fmt.Errorf("logout is answered %d", response)
	}
	if err := conn.Done(ctx); err != io.EOF {
		return err
	}
	return nil
}

// Drop resets the connection, as a host that loses power does.
func (s *Session) Drop() { s.Conn().Abort() }

// URL is where to find a logical unit:
// iscsi://[user[%secret]@]host[:port]/target-name/lun.
type URL struct {
	Addr         string
	Target       string
	LUN          uint16
	User, Secret string
}

// ParseURL reads the form of iSCSI URLs that libiscsi made customary.
func ParseURL(s string) (URL, error) {
	fail := func(what string) (URL, error) { return URL{}, fmt.Errorf("iSCSI URL %q: %s", s, what) }
	rest, ok := strings.CutPrefix(s, "iscsi://")
	if !ok {
		return fail("does not begin with iscsi://")
	}
	var u URL
	host, path, _ := strings.Cut(rest, "/")
	if user, h, ok := strings.Cut(host, "@"); ok {
		host = h
		u.User, u.Secret, _ = strings.Cut(user, "%")
	}
	if _, _, err := net.SplitHostPort(host); err != nil {
		host = net.JoinHostPort(strings.Trim(host, "[]"), "3260")
	}
	u.Addr = host
	target, lun, ok := strings.Cut(path, "/")
	n, err := strconv.ParseUint(lun, 10, 14)
	if !ok || err != nil {
		return fail("does not end with a LUN")
	}
	if u.Target, err = url.PathUnescape(target); err != nil || u.Target == "" {
		return fail("has no target name")
	}
	u.LUN = uint16(n)
	return u, nil
}
