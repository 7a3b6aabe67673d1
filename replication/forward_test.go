package replication

import (
	"testing"
)

// A forwarded request whose answer never comes must not be called BUSY when it may
// not happen twice: the initiator would repeat it, and find its own first attempt.
func TestForwardWithoutAnswer(t *testing.T) {
	for _, c := range []struct {
		op    RequestOp
		cause error
		want  error
		onto  uint64 // the clone's source
	}{
		{OpWrite, ErrBusy, ErrBusy, 8192},
		{OpUnmap, ErrBusy, ErrBusy, 8192},
		{OpClone, ErrBusy, ErrBusy, 8192},
		{OpClone, ErrBusy, ErrUnavailable, 4096}, // onto itself
		{OpCompareAndWrite, ErrBusy, ErrUnavailable, 8192},
		{OpState, ErrBusy, ErrUnavailable, 8192},
		{OpWrite, ErrUnavailable, ErrUnavailable, 8192},
		{OpCompareAndWrite, errNeverSent, ErrBusy, 8192},
		{OpState, errNeverSent, ErrBusy, 8192},
		{OpWrite, errNeverSent, ErrBusy, 8192},
	} {
		n := &Node{cfg: Config{Flush: func() {}, Clock: func() Instant { return 0 }}}
		n.inbound.Store(&[]*link{})
		ended := 0
		r := &Request{Op: c.op, Len: 8192, Source: 1, SourceOff: c.onto, Done: func(*Request) { ended++ }}
		n.forwards.open = map[uint64]forwarded{7: {v: &Volume{node: n, id: 1}, r: r}}
		n.endForwards(c.cause, func(*forwarded) bool { return true })
		if ended != 1 || r.Err != c.want || len(n.forwards.open) != 0 {
			t.Errorf("operation %d ended by %v: %d times, %v; want %v", c.op, c.cause, ended, r.Err, c.want)
		}
	}
}
