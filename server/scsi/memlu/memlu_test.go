package memlu_test

import (
	"bytes"
	"errors"
	"fmt"
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

// Two paths share blocks and state; what is held on one is not seen by the other.
func TestPaths(t *testing.T) {
	lu := memlu.New(8192)
	a, b := lu.Path(), lu.Path()
	var heard [3][]string
	watch := func(i int) func(scsi.StateID, []byte, bool) {
		return func(_ scsi.StateID, v []byte, live bool) {
			heard[i] = append(heard[i], fmt.Sprintf("%s %v", v, live))
		}
	}
	lu.Watch(watch(0))
	a.Watch(watch(1))
	lu.SetState([]byte("one"))
	b.Watch(watch(2))
	send := func(p *memlu.Path, r scsi.Request) chan error {
		done := make(chan error, 1)
		r.Done = func(r *scsi.Request) { done <- r.Err }
		p.Submit(&r)
		p.Kick()
		return done
	}
	b.Hold(scsi.OpWrite)
	data := bytes.Repeat([]byte{7}, 512)
	late := send(b, scsi.Request{Op: scsi.OpWrite, Len: 512, Data: data, Borrowed: true})
	clear(data)
	if err := <-send(b, scsi.Request{Op: scsi.OpState, State: scsi.StateID{Epoch: 1, Seq: 1}, Data: []byte("two")}); err != nil {
		t.Fatal(err)
	}
	if err := <-send(a, scsi.Request{Op: scsi.OpState, State: scsi.StateID{Epoch: 1, Seq: 1}, Data: []byte("three")}); !errors.Is(err, scsi.ErrStateMoved) {
		t.Fatal(err)
	}
	if lu.Allocated() != 0 || b.Held() != 1 || a.TryRead(0, data) || a.ID() != lu.ID() || b.SizeBytes() != 8192 {
		t.Error("the path's write was applied")
	}
	b.Release()
	if err := <-late; err != nil || b.Held() != 0 {
		t.Fatal(err)
	}
	if !lu.TryRead(0, data) || data[0] != 7 {
		t.Error("borrowed data was not copied")
	}
	a.Watch(nil)
	lu.SetState([]byte("four"))
	want := [3]string{"[ false one true two true four true]", "[ false one true two true]", "[one false two true four true]"}
	for i := range heard {
		if got := fmt.Sprint(heard[i]); got != want[i] {
			t.Errorf("watcher %d: %s, want %s", i, got, want[i])
		}
	}
}
