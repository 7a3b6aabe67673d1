package lsfs

import (
	"bytes"
	"context"
	"slices"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
)

// TestBootStorm: a hundred clones of one image are read at the same time. The devices
// read the image once, and RAM holds it once.
func TestBootStorm(t *testing.T) {
	const clones, blocks = 100, 1024
	r := newRig(t, 1, 64<<20)
	r.cfg.L1Bytes, r.cfg.MetadataBytes = 32<<20, 32<<20
	s := r.start()
	mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	var seq Seq
	fill(c, 1, &seq, blocks, known)
	var volumes []*Volume
	for i := range clones {
		id := VolumeID(2 + i)
		volumes = append(volumes, mustCreate(t, s, id, blocks))
		c.must(&Op{Kind: OpClone, Volume: id, ID: OpID{1, 1}, Count: blocks, Source: 1})
	}
	mustClose(t, s)

	s = r.start() // nothing is cached
	<-s.filled    // it reads pages
	for i := range clones {
		volumes[i] = s.Volume(VolumeID(2 + i))
	}
	was := s.Stats()
	start := make(chan struct{})
	var group sync.WaitGroup
	for i, v := range volumes {
		group.Go(func() {
			sizes := []int{1, 4, 16, 64, 256}
			buf := make([]byte, 256*dedup.BlockSize)
			<-start
			for at, k := 0, i; at < blocks; k++ {
				n := min(sizes[k%len(sizes)], blocks-at)
				p := buf[:n*dedup.BlockSize]
				if !v.TryRead(uint64(at)*dedup.BlockSize, p) {
					if err := v.Read(context.Background(), uint64(at)*dedup.BlockSize, p); err != nil {
						t.Error(err)
						return
					}
				}
				for j := range n {
					if !bytes.Equal(p[j*dedup.BlockSize:][:dedup.BlockSize], known(uint64(at+j))) {
						t.Errorf("volume %d block %d: other content", v.id, at+j)
						return
					}
				}
				at += n
			}
		})
	}
	close(start)
	group.Wait()
	st := s.Stats()
	// Blocks far apart may share a place in the table of claims; those of one image do not.
	if n := st.BlockReads - was.BlockReads; n != blocks {
		t.Errorf("%d blocks were read from the devices for an image of %d", n, blocks)
	}
	if st.L1.Bytes > blocks*dedup.BlockSize {
		t.Errorf("RAM holds %d bytes of an image of %d", st.L1.Bytes, blocks*dedup.BlockSize)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestOneReadForMany: reads of one block that meet at the device are one. The device
// holds the first until the others are there.
func TestOneReadForMany(t *testing.T) {
	const readers = 50
	r := newRig(t, 1, 16<<20)
	r.cfg.ReadAhead = -1
	s := r.start()
	mustCreate(t, s, 1, 64)
	c := newClient(t, s)
	c.must(c.write(1, 1, 7, pattern(7)))
	mustClose(t, s)
	s = r.start()
	<-s.filled // it reads pages
	v := s.Volume(1)
	buf := make([]byte, dedup.BlockSize)
	if err := v.Read(context.Background(), 0, buf); err != nil { // brings the maps in
		t.Fatal(err)
	}
	s.mu.RLock()
	_, _, missing, _ := s.pg.lookup(s.identities, entryShift, 1)
	s.mu.RUnlock()
	if missing != 0 {
		if err := s.fault(missing, false); err != nil {
			t.Fatal(err)
		}
	}
	disk := r.disks["disk0"]
	was := disk.Counts(devicetest.Read)
	release := disk.Hold(devicetest.Read)
	var group sync.WaitGroup
	for range readers {
		group.Go(func() {
			buf := make([]byte, dedup.BlockSize)
			if err := v.Read(context.Background(), 7*dedup.BlockSize, buf); err != nil || !bytes.Equal(buf, pattern(7)) {
				t.Errorf("%v", err)
			}
		})
	}
	until(t, "all wait for the first", func() bool {
		n := int32(0)
		for i := range s.flights.groups {
			n += s.flights.groups[i].waiting.Load()
		}
		return n == readers-1
	})
	release()
	group.Wait()
	if n := disk.Counts(devicetest.Read) - was; n != 1 {
		t.Errorf("%d reads of the device", n)
	}
	if n := s.Stats().SharedReads; n != readers-1 {
		t.Errorf("%d shared reads", n)
	}
	mustClose(t, s)
}

// coldRig is a rig whose volume 1 was filled with known blocks, and nothing of it is cached.
func coldRig(t *testing.T, blocks int) *rig {
	t.Helper()
	r := newRig(t, 1, 64<<20)
	r.cfg.L1Bytes = 16 << 20
	s := r.start()
	mustCreate(t, s, 1, uint64(blocks))
	fill(newClient(t, s), 1, new(Seq), blocks, known)
	mustClose(t, s)
	return r
}

// TestReadAhead: a reader that goes on in order finds the next blocks in the cache; one
// that jumps about has nothing read for it.
func TestReadAhead(t *testing.T) {
	const blocks = 4096
	r := coldRig(t, blocks)
	s := r.start()
	v := s.Volume(1)
	buf := make([]byte, 8*dedup.BlockSize)
	cached := 0
	for at := 0; at < blocks; at += 8 {
		if v.TryRead(uint64(at)*dedup.BlockSize, buf) {
			cached++
		} else if err := v.Read(context.Background(), uint64(at)*dedup.BlockSize, buf); err != nil {
			t.Fatal(err)
		}
		for i := range 8 {
			if !bytes.Equal(buf[i*dedup.BlockSize:][:dedup.BlockSize], known(uint64(at+i))) {
				t.Fatalf("block %d: other content", at+i)
			}
		}
		until(t, "read ahead", func() bool { return len(s.ahead) == 0 })
	}
	st := s.Stats()
	if cached < blocks/8/2 || st.AheadBlocks < blocks/2 || st.L1.FirstHits < blocks/2 {
		t.Errorf("%d of %d reads were answered at once; %d blocks read ahead, %d of them used", cached, blocks/8, st.AheadBlocks, st.L1.FirstHits)
	}
	if st.BlockReads > blocks+blocks/10 {
		t.Errorf("%d blocks read for %d", st.BlockReads, blocks)
	}
	mustClose(t, s)

	s = r.start()
	v = s.Volume(1)
	rng := testRand(1)
	for range 300 {
		if err := v.Read(context.Background(), rng.Uint64N(blocks-1)*dedup.BlockSize, buf[:dedup.BlockSize]); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.Stats().AheadBlocks; n > 200 {
		t.Errorf("%d blocks were read ahead of reads at random", n)
	}
	mustClose(t, s)
}

// TestOverwrittenInCache: what replaces a block that was read enters the cache when it
// comes with its content, and is right; what nobody has read does not ask for that.
func TestOverwrittenInCache(t *testing.T) {
	r := newRig(t, 1, 16<<20)
	s := r.start()
	v := mustCreate(t, s, 1, 64)
	c := newClient(t, s)
	buf := make([]byte, dedup.BlockSize)
	content := [][]byte{pattern(1), noise(2), pattern(3)} // compressed and as it is
	c.must(c.write(1, 1, 0, bytes.Join(content, nil)))
	wanted := make([]bool, 4)
	if v.Wanted(0, wanted) {
		t.Fatalf("%v, nobody has read anything", wanted)
	}
	for i := range 2 {
		if err := v.Read(context.Background(), uint64(i)*dedup.BlockSize, buf); err != nil {
			t.Fatal(err)
		}
	}
	if !v.Wanted(0, wanted) || !slices.Equal(wanted, []bool{true, true, false, false}) {
		t.Fatalf("%v after reads of two blocks", wanted)
	}
	next := [][]byte{pattern(11), noise(12), pattern(13)}
	op := c.write(1, 2, 0, bytes.Join(next, nil))
	op.Plain = [][]byte{next[0], op.Blocks[1].Data, nil}
	c.must(op)
	for i := range 3 {
		if ok := v.TryRead(uint64(i)*dedup.BlockSize, buf); ok != (i < 2) || ok && !bytes.Equal(buf, next[i]) {
			t.Errorf("block %d in the cache: %t", i, ok)
		}
	}
	if n := s.Stats().WarmBlocks; n != 2 {
		t.Errorf("%d blocks entered the cache when written", n)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// lockedDisk is read and written at the same time.
type lockedDisk struct {
	mu sync.Mutex
	flatDisk
}

func (d *lockedDisk) ReadAt(p []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flatDisk.ReadAt(p, off)
}

func (d *lockedDisk) WriteAt(p []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flatDisk.WriteAt(p, off)
}

// TestReadAllocatesNothing: neither by the RAM cache, nor by flash, nor by the device.
func TestReadAllocatesNothing(t *testing.T) {
	flat := make(flatDisk, 64<<20)
	open := func(string) (device.Device, error) { return flat, nil }
	if err := Format(context.Background(), FormatConfig{Key: testKey, Devices: []string{"flat"}, OpenDevice: open}); err != nil {
		t.Fatal(err)
	}
	flash := &lockedDisk{flatDisk: make(flatDisk, 16<<20)}
	s, err := Open(context.Background(), Config{Devices: []string{"flat"}, OpenDevice: open, Key: testKey, L1Bytes: 1 << 20, MetadataBytes: 16 << 20, IndexBytes: 1 << 20,
		ReadAhead: -1, L2: "flash", L2Rate: 1 << 40, OpenL2: func(string) (device.Device, error) { return flash, nil }})
	if err != nil {
		t.Fatal(err)
	}
	v := mustCreate(t, s, 1, flashedBlocks)
	c := newClient(t, s)
	var seq Seq
	fill(c, 1, &seq, flashedBlocks, func(i uint64) []byte {
		if i%2 == 0 {
			return noise(i)
		}
		return known(i)
	})
	buf := make([]byte, 64*dedup.BlockSize)
	at := 0
	read := func() {
		at = (at + 64) % (flashedBlocks - 64)
		for _, n := range []int{64, 16, 1} {
			if err := v.Read(context.Background(), uint64(at)*dedup.BlockSize, buf[:n*dedup.BlockSize]); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 200 {
		read()
	}
	was := s.Stats()
	if a := testing.AllocsPerRun(200, read); a >= 1 && !raceEnabled { // the detector empties pools at random
		t.Errorf("%.2f allocations for three reads", a)
	}
	if st := s.Stats(); st.DeviceReads == was.DeviceReads || st.L2.Hits == was.L2.Hits {
		t.Errorf("all reads were answered from one place: %+v", st)
	}
	mustClose(t, s)
}
