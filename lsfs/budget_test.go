package lsfs

import (
	"context"
	"strings"
	"testing"

	"github.com/twinsan/twinsan/lsfs/format"
)

func TestBudgetIsDivided(t *testing.T) {
	const mib = 1 << 20
	for _, test := range []struct {
		ram, frames, index         int64 // what is set
		wantFrames, wantIndex      int64
		divided                    bool
		refused                    string
		pool, reserved, framesLeft int64
	}{
		{wantFrames: 256 * mib, wantIndex: 64 * mib, framesLeft: 256 * mib},
		{ram: 1024 * mib, wantFrames: 768 * mib, wantIndex: 256 * mib, divided: true, pool: 1 << 40, reserved: 152, framesLeft: 615 * mib},
		{ram: 1024 * mib, wantFrames: 768 * mib, wantIndex: 256 * mib, divided: true, pool: 64 << 40, reserved: 256, framesLeft: 512 * mib},
		{ram: 16 * mib, wantFrames: 12 * mib, wantIndex: 4 * mib, divided: true, pool: 64 << 40, reserved: 4, framesLeft: 8 * mib},
		{ram: 1024 * mib, frames: 700 * mib, wantFrames: 700 * mib, wantIndex: 324 * mib, pool: 1 << 40, framesLeft: 700 * mib},
		{ram: 1024 * mib, index: 700 * mib, wantFrames: 324 * mib, wantIndex: 700 * mib, divided: true, pool: 1 << 30, reserved: 0, framesLeft: 323 * mib},
		{ram: 64 * mib, index: 20 * mib, frames: 20 * mib, wantFrames: 20 * mib, wantIndex: 20 * mib, framesLeft: 20 * mib},
		{ram: 8 * mib, refused: "at least"},
		{ram: 64 * mib, frames: 40 * mib, index: 40 * mib, refused: "too little"},
		{ram: 64 * mib, index: 60 * mib, refused: "too little"},
		{ram: 64 * mib, frames: 64 * mib, refused: "too little"},
	} {
		c, err := Config{Devices: []string{"d"}, MetadataRAM: test.ram, MetadataBytes: test.frames, IndexBytes: test.index}.withDefaults()
		if test.refused != "" {
			if err == nil || !strings.Contains(err.Error(), test.refused) {
				t.Errorf("%+v: %v", test, err)
			}
			continue
		}
		if err != nil || c.MetadataBytes != test.wantFrames || c.IndexBytes != test.wantIndex || c.divided != test.divided {
			t.Errorf("%+v: %d frames, %d index, %v", test, c.MetadataBytes, c.IndexBytes, err)
			continue
		}
		if n := c.reserve(test.pool, uint32(test.pool>>24)); n>>20 != test.reserved || c.MetadataBytes>>20 != test.framesLeft>>20 {
			t.Errorf("%+v: %d MiB kept for the directory, %d left", test, n>>20, c.MetadataBytes>>20)
		}
		if again, err := c.withDefaults(); err != nil || again.MetadataBytes != c.MetadataBytes || again.IndexBytes != c.IndexBytes || again.divided != c.divided {
			t.Errorf("twice: %+v, %v", again, err)
		}
	}
}

// TestBudgetIsKept opens a pool with a budget, and one that has outgrown it.
func TestBudgetIsKept(t *testing.T) {
	r := newRig(t, 1, 16<<20)
	var events []Event
	r.cfg.MetadataRAM, r.cfg.MetadataBytes, r.cfg.IndexBytes = 32<<20, 0, 0
	r.cfg.Event = func(e Event) { events = append(events, e) }
	s := r.start()
	if st := s.Stats(); st.Index.Bytes != 8<<20 || int64(s.pg.max)*format.PageSize+st.Index.Bytes+st.FixedBytes > 32<<20 || int64(s.pg.max)*format.PageSize < 20<<20 {
		t.Errorf("%d frames, %+v", s.pg.max, st)
	}
	if s.outgrown != nil || len(events) > 0 {
		t.Error(s.outgrown, events)
	}
	mustClose(t, s)
	s, err := open(context.Background(), r.cfg) // without goroutines
	if err != nil {
		t.Fatal(err)
	}
	defer s.free()
	frames := s.pg.max
	s.keepBudget(s.fixedBytes() - 4<<20)
	if s.outgrown != nil || s.pg.max != frames-4<<20/format.PageSize || s.dirtyHard != int64(s.pg.max)*5/8 {
		t.Errorf("4 MiB more for the directory: %d frames of %d, %v", s.pg.max, frames, s.outgrown)
	}
	s.keepBudget(s.fixedBytes() - 100<<20)
	if s.outgrown == nil || s.pg.max != framesMin/format.PageSize || !strings.Contains(s.outgrown.Error(), "of the 32 MiB for metadata") {
		t.Errorf("%d frames, %v", s.pg.max, s.outgrown)
	}
}
