//go:build e2e

package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/initiator"
	"github.com/twinsan/twinsan/tests/lab"
)

// attentions asks with TEST UNIT READY until want has come in a unit attention
// (ASC and ASCQ in one number), and returns all that came.
func (h *host) attentions(want uint16) (seen []uint16) {
	h.r.Helper()
	ctx, cancel := context.WithTimeout(h.r.ctx, time.Minute)
	defer cancel()
	for !slices.Contains(seen, want) {
		h.r.must(h.connect(ctx), "session of %s", h.name)
		res, err := h.conn.Do(ctx, &initiator.Command{LUN: initiator.LUN(uint16(h.lun)), CDB: make([]byte, 6)})
		if err != nil {
			h.r.Fatalf("%s waits for unit attention %04x, saw %04x: %v", h.name, want, seen, err)
		}
		if key, asc, ascq := res.SenseKey(); res.Status == statusCheck && key == 6 {
			seen = append(seen, uint16(asc)<<8|uint16(ascq))
			continue
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return seen
}

// TestThresholds: a host on each node is told that room gets short, once, and that
// a volume has grown.
func TestThresholds(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "1G", Volumes: []string{"demo:64M", "ballast:4G"}})
	v, ballast := r.volume("demo"), r.volume("ballast")
	hosts := []*host{r.host("one", v.LUN, "a"), r.host("two", v.LUN, "b")}
	for _, h := range hosts {
		h.good("READ CAPACITY", initiator.ReadCapacity16(32), nil, 32)
	}
	_, err := lab.RunLoad(r.ctx, r.iscsiload, "--rw", "write", "--once", "--bs", "256k", "--iodepth", "4", r.c.URL(ballast.Owner, ballast.LUN))
	if err == nil {
		t.Fatal("4 GiB of incompressible data went into a pool of 1 GiB")
	}
	const space, capacity = 0x3807, 0x2a09
	for _, h := range hosts {
		t.Logf("%s: unit attentions %04x", h.name, h.attentions(space))
	}
	_, err = r.c.CLI(r.ctx, "volume", "resize", "demo", "128M")
	r.must(err, "resize")
	for _, h := range hosts {
		if seen := h.attentions(capacity); slices.Contains(seen, space) {
			t.Errorf("%s is told about the same threshold again: %04x", h.name, seen)
		}
		b := h.good("READ CAPACITY", initiator.ReadCapacity16(32), nil, 32)
		if last := int64(binary.BigEndian.Uint64(b)); last != 128*mib/512-1 {
			t.Errorf("%s: last block %d after the resize", h.name, last)
		}
	}
}

// transportID is the TransportID of an iSCSI initiator port (SPC-4 7.6.4.6, format 01b).
func transportID(name string, isid [6]byte) []byte {
	s := fmt.Sprintf("%s,i,0x%012x", name, isid)
	b := append([]byte{0x45, 0, 0, 0}, s...)
	for b = append(b, 0); len(b)%4 != 0 || len(b) < 24; {
		b = append(b, 0)
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)-4))
	return b
}

// TestSpecIPT registers another host (REGISTER with SPEC_I_PT and ALL_TG_PT) before
// that one was ever seen: it may write through the other node, and still may after
// everything was killed; REGISTER AND MOVE hands it the reservation.
func TestSpecIPT(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:64M"}})
	lun := r.volume("demo").LUN
	one, two := r.host("one", lun, "a"), r.host("two", lun, "b")
	isid := two.isid
	isid[5] = 1 // of its first path
	id := transportID(two.name, isid)
	cdb, list := prOut(prRegister, 0, 0, keyOne)
	list[20] = 1 | 1<<2 | 1<<3 // APTPL, ALL_TG_PT, SPEC_I_PT
	list = binary.BigEndian.AppendUint32(list, uint32(len(id)))
	list = append(list, id...)
	binary.BigEndian.PutUint32(cdb[5:], uint32(len(list)))
	one.good("REGISTER with SPEC_I_PT", cdb, list, 0)
	cdb, list = prOut(prReserve, prWriteExclusiveRegistrants, keyOne, 0)
	one.good("RESERVE", cdb, list, 0)
	outsider := r.host("outsider", lun, "b")
	check := func(when string) {
		two.good(when+": WRITE of the registered host", initiator.Write16(8, 1), make([]byte, 512), 0)
		if res, _ := outsider.result("WRITE", initiator.Write16(0, 1), make([]byte, 512), 0); res.Status != statusConflict {
			r.Fatalf("%s: a write of an unregistered host ended with %s", when, res)
		}
	}
	check("at first")
	for _, h := range []*host{one, two, outsider} {
		h.close()
	}
	r.demo("kill", "a")
	r.demo("kill", "b")
	r.demo("start", "a")
	r.demo("start", "b")
	r.must(r.c.WaitHealthy(r.ctx, time.Minute), "recovery")
	check("after all nodes were killed")

	// REGISTER AND MOVE to the second host's port on node b.
	port := uint16(0)
	b := two.good("INQUIRY", initiator.Inquiry(0x83, 4096), nil, 4096)
	for b = b[4:]; len(b) >= 4; b = b[4+int(b[3]):] {
		if b[1]&0x3f == 0x14 { // relative target port of the path in use
			port = binary.BigEndian.Uint16(b[6:])
		}
	}
	if port == 0 {
		r.Fatal("no relative target port identifier")
	}
	list = make([]byte, 24)
	binary.BigEndian.PutUint64(list, keyOne)
	binary.BigEndian.PutUint64(list[8:], keyTwo)
	binary.BigEndian.PutUint16(list[18:], port)
	binary.BigEndian.PutUint32(list[20:], uint32(len(id)))
	cdb = []byte{0x5f, 0x07, 0, 0, 0, 0, 0, 0, byte(24 + len(id)), 0}
	res, _, err := one.do(r.ctx, cdb, append(list, id...), 0)
	if err != nil && !errors.Is(err, errOutcome) || err == nil && !res.OK() {
		r.Fatalf("REGISTER AND MOVE: %v %v", res, err)
	}
	if key, kind := two.reservation(); key != keyTwo || kind != prWriteExclusiveRegistrants {
		r.Fatalf("reservation %x of type %d after REGISTER AND MOVE", key, kind)
	}
	if keys := two.keys(); !slices.Contains(keys, keyTwo) {
		r.Fatalf("keys %x after REGISTER AND MOVE", keys)
	}
}
