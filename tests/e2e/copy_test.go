//go:build e2e

package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/initiator"
	"github.com/twinsan/twinsan/tests/lab"
)

// naa reads the designator by which copy commands name a unit.
func (h *host) naa() []byte {
	h.r.Helper()
	b := h.good("INQUIRY", initiator.Inquiry(0x83, 4096), nil, 4096)
	for b = b[4:]; len(b) >= 4; b = b[4+int(b[3]):] {
		if b[1]&0x3f == 3 {
			return b[4 : 4+int(b[3])]
		}
	}
	h.r.Fatal("no NAA designator")
	return nil
}

// segment is a part of an EXTENDED COPY, in blocks of 512 bytes.
type segment struct {
	from, to uint64
	blocks   uint16
}

// extendedCopy is EXTENDED COPY(LID1) between two units, without a list identifier.
func extendedCopy(from, to []byte, segments []segment) (cdb, list []byte) {
	list = make([]byte, 16)
	list[1] = 0x18 // LIST ID USAGE 11b
	binary.BigEndian.PutUint16(list[2:], 64)
	binary.BigEndian.PutUint32(list[8:], uint32(28*len(segments)))
	for _, naa := range [][]byte{from, to} {
		d := make([]byte, 32)
		d[0], d[4], d[5], d[7] = 0xe4, 1, 3, byte(len(naa))
		copy(d[8:], naa)
		d[30] = 2 // 512 bytes
		list = append(list, d...)
	}
	for _, s := range segments {
		d := make([]byte, 28)
		d[0], d[3], d[7] = 2, 0x18, 1
		binary.BigEndian.PutUint16(d[10:], s.blocks)
		binary.BigEndian.PutUint64(d[12:], s.from)
		binary.BigEndian.PutUint64(d[20:], s.to)
		list = append(list, d...)
	}
	cdb = make([]byte, 16)
	cdb[0] = 0x83
	binary.BigEndian.PutUint32(cdb[10:], uint32(len(list)))
	return cdb, list
}

// used is what the pools hold, garbage included, in bytes.
func (r *rig) used() (n int64) {
	r.Helper()
	s, err := r.c.Status(r.ctx)
	r.must(err, "status")
	for _, node := range s.Nodes {
		if node.Pool != nil {
			n += node.Pool.Live + node.Pool.Garbage
		}
	}
	return n
}

// filled makes a volume with verified contents and returns it with the load that knows them.
func (r *rig) filled(name string, size int64) (*lab.Volume, *verified) {
	r.Helper()
	v, err := r.c.CreateVolume(r.ctx, name, fmt.Sprintf("%dM", size>>20))
	r.must(err, "create %s", name)
	f, err := os.CreateTemp(r.dir, "table-")
	r.must(err, "table")
	r.must(f.Close(), "table")
	load := &verified{r: r, table: f.Name()}
	load.args = []string{"--offset", "0", "--size", fmt.Sprint(size), "--seed", fmt.Sprint(r.rand.Uint64() >> 1), "--bs", "256k", "--verify-file", load.table}
	res := r.load(append(append([]string{"--rw", "write", "--once", "--verify", "--ramp", "0", "--iodepth", "8", "--compress", "30"}, load.args...), r.both(v.LUN)...)...)
	if res.Errors.SCSI+res.Errors.Short != 0 || load.acked() < size/4096 {
		r.Fatalf("fill %s: %d blocks, %+v", name, load.acked(), res.Errors)
	}
	return v, load
}

// moveTo makes a node the owner of a volume.
func (r *rig) moveTo(volume, node string) {
	r.Helper()
	if r.volume(volume).Owner != node {
		_, err := r.c.CLI(r.ctx, "volume", "move", volume, "--to", node)
		r.must(err, "move %s to %s", volume, node)
	}
}

// TestCopy clones a whole unit by EXTENDED COPY: by reference, so that next to
// nothing is written, and through a kill in the middle.
func TestCopy(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "16G", Volumes: []string{"demo:64M"}})
	size := *copyMiB * mib
	source, load := r.filled("source", size)
	target, err := r.c.CreateVolume(r.ctx, "target", fmt.Sprintf("%dM", *copyMiB))
	r.must(err, "create target")
	r.moveTo("target", r.volume("source").Owner)
	h := r.host("cloner", target.LUN, "a", "b")
	src := r.host("cloner", source.LUN, "a", "b")
	from, to := src.naa(), h.naa()
	src.close()
	before := r.used()
	const blocks = 32768 // 16 MiB
	start := time.Now()
	commands := 0
	clone := func(at, n uint64) {
		var list []segment
		for lba := at; lba < at+n; lba += blocks {
			list = append(list, segment{lba, lba, blocks})
		}
		cdb, out := extendedCopy(from, to, list)
		h.good("EXTENDED COPY", cdb, out, 0)
		commands++
	}
	step := min(uint64(size)/512/4, 32*blocks)
	for lba := uint64(0); lba < uint64(size)/512; lba += step {
		clone(lba, step)
	}
	took := time.Since(start)
	grown := r.used() - before
	r.Logf("cloned %d MiB in %.2f s with %d commands; the pools grew by %d KiB in all", *copyMiB, took.Seconds(), commands, grown>>10)
	if limit := 2*size/1000 + 16*mib; grown > limit {
		r.Errorf("the pools grew by %d KiB, allowed are %d", grown>>10, limit>>10)
	}
	load.check(r.c.URL("b", target.LUN))
	load.check(r.c.URL("a", source.LUN))

	// The same again while the owner is killed: a command whose outcome is not known
	// is repeated, as hosts do.
	owner := r.volume("target").Owner
	killed := make(chan error, 1)
	go func() {
		_, err := r.c.Demo(r.ctx, "kill", owner)
		killed <- err
	}()
	for lba := uint64(0); lba < uint64(size)/512; lba += step {
		clone(lba, step)
	}
	r.must(<-killed, "kill")
	r.demo("start", owner)
	r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "recovery")
	r.must(r.c.CheckEqual(r.ctx, "target"), "volume check")
	load.check(r.c.URL("a", target.LUN))
	load.check(r.c.URL("b", target.LUN))

	// Two owners: by reference too, for each node finds the source in its own copy.
	r.moveTo("target", r.volume("source").Other())
	zeros := make([]byte, 512)
	for lba := uint64(0); lba < uint64(size)/512; lba += blocks {
		h.good("WRITE SAME", initiator.WriteSame16(lba, blocks, true), zeros, 0)
	}
	before = r.used()
	start = time.Now()
	for lba := uint64(0); lba < uint64(size)/512; lba += step {
		clone(lba, step)
	}
	took, grown = time.Since(start), r.used()-before
	r.Logf("cloned %d MiB between two owners in %.2f s; the pools grew by %d KiB in all", *copyMiB, took.Seconds(), grown>>10)
	if limit := 2*size/1000 + 16*mib; grown > limit {
		r.Errorf("the pools grew by %d KiB, allowed are %d", grown>>10, limit>>10)
	}
	load.check(r.c.URL("b", target.LUN))
	r.must(r.c.CheckEqual(r.ctx, "target"), "volume check")
}

// TestCopyLarge clones many mapped gigabytes, stored once each WRITE SAME: what a
// clone costs depends on its commands, and what it writes is a thousandth at most.
func TestCopyLarge(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "8G", Volumes: []string{"demo:64M"}})
	size := uint64(*copyMiB*mib) * 16
	const blocks = 32768 // 16 MiB
	units := map[string]*host{}
	for _, name := range []string{"large", "clone"} {
		v, err := r.c.CreateVolume(r.ctx, name, fmt.Sprintf("%dM", size>>20))
		r.must(err, "create %s", name)
		units[name] = r.host("cloner", v.LUN, v.Owner)
	}
	contents := func(lba uint64) []byte {
		b := bytes.Repeat([]byte{0x5a}, 512)
		binary.BigEndian.PutUint64(b, lba/blocks)
		return b
	}
	start := time.Now()
	for lba := uint64(0); lba < size/512; lba += blocks {
		units["large"].good("WRITE SAME", initiator.WriteSame16(lba, blocks, false), contents(lba), 0)
	}
	r.Logf("mapped %d MiB in %.1f s", size>>20, time.Since(start).Seconds())
	r.moveTo("clone", r.volume("large").Owner)
	from, to := units["large"].naa(), units["clone"].naa()
	before := r.used()
	start = time.Now()
	commands := 0
	for lba := uint64(0); lba < size/512; {
		var list []segment
		for ; len(list) < 32 && lba < size/512; lba += blocks {
			list = append(list, segment{lba, lba, blocks})
		}
		cdb, out := extendedCopy(from, to, list)
		units["clone"].good("EXTENDED COPY", cdb, out, 0)
		commands++
	}
	took, grown := time.Since(start), r.used()-before
	r.Logf("cloned %d MiB in %.2f s with %d commands; the pools grew by %d KiB in all", size>>20, took.Seconds(), commands, grown>>10)
	if limit := 2*int64(size)/1000 + 16*mib; grown > limit {
		r.Errorf("the pools grew by %d KiB, allowed are %d", grown>>10, limit>>10)
	}
	for range 200 {
		lba := r.rand.Uint64N(size/512/8) * 8
		if got := units["clone"].good("READ", initiator.Read16(lba, 8), nil, 4096); !bytes.Equal(got, bytes.Repeat(contents(lba), 8)) {
			r.Fatalf("the clone's block at %d is %x ...", lba, got[:16])
		}
	}
	r.must(r.c.CheckEqual(r.ctx, "clone"), "volume check")
}

// token is POPULATE TOKEN of one range and what RECEIVE ROD TOKEN INFORMATION brings.
func (h *host) token(lba uint64, blocks uint32) []byte {
	h.r.Helper()
	list := make([]byte, 32)
	binary.BigEndian.PutUint16(list, 30)
	binary.BigEndian.PutUint32(list[4:], 300) // INACTIVITY TIMEOUT
	binary.BigEndian.PutUint16(list[14:], 16)
	binary.BigEndian.PutUint64(list[16:], lba)
	binary.BigEndian.PutUint32(list[24:], blocks)
	cdb := make([]byte, 16)
	cdb[0], cdb[1], cdb[9], cdb[13] = 0x83, 0x10, 7, byte(len(list))
	h.good("POPULATE TOKEN", cdb, list, 0)
	b := h.tokenInformation()
	if n := binary.BigEndian.Uint32(b[len(b)-518:]); n != 514 && len(b) < 550 {
		h.r.Fatalf("no token in %d bytes", len(b))
	}
	return b[len(b)-512:]
}

func (h *host) tokenInformation() []byte {
	h.r.Helper()
	cdb := make([]byte, 16)
	cdb[0], cdb[1], cdb[5] = 0x84, 0x07, 7
	binary.BigEndian.PutUint32(cdb[10:], 4096)
	b := h.good("RECEIVE ROD TOKEN INFORMATION", cdb, nil, 4096)
	if status := b[5] & 0x7f; status != 1 && status != 3 {
		h.r.Fatalf("status of the copy operation: %#x", status)
	}
	return b
}

// useToken is WRITE USING TOKEN; it returns how many blocks were written.
func (h *host) useToken(token []byte, offset, lba uint64, blocks uint32) uint64 {
	h.r.Helper()
	list := make([]byte, 536+16)
	binary.BigEndian.PutUint16(list, uint16(len(list)-2))
	binary.BigEndian.PutUint64(list[8:], offset)
	copy(list[16:], token)
	binary.BigEndian.PutUint16(list[534:], 16)
	binary.BigEndian.PutUint64(list[536:], lba)
	binary.BigEndian.PutUint32(list[544:], blocks)
	cdb := make([]byte, 16)
	cdb[0], cdb[1], cdb[9] = 0x83, 0x11, 7
	binary.BigEndian.PutUint32(cdb[10:], uint32(len(list)))
	h.good("WRITE USING TOKEN", cdb, list, 0)
	return binary.BigEndian.Uint64(h.tokenInformation()[16:])
}

// TestToken takes a token through one node, changes what it was taken from,
// kills the owner, and writes by the token as another host through the other node.
func TestToken(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "8G", Volumes: []string{"demo:64M"}})
	size := 64 * mib
	source, load := r.filled("source", size)
	target, err := r.c.CreateVolume(r.ctx, "target", "64M")
	r.must(err, "create target")
	one := r.host("one", source.LUN, "a", "b")
	token := one.token(0, uint32(size/512))
	one.good("WRITE SAME", initiator.WriteSame16(0, 32768, false), bytes.Repeat([]byte{7}, 512), 0)
	v := r.volume("source")
	owner, other := v.Owner, v.Other()
	r.demo("kill", owner)
	two := r.host("two", target.LUN, other)
	for done := uint64(0); done < uint64(size/512); {
		n := two.useToken(token, done, done, uint32(uint64(size/512)-done))
		if n == 0 {
			r.Fatal("WRITE USING TOKEN made no progress")
		}
		done += n
	}
	load.check(r.c.URL(other, target.LUN))
	r.demo("start", owner)
	r.must(r.c.WaitHealthy(r.ctx, time.Minute), "recovery")
	r.must(r.c.CheckEqual(r.ctx, "source"), "volume check")
	r.must(r.c.CheckEqual(r.ctx, "target"), "volume check")
	load.check(r.c.URL(owner, target.LUN))
	// The source has what was written over it.
	if b := one.good("READ", initiator.Read16(100, 1), nil, 512); !bytes.Equal(b, bytes.Repeat([]byte{7}, 512)) {
		r.Fatalf("the source reads %x...", b[:16])
	}
}
