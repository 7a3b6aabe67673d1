package scsi_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// Every error of a volume, for every operation.
func TestVolumeErrors(t *testing.T) {
	r := newRig(t, mib, func(c *scsi.LUConfig) { c.VolatileCache = true })
	dropped := 0
	r.s.SetHooks(scsi.Hooks{DropSessions: func(name, reason string) {
		if name != initiator || reason == "" {
			t.Errorf("dropped %q for %q", name, reason)
		}
		dropped++
	}})
	data := make([]byte, 1024)
	one := cdb.AppendUnmap(nil, [2]uint64{0, 8})
	two := cdb.AppendUnmap(nil, [2]uint64{0, 8}, [2]uint64{8, 8})
	for _, e := range []struct {
		err    error
		status byte
		code   code
	}{
		{scsi.ErrBusy, cdb.Busy, code{}},
		{scsi.ErrNoSpace, cdb.CheckCondition, code{7, 0x27, 7}},
		{scsi.ErrMedium, cdb.CheckCondition, code{3, 0x11, 0}},
		{scsi.ErrReadOnly, cdb.CheckCondition, code{7, 0x27, 2}},
		{scsi.ErrDeleted, cdb.CheckCondition, badLUN},
		{errors.New("surprise"), cdb.CheckCondition, code{0xb, 0x44, 0}},
	} {
		r.lu.SetFail(func(*scsi.Request) error { return fmt.Errorf("write block 7: %w", e.err) })
		for _, c := range []struct {
			cdb []byte
			out []byte
		}{
			{rw10(cdb.Write10, 0, 0, 2), data}, {caw(0, 0, 1), data}, {rw10(cdb.WriteSame10, 0, 0, 2), data[:512]},
			{unmapCDB(len(one)), one}, {unmapCDB(len(two)), two}, {rw10(cdb.SynchronizeCache10, 0, 0, 0), nil},
			{rw10(cdb.WriteAndVerify10, 0, 0, 2), data}, {rw10(cdb.Verify10, 2, 0, 2), data},
		} {
			want := e.code
			if e.err == scsi.ErrMedium && c.cdb[0] != cdb.Verify10 {
				want = code{3, 0x0c, 0} // WRITE ERROR
			}
			if res := r.write(c.cdb, c.out); res.status != e.status || res.code() != want {
				t.Errorf("%v, CDB %x: status %02x sense %x", e.err, c.cdb, res.status, res.code())
			}
		}
		for _, expected := range []int{1024, 1000} {
			res := r.read(rw10(cdb.Read10, 0, 0, 2), expected)
			if res.status != e.status || res.code() != e.code || res.transfer != 0 {
				t.Errorf("%v, READ: status %02x sense %x transfer %d", e.err, res.status, res.code(), res.transfer)
			}
		}
	}
	// An unreachable owner is no SCSI error: the connection goes, once.
	r.lu.SetFail(func(*scsi.Request) error { return scsi.ErrUnavailable })
	for range 3 {
		k := r.on(r.n, 0).newTask(command{cdb: readBlock0, read: true, expected: 512})
		completed := false
		k.Complete = func(k *scsi.Task) { completed = k.Aborted.Load() && k.SenseLen == 0 }
		if r.s.Begin(k) != scsi.Ready {
			t.Fatal("not ready")
		}
		k.In = make([]byte, 512)
		if r.s.Execute(k); !completed {
			t.Error("not completed as aborted")
		}
	}
	if dropped != 1 {
		t.Errorf("dropped %d times", dropped)
	}
}
