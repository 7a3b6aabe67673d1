package lsfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/ristretto/v2/z"
	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/dedup"
)

// marksPerGroup is the number of marks that the catalogue keeps as one value.
const marksPerGroup = 32

// knownBlock is a fingerprint and the reference of a stored block that has it.
type knownBlock struct {
	Fingerprint dedup.Fingerprint
	Ref         uint64
}

// badgerCatalogue remembers the fingerprints of all stored blocks on disk: what dedup.Index
// forgets. It is a database (Badger) in a directory of its own, outside of the pool.
//
// It is a hint like dedup.Index: it may lack entries and name blocks that are gone, and
// whoever uses an answer verifies it. So it may be deleted at any time while no process has it
// open, and what cannot be read is begun anew. It is written in large batches by one
// goroutine, never on the way of a write.
//
// Keys and values, in this order of the database:
//
//	"f" first 16 bytes of the fingerprint   reference u64
//	"i"                                    pool [16]
//	"p" group u64, big endian               marksPerGroup marks u64: what the owner knows of a page
//
// Integers in values are little endian. Badger's checksums cover both.
type badgerCatalogue struct {
	dir  string
	pool [16]byte
	db   *badger.DB
	lock *os.File
}

// catalogueDir is the directory within the one that the operator names: it is removed
// when it cannot be read. The number is the version of keys and values.
const catalogueDir = "fingerprints-1"

const (
	fingerprintKey = 'f'
	poolKey        = 'i'
	markKey        = 'p'
)

// The memory of the database is bounded, to some 90 MiB while it is open: tables of entries that are not written yet, and caches
// of blocks and of the indices and filters of tables. Badger's defaults take 0.9 GiB
// and, without a cache for them, another byte and a half of filter per entry.
const (
	memTableBytes   = 16 << 20
	blockCacheBytes = 8 << 20
	indexCacheBytes = 16 << 20
)

// freeLeast is what the file system must have free for anything to be written: the database maps its
// log into memory, and writing to a page that finds no room kills the process.
const freeLeast = 512 << 20

// errCatalogueRoom says that the catalogue's file system is too full for it to be written.
var errCatalogueRoom = errors.New("less than 512 MiB free for the fingerprint catalogue")

// openBadgerCatalogue opens the catalogue of a pool in a directory, which it makes. One that is damaged,
// or of another pool, is emptied. Only one process can have it open. The caller closes it.
func openBadgerCatalogue(dir string, pool [16]byte, logger *slog.Logger) (*badgerCatalogue, error) {
	dir = filepath.Join(dir, catalogueDir)
	fail := func(err error) (*badgerCatalogue, error) {
		return nil, fmt.Errorf("fingerprint catalogue %s: %w", dir, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fail(err)
	}
	c := &badgerCatalogue{dir: dir}
	if err := c.room(); err != nil {
		return fail(err)
	}
	// With a lock of our own all that goes wrong later is damage.
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fail(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = lock.Close()
		return fail(fmt.Errorf("another process has it open: %w", err))
	}
	c.lock = lock
	unclean, err := c.begin()
	if err == nil {
		err = verifyTables(dir, unclean > 0)
	}
	if err == nil && unclean < uncleanMost {
		c.db, err = openBadger(dir, logger)
	}
	if err != nil || c.db == nil {
		logger.Warn("fingerprint catalogue is damaged and is made anew", "path", dir, "err", err)
		if err = os.RemoveAll(dir); err == nil {
			if err = os.MkdirAll(dir, 0o700); err == nil {
				c.db, err = openBadger(dir, logger)
			}
		}
	}
	if err == nil {
		if err = c.adopt(pool); err != nil {
			err = errors.Join(err, c.db.Close())
		}
	}
	if err != nil {
		_ = lock.Close()
		return fail(err)
	}
	return c, nil
}

// uncleanMost is how many times in a row the process may have ended with the catalogue open before
// the catalogue is the suspect, and is made anew.
const uncleanMost = 3

// begin counts in a file beside the catalogue that it was opened and not closed, and returns the count of
// before.
func (c *badgerCatalogue) begin() (unclean int, err error) {
	b, err := os.ReadFile(c.dir + ".open")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	if err == nil {
		if unclean, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			unclean = 1
		}
	}
	return unclean, os.WriteFile(c.dir+".open", fmt.Appendln(nil, unclean%uncleanMost+1), 0o600)
}

// verifyTables looks at all tables before the database does, which panics over a damaged one on a goroutine
// of its own, and would so end the process. With blocks it reads all of them, else what
// the database reads when it opens a table; blocks it verifies itself, one by one.
func verifyTables(dir string, blocks bool) error {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	paths, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	if err != nil {
		return err
	}
	for _, path := range paths {
		if err := verifyTable(path, blocks); err != nil {
			return fmt.Errorf("table %s: %w", filepath.Base(path), err)
		}
	}
	return nil
}

func verifyTable(path string, blocks bool) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = errors.New("damaged")
		}
	}()
	m, err := z.OpenMmapFile(path, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer m.Close(-1)
	t, err := table.OpenTable(m, table.Options{BlockSize: 4096, Compression: options.None})
	if err == nil && blocks {
		err = t.VerifyChecksum()
	}
	return err
}

func openBadger(dir string, logger *slog.Logger) (*badger.DB, error) {
	o := badger.DefaultOptions(dir).WithLogger(badgerLog{logger}).WithMetricsEnabled(false).
		WithMemTableSize(memTableBytes).WithNumMemtables(2).WithBlockCacheSize(blockCacheBytes).WithIndexCacheSize(indexCacheBytes).
		WithValueLogFileSize(16 << 20).WithNumVersionsToKeep(1).WithDetectConflicts(false).WithCompression(options.None).
		WithChecksumVerificationMode(options.OnBlockRead).WithNumCompactors(2).WithNumGoroutines(2)
	return badger.Open(o)
}

// badgerLog passes on what an operator should know.
type badgerLog struct{ to *slog.Logger }

func (l badgerLog) Errorf(text string, args ...any) {
	l.to.Warn("fingerprint catalogue", "err", strings.TrimSpace(fmt.Sprintf(text, args...)))
}

func (l badgerLog) Warningf(text string, args ...any) { l.Errorf(text, args...) }
func (badgerLog) Infof(string, ...any)                {}
func (badgerLog) Debugf(string, ...any)               {}

// adopt empties a catalogue of another pool.
func (c *badgerCatalogue) adopt(pool [16]byte) error {
	var was []byte
	err := c.db.View(func(txn *badger.Txn) error {
		item, err := txn.Get([]byte{poolKey})
		if err != nil {
			return err
		}
		was, err = item.ValueCopy(nil)
		return err
	})
	if err != nil && !errors.Is(err, badger.ErrKeyNotFound) {
		return err
	}
	c.pool = pool
	if string(was) == string(pool[:]) {
		return nil
	}
	return c.Reset()
}

// room says whether there is room to write.
func (c *badgerCatalogue) room() error {
	var st unix.Statfs_t
	if err := unix.Statfs(c.dir, &st); err != nil {
		return err
	}
	if int64(st.Bavail)*st.Bsize < freeLeast {
		return errCatalogueRoom
	}
	return nil
}

// Reset empties the catalogue.
func (c *badgerCatalogue) Reset() error {
	if err := c.db.DropAll(); err != nil {
		return fmt.Errorf("empty the fingerprint catalogue: %w", err)
	}
	return c.db.Update(func(txn *badger.Txn) error { return txn.Set([]byte{poolKey}, c.pool[:]) })
}

// entryKey is the key of a fingerprint. Half of it is plenty to tell blocks apart, and
// those that take an answer compare all of it.
func entryKey(fp *dedup.Fingerprint) []byte { return append([]byte{fingerprintKey}, fp[:16]...) }

// Lookup calls f for each of the entries with what the catalogue holds for its fingerprint,
// in order. It is fastest when they are sorted by fingerprint. f must not call the catalogue.
func (c *badgerCatalogue) Lookup(list []knownBlock, f func(i int, ref uint64, found bool)) error {
	txn := c.db.NewTransaction(false)
	defer txn.Discard()
	for i := range list {
		item, err := txn.Get(entryKey(&list[i].Fingerprint))
		if errors.Is(err, badger.ErrKeyNotFound) {
			f(i, 0, false)
			continue
		}
		if err != nil {
			return fmt.Errorf("look up a fingerprint: %w", err)
		}
		ref, ok := uint64(0), false
		err = item.Value(func(v []byte) error {
			if ok = len(v) == 8; ok {
				ref = binary.LittleEndian.Uint64(v)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("look up a fingerprint: %w", err)
		}
		f(i, ref, ok)
	}
	return nil
}

// Put remembers entries. On return they survive a power cut. errCatalogueRoom when the file system is
// too full.
func (c *badgerCatalogue) Put(list []knownBlock) error {
	if len(list) == 0 {
		return nil
	}
	if err := c.room(); err != nil {
		return err
	}
	b := c.db.NewWriteBatch()
	defer b.Cancel()
	for i := range list {
		if err := b.Set(entryKey(&list[i].Fingerprint), binary.LittleEndian.AppendUint64(nil, list[i].Ref)); err != nil {
			return fmt.Errorf("remember fingerprints: %w", err)
		}
	}
	if err := b.Flush(); err != nil {
		return fmt.Errorf("remember fingerprints: %w", err)
	}
	return c.db.Sync()
}

func groupKey(group uint64) []byte { return binary.BigEndian.AppendUint64([]byte{markKey}, group) }

// Marks fills dst with the marks of a group of pages, 0 where there is none.
func (c *badgerCatalogue) Marks(group uint64, dst *[marksPerGroup]uint64) error {
	clear(dst[:])
	err := c.db.View(func(txn *badger.Txn) error {
		item, err := txn.Get(groupKey(group))
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return item.Value(func(v []byte) error {
			for i := range min(len(v)/8, marksPerGroup) {
				dst[i] = binary.LittleEndian.Uint64(v[8*i:])
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("marks of the fingerprint catalogue: %w", err)
	}
	return nil
}

// groupMarks are the marks of one group.
type groupMarks struct {
	Group uint64
	Marks [marksPerGroup]uint64
}

// PutMarks sets marks. The caller has put what they stand for before.
func (c *badgerCatalogue) PutMarks(list []groupMarks) error {
	if len(list) == 0 {
		return nil
	}
	if err := c.room(); err != nil {
		return err
	}
	b := c.db.NewWriteBatch()
	defer b.Cancel()
	for i := range list {
		v := make([]byte, 0, 8*marksPerGroup)
		for _, m := range list[i].Marks {
			v = binary.LittleEndian.AppendUint64(v, m)
		}
		if err := b.Set(groupKey(list[i].Group), v); err != nil {
			return fmt.Errorf("marks of the fingerprint catalogue: %w", err)
		}
	}
	if err := b.Flush(); err != nil {
		return fmt.Errorf("marks of the fingerprint catalogue: %w", err)
	}
	return nil
}

// Bytes is what the catalogue takes on disk, without its logs of at most 64 MiB.
func (c *badgerCatalogue) Bytes() (n int64) {
	for _, t := range c.db.Tables() {
		n += int64(t.OnDiskSize)
	}
	return n
}

// Close ends the use of the catalogue. No other call may be running or follow.
func (c *badgerCatalogue) Close() error {
	err := c.db.Close()
	if err == nil {
		err = os.Remove(c.dir + ".open")
	}
	_ = c.lock.Close()
	if err != nil {
		return fmt.Errorf("close the fingerprint catalogue: %w", err)
	}
	return nil
}
