package lsfs

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// lose takes a disk away from the pool for good.
func (r *rig) lose(name string) {
	delete(r.disks, name)
}

// TestLostCapacity loses the device that cold blocks stood on: the pool says which one is
// missing, opens without it when told so, repairs what is read, and forgets the device
// when the last block is repaired.
func TestLostCapacity(t *testing.T) {
	ctx := context.Background()
	r := newTiers(t, 32<<20, 32<<20)
	s := r.start()
	const blocks = 4200
	mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	content := make([]uint64, blocks)
	seq := Seq(0)
	for at := 0; at < blocks; at += 20 {
		var data []byte
		for i := range 20 {
			content[at+i] = uint64(at + i + 1)
			data = append(data, noise(content[at+i])...)
		}
		seq++
		c.must(c.write(1, seq, BlockNo(at), data))
	}
	s.cleaner.mu.Lock() // the cleaner itself is idle: the pool is far from full
	for range 20 {
		if victim, _ := s.coldest(); victim != format.NoSegment {
			s.demote(victim)
		}
	}
	s.cleaner.mu.Unlock()
	held := where(t, s.Volume(1), 0, blocks)[Capacity]
	if held < 500 {
		t.Fatalf("only %d blocks on capacity", held)
	}
	id := deviceAt(t, s, "capacity").ID
	mustClose(t, s)
	away := r.disks["capacity"]
	r.lose("capacity")
	if _, err := Open(ctx, r.cfg); err == nil || !strings.Contains(err.Error(), id.String()) || !strings.Contains(err.Error(), "is missing") {
		t.Fatalf("a missing device: %v", err)
	}
	r.cfg.Forget = []DeviceID{id}
	var events []string
	r.cfg.Event = func(e Event) { events = append(events, e.Code) }
	s = r.start()
	if !slices.Contains(events, "device-lost") {
		t.Fatal(events)
	}
	r.cfg.Event = nil
	if n := len(s.Devices()); n != 2 || s.Devices()[1].State != DeviceLost {
		t.Fatalf("%+v", s.Devices())
	}
	// It goes on: writes, a restart without being told again, and the disk that was given
	// up is not taken when it comes back.
	c = newClient(t, s)
	seq++
	content[7] = 99999
	c.must(c.write(1, seq, 7, noise(content[7])))
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	r.cfg.Forget = nil
	r.disks["capacity"] = away
	s = r.start()
	if s.Devices()[1].State != DeviceLost {
		t.Fatalf("%+v", s.Devices())
	}
	c = newClient(t, s)
	repaired := 0
	v := s.Volume(1)
	buf := make([]byte, dedup.BlockSize)
	for no := range uint64(blocks) {
		err := v.Read(ctx, no*dedup.BlockSize, buf)
		if err == nil {
			continue
		}
		var bad *CorruptError
		if !errors.As(err, &bad) || !errors.Is(err, ErrLost) || bad.Block != BlockNo(no) {
			t.Fatalf("block %d: %v", no, err)
		}
		b, _ := c.reduce(noise(content[no]), false)
		if b.Fingerprint != bad.Fingerprint {
			t.Fatalf("block %d is asked for as another one", no)
		}
		if err := v.Repair(ctx, BlockNo(no), b); err != nil {
			t.Fatal(err)
		}
		repaired++
	}
	if repaired != held && repaired != held-1 {
		t.Fatalf("%d blocks were repaired, %d stood there", repaired, held)
	}
	until(t, "the lost device is forgotten", func() bool { return s.checkpoint() == nil && len(s.Devices()) == 1 })
	mustEqualAs(t, v, content, noise)
	mustCheck(t, s)
	mustClose(t, s)
	s = r.start()
	mustEqualAs(t, s.Volume(1), content, noise)
	mustCheck(t, s)
	mustClose(t, s)
}

// TestLostMetadata loses a device that the log stood on: that is refused, with what to do.
func TestLostMetadata(t *testing.T) {
	r := newRig(t, 1, 12<<20, 12<<20)
	s := r.start()
	h := &history{blocks: 300}
	mustCreate(t, s, 1, h.blocks)
	h.load(t, newClient(t, s), testRand(1), 1, 60, 200)
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	ids := s.Devices()
	mustClose(t, s)
	for i, name := range []string{"disk0", "disk1"} {
		gone := r.disks[name]
		r.lose(name)
		r.cfg.Forget = []DeviceID{ids[i].ID}
		s, err := Open(context.Background(), r.cfg)
		switch {
		case err == nil:
			mustClose(t, s)
			t.Fatalf("without %s, which the log or metadata stood on, the pool opened", name)
		case !strings.Contains(err.Error(), "twinsan store rebuild"):
			t.Fatal(err)
		}
		r.disks[name] = gone
	}
	r.cfg.Forget = nil
	s = r.start()
	mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
	mustClose(t, s)
}
