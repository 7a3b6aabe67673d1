package lsfs

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/twinsan/twinsan/dedup"
)

func mustOpenCatalogue(t *testing.T, dir string, pool byte) *badgerCatalogue {
	t.Helper()
	c, err := openBadgerCatalogue(dir, [16]byte{pool}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *badgerCatalogue) mustHold(t *testing.T, list []knownBlock, want bool) {
	t.Helper()
	n := 0
	err := c.Lookup(list, func(i int, ref uint64, found bool) {
		if i != n || found != want || found && ref != list[i].Ref {
			t.Fatalf("entry %d: %d, %v", i, ref, found)
		}
		n++
	})
	if err != nil || n != len(list) {
		t.Fatal(n, err)
	}
}

// TestCatalogue: what is put is there, after a restart too; another pool's, a damaged one, and one
// that the process ended with again and again are begun anew.
func TestCatalogue(t *testing.T) {
	dir := t.TempDir()
	list := make([]knownBlock, 20_000)
	r := dedup.NewReducer(dedup.Key{1})
	block := make([]byte, dedup.BlockSize)
	for i := range list {
		block[0], block[1], block[2] = byte(i), byte(i>>8), byte(i>>16)
		list[i] = knownBlock{r.Fingerprint(block), 1<<60 + uint64(i)}
	}
	c := mustOpenCatalogue(t, dir, 1)
	c.mustHold(t, list[:10], false)
	put := func() {
		t.Helper()
		if err := c.Put(list); err != nil {
			t.Fatal(err)
		}
		if err := c.PutMarks([]groupMarks{{Group: 3, Marks: [marksPerGroup]uint64{0: 5, 31: 6}}}); err != nil {
			t.Fatal(err)
		}
		c.mustHold(t, list, true)
	}
	put()
	if _, err := openBadgerCatalogue(dir, [16]byte{1}, slog.New(slog.DiscardHandler)); err == nil {
		t.Fatal("opened twice")
	}
	reopen := func(pool byte) {
		t.Helper()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		c = mustOpenCatalogue(t, dir, pool)
	}
	reopen(1)
	c.mustHold(t, list, true)
	var marks [marksPerGroup]uint64
	if err := c.Marks(3, &marks); err != nil || marks[0] != 5 || marks[31] != 6 {
		t.Fatal(marks, err)
	}
	if err := c.Marks(4, &marks); err != nil || marks != [marksPerGroup]uint64{} {
		t.Fatal(marks, err)
	}
	if c.Bytes() < 20_000*25 {
		t.Fatalf("%d bytes", c.Bytes())
	}

	reopen(2)
	c.mustHold(t, list, false)
	put()

	// Damage, of a kind that a table's index shows, and of one that only its blocks show.
	damage := func(change func(path string) error) {
		t.Helper()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		paths, err := filepath.Glob(filepath.Join(dir, catalogueDir, "*.sst"))
		if err != nil || len(paths) == 0 {
			t.Fatal(paths, err)
		}
		for _, p := range paths {
			if err := change(p); err != nil {
				t.Fatal(err)
			}
		}
		c = mustOpenCatalogue(t, dir, 2)
	}
	damage(func(path string) error { return os.Truncate(path, 1000) })
	c.mustHold(t, list, false)
	put()
	flip := func(path string) error {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		b[len(b)/3] ^= 1
		return os.WriteFile(path, b, 0o600)
	}
	damage(flip)
	found := 0
	err := c.Lookup(list, func(i int, ref uint64, ok bool) {
		if ok && ref != list[i].Ref {
			t.Fatalf("entry %d is %d", i, ref)
		}
		if ok {
			found++
		}
	})
	if err == nil && found == len(list) {
		t.Fatal("damaged blocks are read")
	}
	damage(func(path string) error {
		if err := flip(path); err != nil { // back
			return err
		}
		return os.WriteFile(filepath.Join(dir, catalogueDir+".open"), []byte("1\n"), 0o600)
	})
	c.mustHold(t, list, true)
	damage(func(path string) error {
		if err := flip(path); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, catalogueDir+".open"), []byte("1\n"), 0o600)
	})
	c.mustHold(t, list, false)
	put()
	damage(func(string) error {
		return os.WriteFile(filepath.Join(dir, catalogueDir+".open"), []byte("3\n"), 0o600)
	})
	c.mustHold(t, list, false)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, catalogueDir+".open")); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}
