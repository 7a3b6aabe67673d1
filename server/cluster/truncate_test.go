package cluster

import (
	"log/slog"
	"testing"

	"github.com/hashicorp/raft"
)

// TestLogAfterTruncation: a follower whose last entries were replaced by a new
// leader's reads its log after a restart.
func TestLogAfterTruncation(t *testing.T) {
	dir := t.TempDir()
	open := func() *raftStore {
		s, _, err := openRaftStore(dir, newRaftLog(slog.New(slog.DiscardHandler)), func(err error) { t.Error(err) })
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	for i := uint64(1); i <= 30; i++ {
		if err := s.StoreLog(&raft.Log{Index: i, Term: 1, Data: []byte("entry")}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.DeleteRange(24, 30); err != nil {
		t.Fatal(err)
	}
	if err := s.StoreLog(&raft.Log{Index: 24, Term: 2, Data: []byte("another")}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	for i := uint64(1); i <= 24; i++ {
		var l raft.Log
		if err := s.GetLog(i, &l); err != nil || l.Index != i || (l.Term == 2) != (i == 24) {
			t.Fatalf("entry %d: %+v, %v", i, l, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
