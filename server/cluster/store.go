package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metadb"
)

const (
	// segmentBytes is the preallocated size of a file of the raft log. Commands are
	// small and rare; the default of 64 MiB would be most of a witness.
	segmentBytes = 4 << 20
	// keepSnapshots is how many snapshot files stay.
	keepSnapshots = 2
)

// raftStore is the durable half of raft: its log and its vote. The first error of
// a write or a read latches: whether the failed write reached the disk is not
// known, so nothing may be built on this store in this process again. fatal is
// told once and is expected to end the process; the next start reads back what
// is really there.
type raftStore struct {
	wal   *wal.WAL
	meta  *metadb.BoltMetaDB // the wal's; it opens it and leaves it open
	fatal func(error)
	fault func(what string) error // tests; nil: none

	mu     sync.Mutex
	failed error
}

func openRaftStore(dir string, log hclog.Logger, fatal func(error)) (*raftStore, raft.SnapshotStore, error) {
	if err := os.MkdirAll(filepath.Join(dir, "log"), 0o700); err != nil {
		return nil, nil, err
	}
	meta := new(metadb.BoltMetaDB)
	w, err := wal.Open(filepath.Join(dir, "log"), wal.WithLogger(log.Named("wal")), wal.WithSegmentSize(segmentBytes), wal.WithMetaStore(meta))
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open raft log: %w", err), meta.Close())
	}
	snaps, err := raft.NewFileSnapshotStoreWithLogger(dir, keepSnapshots, log.Named("snapshot"))
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open raft snapshots: %w", err), w.Close(), meta.Close())
	}
	return &raftStore{wal: w, meta: meta, fatal: fatal}, snaps, nil
}

// do runs one operation of the store unless an earlier one failed.
func (s *raftStore) do(what string, f func() error) error {
	s.mu.Lock()
	failed := s.failed
	s.mu.Unlock()
	if failed != nil {
		return failed
	}
	var err error
	if s.fault != nil {
		err = s.fault(what)
	}
	if err == nil {
		err = f()
	}
	if err == nil || errors.Is(err, raft.ErrLogNotFound) || errors.Is(err, wal.ErrClosed) {
		return err
	}
	s.mu.Lock()
	first := s.failed == nil
	if first {
		s.failed = fmt.Errorf("raft store: %s: %w", what, err)
	}
	failed = s.failed
	s.mu.Unlock()
	if first {
		s.fatal(failed)
	}
	return failed
}

func (s *raftStore) FirstIndex() (i uint64, err error) {
	err = s.do("first index", func() (err error) { i, err = s.wal.FirstIndex(); return })
	return i, err
}

func (s *raftStore) LastIndex() (i uint64, err error) {
	err = s.do("last index", func() (err error) { i, err = s.wal.LastIndex(); return })
	return i, err
}

func (s *raftStore) GetLog(index uint64, l *raft.Log) error {
	return s.do("read log", func() error { return s.wal.GetLog(index, l) })
}

func (s *raftStore) StoreLog(l *raft.Log) error {
	return s.do("write log", func() error { return s.wal.StoreLog(l) })
}

func (s *raftStore) StoreLogs(l []*raft.Log) error {
	return s.do("write log", func() error { return s.wal.StoreLogs(l) })
}

func (s *raftStore) DeleteRange(first, last uint64) error {
	return s.do("truncate log", func() error { return s.wal.DeleteRange(first, last) })
}

func (s *raftStore) Set(key, val []byte) error {
	return s.do("write vote", func() error { return s.wal.Set(key, val) })
}

func (s *raftStore) Get(key []byte) (val []byte, err error) {
	err = s.do("read vote", func() (err error) { val, err = s.wal.Get(key); return })
	return val, err
}

func (s *raftStore) SetUint64(key []byte, val uint64) error {
	return s.do("write term", func() error { return s.wal.SetUint64(key, val) })
}

func (s *raftStore) GetUint64(key []byte) (val uint64, err error) {
	err = s.do("read term", func() (err error) { val, err = s.wal.GetUint64(key); return })
	return val, err
}

// IsMonotonic implements raft.MonotonicLogStore: the log takes no gaps, so raft
// empties it before it goes on from a snapshot.
func (s *raftStore) IsMonotonic() bool { return true }

// Close closes the log and, which raft-wal 0.4 does not do, the file with its
// metadata: its lock would make the next opening in this process wait for ever.
func (s *raftStore) Close() error { return errors.Join(s.wal.Close(), s.meta.Close()) }
