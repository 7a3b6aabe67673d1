package replication

import (
	"bytes"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/replication/wire"
)

// script is a connection whose reads are functions.
type script struct {
	net.Conn
	reads []func() []byte
}

func (s *script) Read(b []byte) (int, error) {
	if len(s.reads) == 0 {
		return 0, io.EOF
	}
	next := s.reads[0]
	s.reads = s.reads[1:]
	return copy(b, next()), nil
}

// TestLateLink (Z1): what comes after a silence is not looked at, on a link that the
// peer dialled; on one that we dialled, where answers come, it is.
func TestLateLink(t *testing.T) {
	frame := wire.AppendFrame(nil, wire.Header{Type: wire.Beacon}, []byte("meta"), nil)
	for _, c := range []struct {
		dialled bool
		silence time.Duration
		want    int
		err     error
	}{
		{false, DefaultTiming.Late, 2, io.EOF},
		{false, DefaultTiming.Late + 1, 1, errLate},
		{true, time.Hour, 2, io.EOF},
	} {
		var now Instant
		n := &Node{cfg: Config{Clock: func() Instant { return now }}, timing: DefaultTiming}
		l := newLink(n, 2, &script{reads: []func() []byte{
			func() []byte { return frame },
			func() []byte { now = now.After(c.silence); return frame },
		}}, c.dialled)
		handled := 0
		err := l.read(func(wire.Header, []byte, []byte) error { handled++; return nil }, func() {})
		if handled != c.want || err != c.err {
			t.Errorf("silence of %s, dialled by us %t: %d frames, %v", c.silence, c.dialled, handled, err)
		}
	}
}

// TestAbandoned (Z1): a command that waits for an owner, and whose session ends
// meanwhile, has no effect when there is one; its neighbour has.
func TestAbandoned(t *testing.T) {
	b := newBench(t)
	a, c := b.start(1), b.start(2)
	b.createAs(1, 1<<20, 2)
	b.inSync(1, 2)
	b.court.reach(1, false) // nobody takes over for now
	b.stop(2, c)
	var abandoned atomic.Bool
	write := func(off uint64, gone *atomic.Bool) chan error {
		done := make(chan error, 1)
		a.Volume(1).Submit(&Request{
			Op: OpWrite, Off: off, Len: 4096, Data: bytes.Repeat([]byte{7}, 4096), Abandoned: gone,
			Done: func(r *Request) { done <- r.Err },
		})
		a.Kick()
		return done
	}
	lost, kept := write(0, &abandoned), write(4096, nil)
	abandoned.Store(true)
	b.court.reach(1, true)
	if err := <-lost; err != ErrBusy {
		t.Errorf("an abandoned write ended with %v", err)
	}
	if err := <-kept; err != nil {
		t.Errorf("a held write ended with %v", err)
	}
	got := a.readFrom(t, 1, 0, 8192)
	if !bytes.Equal(got[:4096], make([]byte, 4096)) || got[4096] != 7 {
		t.Errorf("blocks hold %d and %d", got[0], got[4096])
	}
	if err := <-write(0, &abandoned); err != ErrBusy {
		t.Errorf("an abandoned write at its owner ended with %v", err)
	}
}
