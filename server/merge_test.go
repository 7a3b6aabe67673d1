package server

import (
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
)

// TestMergeNode asks, through one node of two, for a pass over the other's pool, which looks at all blocks;
// a pool without a catalogue cannot have one, and says what to do.
func TestMergeNode(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	ca, cb := l.config("a", false), l.config("b", false)
	cb.Store.MergeMinutes = 7 * 24 * 60 // and only when it is asked for
	data := make([]byte, 64*4096)
	_, _ = rand.Read(data)
	a, b := l.join(ca, cb)
	l.fill(a, b, data)

	if m, err := a.MergeNode(ctx, "b", MergeShow, false); err != nil || m.Node != "b" || !m.On || m.Running || !m.Last.Finished.IsZero() {
		t.Fatalf("before: %+v, %v", m, err)
	}
	if _, err := a.MergeNode(ctx, "b", MergeStart, false); err != nil {
		t.Fatal(err)
	}
	var m *Merge
	l.await("merge", func() (err error) {
		m, err = a.MergeNode(ctx, "b", MergeShow, false)
		if err == nil && m.Last.Finished.IsZero() {
			err = fmt.Errorf("%+v", m)
		}
		return err
	})
	if m.Last.Looked != 64 || m.Last.Found != 0 || m.Last.Error != "" {
		t.Errorf("64 blocks: %+v", m)
	}
	if m, err := a.MergeNode(ctx, "b", MergeStop, false); err != nil || m.Running {
		t.Errorf("stop, with none that runs: %+v, %v", m, err)
	}
	if _, err := a.MergeNode(ctx, "b", "mend", false); !errors.Is(err, ErrInvalid) {
		t.Errorf("mend: %v", err)
	}
	if _, err := a.MergeNode(ctx, "w", MergeShow, false); !errors.Is(err, ErrNotFound) {
		t.Errorf("a node that is not there: %v", err)
	}
	l.close(b)
	cb.Store.MergeMinutes = 0
	b = l.open(cb)
	l.await("b is back", func() error { _, err := b.MergeNode(ctx, "b", MergeShow, true); return err })
	if m, err := b.MergeNode(ctx, "b", MergeShow, true); err != nil || m.On {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err := b.MergeNode(ctx, "b", MergeStart, true); !errors.Is(err, ErrRefused) {
		t.Errorf("no catalogue: %v", err)
	}
}
