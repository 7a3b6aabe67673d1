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

// raftStore is the durable half of raft: its log, its vote and its snapshots. The
// first error of a write or a read latches: whether the failed write reached the disk
// is not known, so nothing may be built on this store in this process again. fatal is
// told once, is expected to see to it that raft says no more to the others, and to end
// the process; the next start reads back what is really there.
type raftStore struct {
	wal   *wal.WAL
	meta  *metadb.BoltMetaDB // the wal's; it opens it and leaves it open
	fatal func(error)
	fault func(what string) error // tests; nil: none. It runs before each operation.

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
	s := &raftStore{wal: w, meta: meta, fatal: fatal}
	if injectedFault != nil {
		s.fault = injectedFault(dir)
	}
	return s, &snapshotStore{snaps, s}, nil
}

// injectedFault makes the fault of each store that is opened, in binaries for tests.
var injectedFault func(dir string) func(what string) error

// snapshotStore is raft's snapshots under the latch of its store.
type snapshotStore struct {
	raft.SnapshotStore
	store *raftStore
}

// Create implements raft.SnapshotStore.
func (s *snapshotStore) Create(version raft.SnapshotVersion, index, term uint64, conf raft.Configuration, confIndex uint64, trans raft.Transport) (sink raft.SnapshotSink, err error) {
	err = s.store.do("write snapshot", func() (err error) {
		sink, err = s.SnapshotStore.Create(version, index, term, conf, confIndex, trans)
		return
	})
	if err != nil {
		return nil, err
	}
	return &snapshotSink{sink, s.store}, nil
}

// snapshotSink is a snapshot that is being written; Close makes it durable.
type snapshotSink struct {
	raft.SnapshotSink
	store *raftStore
}

func (s *snapshotSink) Write(p []byte) (n int, err error) {
	err = s.store.do("write snapshot", func() (err error) { n, err = s.SnapshotSink.Write(p); return })
	return n, err
}

func (s *snapshotSink) Close() error {
	err := s.store.do("write snapshot", s.SnapshotSink.Close)
	if err != nil {
		_ = s.SnapshotSink.Cancel() // what there is of it goes, if it can
	}
	return err
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

// SetUint64 never fails for the current term, on which raft would panic: when fatal
// has been told, no connection of raft is left by which a term that was not stored
// could be used, and entries of it are not stored either.
func (s *raftStore) SetUint64(key []byte, val uint64) error {
	err := s.do("write term", func() error { return s.wal.SetUint64(key, val) })
	if err != nil && string(key) == "CurrentTerm" {
		return nil
	}
	return err
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
