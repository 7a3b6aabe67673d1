package cluster

import (
	"log/slog"
	"strings"
	"sync"
	"testing"
)

// heard is a log handler that remembers messages.
type heard struct {
	mu    sync.Mutex
	lines []string
}

func (h *heard) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines = append(h.lines, string(p))
	return len(p), nil
}

func (h *heard) count(text string) (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}

// TestSuccession: a refused connection to the leader makes a survivor stand for
// election, and makes nobody stand whose leader lives.
func TestSuccession(t *testing.T) {
	l, a, _, w := full(t)
	log := &heard{}
	l.logger = slog.New(slog.NewTextHandler(log, nil))
	l.crash("b")
	b := l.restart("b")
	l.ready(b)
	const stands = "stands for election"
	eventually(t, "a leads", func() bool {
		if b.Leader() != a.Self() {
			l.leader().handOver(testContext(t))
		}
		return b.Leader() == a.Self()
	})
	self, witness := a.Self(), w.Self()
	l.crash("w")
	if _, err := b.Dial(testContext(t), witness); err == nil {
		t.Fatal("a dead witness answers")
	}
	if log.count(stands) != 0 {
		t.Fatal("the death of a follower made a node stand for election")
	}
	l.restart("w")
	for range 5 {
		eventually(t, "the witness follows", func() bool { return l.members["w"].Leader() == self && b.Leader() == self })
		l.crash("a")
		known := b.Leader() == self // else it has noticed by itself, on a slow machine
		if _, err := b.Dial(testContext(t), self); err == nil {
			t.Fatal("a dead leader answers")
		}
		if known {
			break
		}
		a = l.restart("a")
		l.ready(a)
		eventually(t, "a leads again", func() bool {
			l.leader().handOver(testContext(t))
			return b.Leader() == self
		})
	}
	if log.count(stands) != 1 {
		t.Error("the survivor does not stand for election")
	}
	eventually(t, "b leads", func() bool { return b.Leader() == b.Self() })
}
