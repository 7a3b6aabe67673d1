package memlu_test

import (
	"bytes"
	"errors"
	"testing"

	"go.uber.org/goleak"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func submit(lu *memlu.LU, r scsi.Request) (*scsi.Request, chan error) {
	done := make(chan error, 1)
	r.Done = func(r *scsi.Request) { done <- r.Err }
	lu.Submit(&r)
	return &r, done
}

func TestAsyncWaitsForKickAndCopiesBorrowedData(t *testing.T) {
	lu := memlu.New(8192)
	flushed := make(chan struct{}, 8)
	lu.StartAsync(func() { flushed <- struct{}{} })
	defer lu.Close()
	data := bytes.Repeat([]byte{7}, 512)
	_, done := submit(lu, scsi.Request{Op: scsi.OpWrite, Off: 512, Len: 512, Data: data, Borrowed: true})
	clear(data)
	if lu.Queued() != 1 || lu.TryRead(0, data) {
		t.Fatal("the request did not wait for Kick")
	}
	lu.Kick()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	<-flushed
	if !lu.TryRead(512, data) || data[0] != 7 || data[511] != 7 {
		t.Error("borrowed data was not copied")
	}
	lu.Hold()
	_, done = submit(lu, scsi.Request{Op: scsi.OpUnmap, Off: 0, Len: 4096})
	lu.Kick()
	if lu.Queued() != 1 || lu.Allocated() != 1 {
		t.Error("a held request was applied")
	}
	lu.Release()
	<-done
	if lu.Allocated() != 0 || lu.Count(scsi.OpUnmap) != 1 {
		t.Error("not unmapped")
	}
}

func TestFailuresAndContract(t *testing.T) {
	lu := memlu.New(8192)
	lu.SetFail(func(r *scsi.Request) error {
		if r.Op == scsi.OpWrite {
			return scsi.ErrNoSpace
		}
		return nil
	})
	data := make([]byte, 512)
	if _, done := submit(lu, scsi.Request{Op: scsi.OpWrite, Len: 512, Data: data}); !errors.Is(<-done, scsi.ErrNoSpace) {
		t.Error("no failure")
	}
	if lu.Allocated() != 0 {
		t.Error("a failed write was applied")
	}
	for name, r := range map[string]scsi.Request{
		"beyond the end":      {Op: scsi.OpRead, Off: 8192, Len: 512, Data: data},
		"unaligned":           {Op: scsi.OpRead, Off: 1, Len: 512, Data: data},
		"length":              {Op: scsi.OpWrite, Len: 1024, Data: data},
		"compare":             {Op: scsi.OpCompareAndWrite, Len: 512, Data: data},
		"write same":          {Op: scsi.OpWriteSame, Len: 512, Data: data[:100]},
		"borrowed write same": {Op: scsi.OpWriteSame, Len: 512, Data: data, Borrowed: true},
		"unknown":             {},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			submit(lu, r)
		}()
	}
}
