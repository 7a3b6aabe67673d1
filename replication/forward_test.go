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
	}{
		{OpWrite, ErrBusy, ErrBusy},
		{OpUnmap, ErrBusy, ErrBusy},
		{OpClone, ErrBusy, ErrBusy},
		{OpCompareAndWrite, ErrBusy, ErrUnavailable},
		{OpState, ErrBusy, ErrUnavailable},
		{OpWrite, ErrUnavailable, ErrUnavailable},
		{OpCompareAndWrite, errNeverSent, ErrBusy},
		{OpState, errNeverSent, ErrBusy},
		{OpWrite, errNeverSent, ErrBusy},
	} {
		n := &Node{cfg: Config{Flush: func() {}, Clock: func() Instant { return 0 }}}
		n.inbound.Store(&[]*link{})
		ended := 0
		r := &Request{Op: c.op, Done: func(*Request) { ended++ }}
		n.forwards.open = map[uint64]forwarded{7: {v: &Volume{node: n}, r: r}}
		n.endForwards(c.cause, func(*forwarded) bool { return true })
		if ended != 1 || r.Err != c.want || len(n.forwards.open) != 0 {
			t.Errorf("operation %d ended by %v: %d times, %v; want %v", c.op, c.cause, ended, r.Err, c.want)
		}
	}
}
