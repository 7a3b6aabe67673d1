package iscsi

import (
	"syscall"
	"unsafe"

	"github.com/twinsan/twinsan/server/scsi"
)

type scsiTask = scsi.Task

// quietDevice is a memoryDevice without bookkeeping: READ and WRITE only, on the
// caller's goroutine, without allocation.
type quietDevice struct{ *memoryDevice }

func (d *quietDevice) Begin(t *scsi.Task) scsi.Verdict {
	t.Aborted.Store(false)
	t.Status, t.SenseLen = statusGood, 0
	_, n := span(t)
	t.Transfer = n * testBlock
	t.InLen, t.OutLen = 0, 0
	if t.CDB[0] == 0x2a {
		t.OutLen = min(t.Transfer, t.Expected)
		return scsi.WantData
	}
	t.InLen = min(t.Transfer, t.Expected)
	return scsi.Ready
}

func (d *quietDevice) TryExecute(t *scsi.Task) bool {
	if !d.cached {
		return false
	}
	lba, _ := span(t)
	copy(t.In, d.data[lba*testBlock:])
	return true
}

func (d *quietDevice) Execute(t *scsi.Task) {
	lba, _ := span(t)
	if t.CDB[0] == 0x2a {
		copy(d.data[lba*testBlock:], t.Out)
	} else {
		copy(t.In, d.data[lba*testBlock:])
	}
	t.Complete(t)
}

func (d *quietDevice) Forget(*scsi.Task) {}

func vectorBytes(v syscall.Iovec) []byte { return unsafe.Slice(v.Base, int(v.Len)) }
