package initiator_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/iscsi"
	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/memlu"
	"github.com/twinsan/twinsan/tests/initiator"
)

const (
	targetName = "iqn.2026-01.example:san"
	hostName   = "iqn.2026-01.example:host"
	size       = 64 << 20
)

// rig is the real target over a volume in memory.
type rig struct {
	lu        *memlu.LU
	target    *iscsi.Target
	addr      string
	access    map[string]iscsi.Access
	discovery map[string]iscsi.Access // nil: as access
	portals   []iscsi.Portal          // nil: one of each of two nodes
	ping      *initiator.Conn         // see pinger
}

func (r *rig) Access(name string) (iscsi.Access, bool) {
	a, ok := r.access[name]
	return a, ok
}
func (r *rig) Discovery(name string) (iscsi.Access, bool) {
	if r.discovery == nil {
		return r.Access(name)
	}
	a, ok := r.discovery[name]
	return a, ok
}
func (r *rig) Portals(string) []iscsi.Portal {
	if r.portals != nil {
		return r.portals
	}
	return []iscsi.Portal{{Addr: "192.0.2.1:3260", Group: 1}, {Addr: "[2001:db8::1]:3260", Group: 2}}
}
func (r *rig) Redirect(string) (string, bool) { return "", false }

// newRig starts a target. async completes commands on another goroutine.
func newRig(t testing.TB, async bool, limits iscsi.Limits) *rig {
	t.Helper()
	if *targetURL != "" {
		t.Skip("looks into the target: runs in one process only")
	}
	r := &rig{lu: memlu.New(size), access: map[string]iscsi.Access{hostName: {}, hostName + "2": {}}}
	device := scsi.New(scsi.Config{Backend: r.lu, NodePort: 1, PortGroup: 1, TargetName: targetName, Logger: slog.New(slog.DiscardHandler)})
	target, err := iscsi.New(iscsi.Config{
		TargetName: targetName, PortGroup: 1, Listen: []string{"127.0.0.1:0", "127.0.0.1:0"},
		Device: device, Directory: r, Limits: limits, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	device.SetHooks(scsi.Hooks{Flush: target.Flush, AbortWaiting: target.AbortWaiting, DropSessions: target.DropSessions})
	device.SetAccess(0, scsi.Visibility{Any: true})
	if err := device.SetLU(scsi.LUConfig{LUN: 0, VolumeUUID: [16]byte{1}, Name: "v", Serial: "serial0001",
		NAA: []byte{0x3f, 1, 2, 3, 4, 5, 6, 7}, Thin: true, Volume: r.lu}); err != nil {
		t.Fatal(err)
	}
	if async {
		r.lu.StartAsync(target.Flush)
	}
	if err := target.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.target = target
	r.addr = target.Addrs()[0].String()
	t.Cleanup(func() {
		target.Close()
		device.Close()
		r.lu.Close()
	})
	return r
}

func (r *rig) config() initiator.Config {
	return initiator.Config{Addr: r.addr, InitiatorName: hostName, TargetName: targetName, ISID: [6]byte{0x80, 0, 0, 0, 0, 1}, CmdSN: 1}
}

// wait bounds a test that hangs; it decides nothing.
func wait(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// dial logs in and takes the unit attention that a new nexus gets.
func dial(t testing.TB, cfg initiator.Config) *initiator.Conn {
	t.Helper()
	c, err := initiator.Dial(wait(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if r := do(t, c, &initiator.Command{CDB: initiator.TestUnitReady()}); sense(r) != "06/29/00" {
		t.Fatalf("first command of a nexus: %v", r)
	}
	return c
}

func do(t testing.TB, c *initiator.Conn, cmd *initiator.Command) *initiator.Result {
	t.Helper()
	r, err := c.Do(wait(t), cmd)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func sense(r *initiator.Result) string {
	key, asc, ascq := r.SenseKey()
	return fmt.Sprintf("%02x/%02x/%02x", key, asc, ascq)
}

func fill(n int, seed uint64) []byte {
	b := make([]byte, n)
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	rand.NewChaCha8(key).Read(b)
	return b
}

// mustWork writes and reads back on a connection, as proof that it is well.
func mustWork(t testing.TB, c *initiator.Conn) {
	t.Helper()
	want, got := fill(4096, 77), make([]byte, 4096)
	for _, cmd := range []*initiator.Command{{CDB: initiator.Write16(100000, 8), Out: want}, {CDB: initiator.Read16(100000, 8), In: got}} {
		if r := do(t, c, cmd); !r.OK() {
			t.Fatalf("%v", r)
		}
	}
	if !bytes.Equal(got, want) {
		t.Fatal("read differs from what was written")
	}
}
