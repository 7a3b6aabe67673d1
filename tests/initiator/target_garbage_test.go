package initiator_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/twinsan/twinsan/server/iscsi"
	"github.com/twinsan/twinsan/tests/initiator"
)

// TestGarbage sends sessions full of random PDUs: the target stays up, other
// sessions go on, and nobody else's data change.
func TestGarbage(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	other := r.config()
	other.InitiatorName = hostName + "2"
	bystander := dial(t, other)
	want := fill(1<<20, 9)
	do(t, bystander, &initiator.Command{CDB: initiator.Write16(65536, 2048), Out: want})
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 4))
		cfg := r.config()
		conn, err := initiator.Dial(wait(t), cfg)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for range 1 + rng.IntN(30) {
			p := &initiator.PDU{}
			for i := range p.BHS {
				p.BHS[i] = byte(rng.Uint32())
			}
			ops := []byte{initiator.OpNopOut, initiator.OpCommand, initiator.OpTaskManagement, initiator.OpLogin, initiator.OpText, initiator.OpDataOut, initiator.OpSNACK}
			p.BHS[0] = ops[rng.IntN(len(ops))] | byte(rng.IntN(2))*initiator.Immediate
			if rng.IntN(2) == 0 {
				_, _, sn := conn.Window()
				p.Put32(24, sn+rng.Uint32N(4))
				p.Put64(8, 0)
			}
			if p.Opcode() == initiator.OpCommand {
				// Reads and tests only: what a host may overwrite is not the question.
				cdbs := [][]byte{initiator.Read16(rng.Uint64N(1<<17), rng.Uint32N(64)), initiator.TestUnitReady(), initiator.Inquiry(-1, 255), initiator.ReportLUNs(rng.Uint32())}
				copy(p.BHS[32:], cdbs[rng.IntN(len(cdbs))])
			}
			p.AHS = make([]byte, 4*rng.IntN(3)*rng.IntN(2))
			p.Data = fill(rng.IntN(3000)*rng.IntN(2), seed)
			if conn.Send(p) != nil {
				break
			}
		}
		// Whatever came back, the connection is not what is tested.
		conn.Abort()
		if seed%10 == 0 {
			mustWork(t, bystander)
		}
	}
	got := make([]byte, 1<<20)
	do(t, bystander, &initiator.Command{CDB: initiator.Read16(65536, 2048), In: got})
	if !bytes.Equal(got, want) {
		t.Error("garbage changed the disk")
	}
	mustWork(t, dial2(t, r))
}

// dial2 logs in where a reinstatement may have left another unit attention.
func dial2(t testing.TB, r *rig) *initiator.Conn {
	t.Helper()
	c, err := initiator.Dial(wait(t), r.config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	do(t, c, &initiator.Command{CDB: initiator.TestUnitReady()})
	return c
}

// TestGarbageLogin: random bytes, and random text, instead of a login.
func TestGarbageLogin(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{})
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 5))
		conn, err := initiator.Open(wait(t), r.config())
		if err != nil {
			t.Fatal(err)
		}
		p := conn.LoginRequest(byte(rng.IntN(4)), byte(rng.IntN(4)), rng.IntN(2) == 0, []initiator.Key{{Name: "InitiatorName", Value: hostName}, {Name: "TargetName", Value: targetName}})
		switch rng.IntN(4) {
		case 0:
			p.Data = fill(rng.IntN(2000), seed)
		case 1:
			for range 8 {
				p.BHS[rng.IntN(48)] = byte(rng.Uint32())
			}
			p.RawLengths = true
		case 2:
			p.Data = append(p.Data, bytes.Repeat([]byte("X-key=value\x00"), rng.IntN(500))...)
		case 3:
			binary.BigEndian.PutUint32(p.BHS[4:], rng.Uint32())
			p.RawLengths = true
		}
		done := make(chan struct{})
		go func() { // an answer may never come: the target waits for the rest
			defer close(done)
			conn.Exchange(p)
		}()
		if rng.IntN(2) == 0 {
			conn.Abort()
		}
		if rng.IntN(2) == 0 {
			mustLogIn(t, r)
		}
		conn.Close()
		<-done
	}
	mustLogIn(t, r)
}

func mustLogIn(t testing.TB, r *rig) {
	t.Helper()
	c, err := initiator.Dial(wait(t), r.config())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	do(t, c, &initiator.Command{CDB: initiator.TestUnitReady()})
}
