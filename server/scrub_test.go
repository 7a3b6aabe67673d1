package server

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestScrubRepairsFromTheOtherNode rots blocks on the disk of one node of two. Its scrub,
// started through the other one, finds them all and brings them from there.
func TestScrubRepairsFromTheOtherNode(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	ca, cb := l.config("a", false), l.config("b", false)
	cb.Store.ScrubDays = 0 // and only when it is asked for
	data := make([]byte, 64*4096)
	_, _ = rand.Read(data)
	a, b := l.join(ca, cb)
	l.fill(a, b, data)

	f, err := os.OpenFile(cb.Store.Devices[0], os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	raw := make([]byte, cb.Store.DeviceSize)
	if _, err := f.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	rotten := 0
	for i := 0; i < 64; i += 3 {
		at := bytes.Index(raw, data[i*4096:(i+1)*4096])
		if at < 0 {
			t.Fatalf("block %d is not on the disk as it is", i)
		}
		if _, err := f.WriteAt([]byte{raw[at+700] ^ 4}, int64(at+700)); err != nil {
			t.Fatal(err)
		}
		rotten++
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if s, err := a.ScrubNode(ctx, "b", ScrubShow, false, false); err != nil || s.Node != "b" || s.Running || !s.NextPass.IsZero() || !s.Last.Finished.IsZero() {
		t.Fatalf("before: %+v, %v", s, err)
	}
	if _, err := a.ScrubNode(ctx, "b", ScrubStart, true, false); err != nil {
		t.Fatal(err)
	}
	l.await("scrub", func() error {
		s, err := a.ScrubNode(ctx, "b", ScrubShow, false, false)
		if err == nil && (s.Last.Finished.IsZero() || s.Running) {
			err = fmt.Errorf("%+v", s)
		}
		return err
	})
	s, err := a.ScrubNode(ctx, "b", ScrubShow, false, false)
	if err != nil || s.Last.Damaged != uint64(rotten) || s.Last.Repaired != uint64(rotten) || s.Last.Lost != 0 || s.Last.Blocks != 64 || !s.Reclaim {
		t.Fatalf("%d rotten: %+v, %v", rotten, s, err)
	}
	checkMetrics(t, cb.Metrics.Address, "twinsan_scrub_running 0", "twinsan_pool_reclaim 1", fmt.Sprintf(`twinsan_scrub_found{kind="repaired"} %d`, rotten))
	st, err := a.Status(ctx)
	if err != nil || st.Nodes[1].Scrub == nil || st.Nodes[1].Scrub.Last.Repaired != uint64(rotten) {
		t.Errorf("status: %+v, %v", st, err)
	}
	for _, name := range []string{"z", "w"} {
		if _, err := a.ScrubNode(ctx, name, ScrubStop, false, false); !errors.Is(err, ErrNotFound) {
			t.Errorf("node %s: %v", name, err)
		}
	}
	if s, err := a.ScrubNode(ctx, "b", ScrubStop, false, false); err != nil || !s.Stopped {
		t.Errorf("stop: %+v, %v", s, err)
	}
	l.close(b)
	if state := readScrub(cb.DataDir); !state.Stopped || state.Last.Repaired != uint64(rotten) {
		t.Errorf("%s holds %+v", filepath.Join(cb.DataDir, scrubFile), state)
	}
	if r, err := CheckStore(ctx, cb, nil, false); err != nil || r.Count != 0 || r.Blocks != 64 {
		t.Errorf("offline: %+v, %v", r, err)
	}
}
