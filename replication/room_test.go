package replication

import (
	"bytes"
	"errors"
	"testing"
)

// TestUnmapWithoutRoom: in a pool that is full to the last page, an unmap that would copy
// what a clone shares is refused before it has a number. The node goes on owning and
// serving, in the same epoch, and unmaps that copy nothing are done.
func TestUnmapWithoutRoom(t *testing.T) {
	b := newBench(t)
	a, _ := b.pair(16 << 20)
	data := pattern(1, 4<<20)
	a.write(t, 0, data)
	if err := a.do(&Request{Op: OpClone, Off: 8 << 20, Len: 4 << 20, Source: 1}); err != nil {
		t.Fatal(err)
	}
	epoch := b.record().Epoch
	a.faults.sealed.Store(true)
	if err := a.do(&Request{Op: OpUnmap, Off: 8 << 20, Len: 1 << 20}); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("an unmap without room for its copy: %v", err)
	}
	if err := a.do(&Request{Op: OpUnmap, Off: 8 << 20, Len: 2 << 20}); err != nil {
		t.Fatalf("an unmap of a whole leaf: %v", err)
	}
	want := append(make([]byte, 2<<20), pattern(1, 4<<20)[2<<20:]...)
	if got := a.read(t, 8<<20, 4<<20); !bytes.Equal(got, want) {
		t.Error("the refused unmap did something")
	}
	a.faults.sealed.Store(false)
	if err := a.do(&Request{Op: OpUnmap, Off: 10 << 20, Len: 1 << 20}); err != nil {
		t.Fatalf("with room again: %v", err)
	}
	if now := b.record(); now.Epoch != epoch || now.Owner != 1 || len(now.InSync) != 2 {
		t.Errorf("the record is %+v, the epoch was %d", now, epoch)
	}
	b.equal()
}
