package lsfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testKey = dedup.Key{1, 2, 3}

// rig is a pool of disks in memory and what it takes to open it again.
type rig struct {
	tb    testing.TB
	disks map[string]*devicetest.Disk
	names []string
	cfg   Config
	opts  func(*Config) // what a test changes of the configuration
	cold  *coldStores   // not nil: all that moves is cold

	persisting sync.Mutex // held to change names, cfg.Devices and cfg.Generation while a store runs
}

func newRig(tb testing.TB, seed uint64, sizes ...int64) *rig {
	tb.Helper()
	r := &rig{tb: tb, disks: map[string]*devicetest.Disk{}}
	for i, n := range sizes {
		name := fmt.Sprintf("disk%d", i)
		r.names = append(r.names, name)
		r.disks[name] = devicetest.New(seed+uint64(i), n)
		r.disks[name].SetPath(name)
	}
	r.configure()
	err := Format(context.Background(), FormatConfig{Pool: [16]byte{7}, Key: testKey, Devices: r.names, SegmentBytes: format.SegmentMin, OpenDevice: r.open})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

func (r *rig) configure() {
	r.cfg = Config{
		Devices: r.names, OpenDevice: r.open, Key: testKey,
		L1Bytes: 1 << 20, MetadataBytes: 8 << 20, IndexBytes: 64 << 10,
	}
	if r.opts != nil {
		r.opts(&r.cfg)
	}
}

func (r *rig) open(path string) (device.Device, error) {
	d := r.disks[path]
	if d == nil {
		return nil, fmt.Errorf("no device %s", path)
	}
	d.Reopen()
	return d, nil
}

func (r *rig) start() *Store {
	r.tb.Helper()
	s, err := Open(context.Background(), r.cfg)
	if err != nil {
		r.tb.Fatal(err)
	}
	r.cold.add(s)
	return s
}

// crash gives the pool that a power cut would leave.
func (r *rig) crash(o devicetest.CrashOptions) *rig {
	c := &rig{tb: r.tb, disks: map[string]*devicetest.Disk{}, names: r.names, opts: r.opts, cold: r.cold}
	for i, n := range r.names {
		o.Seed += uint64(i)
		c.disks[n] = r.disks[n].Crash(o)
		c.disks[n].SetPath(n)
	}
	c.configure()
	return c
}

// client reduces and submits writes as an owner does.
type client struct {
	tb  testing.TB
	s   *Store
	red *dedup.Reducer
}

func newClient(tb testing.TB, s *Store) *client {
	return &client{tb: tb, s: s, red: dedup.NewReducer(testKey)}
}

func (c *client) reduce(block []byte, pin bool) (b dedup.Block, bid BID) {
	if dedup.IsZero(block) {
		return dedup.Block{}, 0
	}
	b.Fingerprint = c.red.Fingerprint(block)
	enc, data := c.red.Encode(make([]byte, 0, 8192), block, true)
	b.Encoding, b.Data, b.Sum = enc, data, dedup.Sum(data)
	if pin {
		if bid, ok := c.s.Pin(&b.Fingerprint); ok {
			b.Data = nil
			return b, bid
		}
	}
	return b, 0
}

func (c *client) write(v VolumeID, seq Seq, start BlockNo, data []byte) *Op {
	n := len(data) / dedup.BlockSize
	op := &Op{Kind: OpWrite, Volume: v, ID: OpID{1, seq}, Start: start, Count: uint32(n)}
	for i := range n {
		b, bid := c.reduce(data[i*dedup.BlockSize:(i+1)*dedup.BlockSize], true)
		op.Blocks = append(op.Blocks, b)
		op.Pinned = append(op.Pinned, bid)
	}
	return op
}

// do appends, commits and waits.
func (c *client) do(op *Op) error {
	done := make(chan error, 1)
	op.Done = func(_ *Op, err error) { done <- err }
	c.s.Append(op)
	c.s.Kick()
	err := <-done
	if err != nil {
		for _, b := range op.Pinned {
			if b != 0 {
				c.s.Unpin(b)
			}
		}
	}
	return err
}

func (c *client) must(op *Op) {
	c.tb.Helper()
	if err := c.do(op); err != nil {
		c.tb.Fatal(err)
	}
}

func mustCheck(tb testing.TB, s *Store) {
	tb.Helper()
	r, err := s.check(context.Background(), true)
	if err != nil {
		tb.Fatal(err)
	}
	if !r.OK() {
		for _, p := range r.Problems {
			tb.Error(p)
		}
		tb.FailNow()
	}
}

func mustClose(tb testing.TB, s *Store) {
	tb.Helper()
	if err := s.Close(); err != nil {
		tb.Fatal(err)
	}
}

func mustCreate(tb testing.TB, s *Store, id VolumeID, blocks uint64) *Volume {
	tb.Helper()
	v, err := s.CreateVolume(context.Background(), id, blocks, [16]byte{byte(id)})
	if err != nil {
		tb.Fatal(err)
	}
	return v
}

// pattern fills a block that compresses by about half and is told apart by n.
func pattern(n uint64) []byte {
	b := make([]byte, dedup.BlockSize)
	rng := rand.New(rand.NewPCG(n, 99))
	for i := 0; i < len(b)/2; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
	}
	binary.LittleEndian.PutUint64(b[4000:], n)
	return b
}

// noise is a block that does not compress.
func noise(n uint64) []byte {
	b := make([]byte, dedup.BlockSize)
	rng := rand.New(rand.NewPCG(n, 98))
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
	}
	return b
}

func TestWriteReadReopen(t *testing.T) {
	r := newRig(t, 1, 32<<20, 16<<20)
	s := r.start()
	v := mustCreate(t, s, 5, 1000)
	c := newClient(t, s)
	var data []byte
	for i := range 40 {
		data = append(data, pattern(uint64(i%30))...)
	}
	copy(data[4096*7:], make([]byte, 4096))
	c.must(c.write(5, 1, 100, data))
	c.must(c.write(5, 2, 500, data[:4096*8]))
	c.must(&Op{Kind: OpUnmap, Volume: 5, ID: OpID{1, 3}, Start: 502, Count: 2})
	c.must(&Op{Kind: OpEpoch, Volume: 5, ID: OpID{2, 4}})
	c.must(&Op{Kind: OpState, Volume: 5, ID: OpID{2, 5}, State: []byte("reservations")})
	want := make([]byte, 1000*4096)
	copy(want[100*4096:], data)
	copy(want[500*4096:], data[:4096*8])
	clear(want[502*4096 : 504*4096])
	verify := func(s *Store) {
		t.Helper()
		v := s.Volume(5)
		got := make([]byte, len(want))
		if err := v.Read(context.Background(), 0, got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatal("content differs")
		}
		part := make([]byte, 4096*3-512)
		if err := v.Read(context.Background(), 100*4096+512, part); err != nil || !bytes.Equal(part, want[100*4096+512:][:len(part)]) {
			t.Fatalf("unaligned read: %v", err)
		}
		clear(part)
		if !v.TryRead(100*4096+512, part) || !bytes.Equal(part, want[100*4096+512:][:len(part)]) {
			t.Fatal("cached unaligned read")
		}
		m := v.Meta()
		if m.Durable != (OpID{2, 5}) || string(m.State) != "reservations" || len(m.EpochLog) != 1 || m.EpochLog[0] != (OpID{2, 4}) || m.Replica != [16]byte{5} {
			t.Fatalf("meta %+v", m)
		}
		if n := v.MappedBlocks(); n != 39+5 {
			t.Fatalf("%d blocks mapped", n)
		}
		mustCheck(t, s)
	}
	verify(s)
	d1, err := v.Digest(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if st := s.Stats(); st.BlocksNew != 30 {
		t.Fatalf("%d blocks stored, want the 30 different ones", st.BlocksNew)
	}
	mustClose(t, s)
	r.cfg.Devices = []string{"disk1", "disk0"}
	s = r.start()
	verify(s)
	d2, err := s.Volume(5).Digest(context.Background())
	if err != nil || d1 != d2 {
		t.Fatal("digest changed over a restart", err)
	}
	list, err := s.Volume(5).ChangedChunks(context.Background(), 1)
	if err != nil || fmt.Sprint(list) != "[1]" {
		t.Fatal(list, err)
	}
	mustClose(t, s)
	rep, err := CheckPool(context.Background(), r.cfg)
	if err != nil || !rep.OK() {
		t.Fatal(rep, err)
	}
}

func TestAppendRefuses(t *testing.T) {
	r := newRig(t, 1, 32<<20)
	s := r.start()
	defer mustClose(t, s)
	mustCreate(t, s, 1, 100)
	c := newClient(t, s)
	c.must(c.write(1, 1, 0, pattern(1)))
	bad := c.write(1, 2, 0, pattern(2))
	bad.Blocks[0].Sum++
	tests := []struct {
		name string
		op   *Op
		want error
	}{
		{"gap", c.write(1, 3, 0, pattern(3)), ErrGap},
		{"repeated", c.write(1, 1, 0, pattern(3)), ErrGap},
		{"no volume", c.write(2, 1, 0, pattern(3)), ErrNoVolume},
		{"behind the end", c.write(1, 2, 100, pattern(3)), ErrRange},
		{"bad checksum", bad, ErrInvalidOp},
		{"count", &Op{Kind: OpWrite, Volume: 1, ID: OpID{1, 2}, Count: 2, Blocks: make([]dedup.Block, 1)}, ErrInvalidOp},
		{"unpinned reference", &Op{Kind: OpWrite, Volume: 1, ID: OpID{1, 2}, Count: 1, Blocks: []dedup.Block{{Encoding: dedup.Raw}}}, ErrInvalidOp},
		{"kind", &Op{Kind: 77, Volume: 1, ID: OpID{1, 2}}, ErrInvalidOp},
	}
	for _, tt := range tests {
		if err := c.do(tt.op); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	c.must(c.write(1, 2, 5, pattern(4)))
	mustCheck(t, s)
}
