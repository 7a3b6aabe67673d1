package cluster

import (
	"errors"
	"fmt"

	"github.com/twinsan/twinsan/replication"
)

// The kinds of errors of mutations, for errors.Is. The text of the error itself
// says what happened, what is at risk and what to do.
var (
	// ErrExists: the name, address or initiator is taken.
	ErrExists = errors.New("already exists")
	// ErrNotFound: there is no such node, volume or host.
	ErrNotFound = errors.New("not found")
	// ErrInvalid: an argument is outside its range or malformed.
	ErrInvalid = errors.New("invalid argument")
	// ErrRefused: the mutation is well formed, and refused for safety.
	ErrRefused = errors.New("refused for safety")
	// ErrNoQuorum: no leader could be reached in time. With an error that is not
	// replication.ErrOutcomeUnknown as well, the mutation has not taken effect and will not.
	ErrNoQuorum = errors.New("the cluster has no quorum")
	// ErrToken: a join token is unknown, expired, used, for another role, or of
	// another cluster.
	ErrToken = errors.New("join token refused")
	// ErrClosed: the Cluster is closed.
	ErrClosed = errors.New("the cluster member is closed")
	// ErrRemoved is given to Config.Fatal when this node was removed from the cluster.
	ErrRemoved = errors.New("this node was removed from the cluster")
	// ErrNotMember: the other side refused this node, or is not the node that was
	// expected.
	ErrNotMember = errors.New("not a member of this cluster")
)

// code is the kind of a result. Part of the log and wire formats, do not change.
type code uint8

const (
	codeOK       code = 0
	codeExists   code = 1
	codeNotFound code = 2
	codeInvalid  code = 3
	codeRefused  code = 4
	codeConflict code = 5
	codeToken    code = 6
)

var codeErrors = map[code]error{
	codeExists: ErrExists, codeNotFound: ErrNotFound, codeInvalid: ErrInvalid,
	codeRefused: ErrRefused, codeConflict: replication.ErrConflict, codeToken: ErrToken,
}

// statusError is an error with a text of its own that is of one of the kinds above.
type statusError struct {
	kind error
	text string
}

func (e *statusError) Error() string { return e.text }
func (e *statusError) Unwrap() error { return e.kind }

func errorf(kind error, format string, args ...any) error {
	return &statusError{kind, fmt.Sprintf(format, args...)}
}

// result is the outcome of a command, the same on every node.
type result struct {
	Code code
	Text string
	// ID is what was made: a node id, a volume id, an incarnation.
	ID uint64
	// Index is the raft index of the command that had the effect.
	Index uint64
	// Record is the volume's record after the command, for cmdChange.
	Record replication.Record
}

func (r *result) walk(c *codec) {
	u8(c, &r.Code)
	text(c, &r.Text)
	u64(c, &r.ID)
	u64(c, &r.Index)
	walkRecord(c, &r.Record)
}

// err translates a result to the error that callers see.
func (r *result) err() error {
	if r.Code == codeOK {
		return nil
	}
	kind := codeErrors[r.Code]
	if kind == nil {
		kind = ErrInvalid
	}
	return &statusError{kind, r.Text}
}

func refuse(c code, format string, args ...any) result {
	return result{Code: c, Text: fmt.Sprintf(format, args...)}
}
