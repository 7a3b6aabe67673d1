package initiator

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"reflect"
	"testing"
)

func fill(n int, seed uint64) []byte {
	b := make([]byte, n)
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	rand.NewChaCha8(key).Read(b)
	return b
}

// TestReadWrite goes through every way in which data can travel, with CmdSN
// running over its end on the way.
func TestReadWrite(t *testing.T) {
	for _, c := range []struct {
		name string
		keys []Key
		r2ts int // of a write of 10240 bytes in bursts of 4096, 2048 unsolicited
	}{
		{"all unsolicited", nil, 2},
		{"digests", []Key{{"HeaderDigest", "CRC32C"}, {"DataDigest", "CRC32C,None"}}, 2},
		{"header digest alone", []Key{{"HeaderDigest", "CRC32C"}}, 2},
		{"no immediate data", []Key{{"ImmediateData", "No"}}, 2},
		{"initial R2T", []Key{{"InitialR2T", "Yes"}}, 3},
		{"nothing unsolicited", []Key{{"InitialR2T", "Yes"}, {"ImmediateData", "No"}}, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPeer(t, nil)
			cfg := p.config()
			cfg.Keys = WithKeys(c.keys...)
			conn := dial(t, cfg)
			ctx := timeout(t)
			for i := range uint64(5) {
				want, got := fill(10240, i), make([]byte, 10240)
				r, err := conn.Do(ctx, &Command{CDB: Write16(i*3, 20), Out: want})
				if err != nil || !r.OK() || r.R2Ts != c.r2ts {
					t.Fatalf("write: %v, %v", r, err)
				}
				if r, err = conn.Do(ctx, &Command{CDB: Read16(i*3, 20), In: got}); err != nil || !r.OK() || r.Received != len(got) {
					t.Fatalf("read: %v, %v", r, err)
				}
				if !bytes.Equal(got, want) {
					t.Fatal("read differs from what was written")
				}
			}
			if data, err := conn.Ping(ctx, []byte("abc"), false); err != nil || string(data) != "abc" {
				t.Errorf("ping: %q, %v", data, err)
			}
			if n, err := conn.Logout(ctx, 0); n != 0 || err != nil {
				t.Errorf("logout: %d, %v", n, err)
			}
			if err := conn.Done(ctx); err != io.EOF {
				t.Errorf("after the logout: %v", err)
			}
		})
	}
}

func TestManyAtOnce(t *testing.T) {
	p := newPeer(t, nil)
	conn := dial(t, p.config())
	ctx := timeout(t)
	var tasks []*Task
	var bufs [][]byte
	for i := range uint64(50) { // more than the window
		task, err := conn.Start(ctx, &Command{CDB: Write16(i*4, 4), Out: fill(2048, i)})
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 2048)
		read, err := conn.Start(ctx, &Command{CDB: Read16(i*4, 4), In: buf})
		if err != nil {
			t.Fatal(err)
		}
		tasks, bufs = append(tasks, task, read), append(bufs, buf)
	}
	for _, task := range tasks {
		if r, err := task.Wait(ctx); err != nil || !r.OK() {
			t.Fatalf("%v, %v", r, err)
		}
	}
	for i, buf := range bufs {
		if !bytes.Equal(buf, fill(2048, uint64(i))) {
			t.Errorf("read %d differs from the write before it", i)
		}
	}
}

func TestCheckConditionAndResidual(t *testing.T) {
	p := newPeer(t, nil)
	conn := dial(t, p.config())
	r, err := conn.Do(timeout(t), &Command{CDB: Inquiry(-1, 96), In: make([]byte, 96)})
	if err != nil {
		t.Fatal(err)
	}
	key, asc, ascq := r.SenseKey()
	if r.Status != 2 || key != 5 || asc != 0x20 || ascq != 0 || !r.Underflow || r.Residual != 96 {
		t.Errorf("%v", r)
	}
}

func TestCHAP(t *testing.T) {
	secret := CHAP{Name: "user", Secret: "secret of the user", MutualSecret: "secret of the target"}
	for _, c := range []struct {
		name   string
		change func(*CHAP)
		want   error
	}{
		{"one way", func(c *CHAP) { c.MutualSecret = "" }, nil},
		{"mutual", func(*CHAP) {}, nil},
		{"mutual by name", func(c *CHAP) { c.MutualName = "target" }, nil},
		{"MD5", func(c *CHAP) { c.Algorithms = []int{CHAPMD5} }, nil},
		{"base64", func(c *CHAP) { c.Base64 = true }, nil},
		{"wrong secret", func(c *CHAP) { c.Secret = "another secret" }, &LoginError{Class: 2, Detail: 1}},
		{"wrong name", func(c *CHAP) { c.Name = "another" }, &LoginError{Class: 2, Detail: 1}},
		{"reflected challenge", func(c *CHAP) { c.Reflect = true }, &LoginError{Class: 2, Detail: 1}},
		{"response replaced", func(c *CHAP) { c.Response = []byte{1} }, &LoginError{Class: 2, Detail: 1}},
		{"wrong target", func(c *CHAP) { c.MutualSecret = "not its secret" }, ErrTargetNotAuthentic},
		{"wrong target name", func(c *CHAP) { c.MutualName = "other" }, ErrTargetNotAuthentic},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPeer(t, func(p *peer) { p.chap = &secret })
			cfg := p.config()
			chap := secret
			c.change(&chap)
			cfg.CHAP = &chap
			conn, err := Dial(timeout(t), cfg)
			if conn != nil {
				conn.Close()
			}
			var refused *LoginError
			if want, ok := c.want.(*LoginError); ok {
				if !errors.As(err, &refused) || refused.Class != want.Class || refused.Detail != want.Detail {
					t.Errorf("%v, want %v", err, want)
				}
			} else if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	p := newPeer(t, func(p *peer) { p.chap = &secret })
	var refused *LoginError
	if _, err := Dial(timeout(t), p.config()); !errors.As(err, &refused) || refused.Detail != 1 {
		t.Errorf("login without CHAP: %v", err)
	}
}

func TestLoginShapes(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"skip security": func(c *Config) { c.SkipSecurity = true },
		"text in parts": func(c *Config) { c.LoginSegment = 50 },
		"discovery":     func(c *Config) { c.TargetName = "" },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPeer(t, nil)
			cfg := p.config()
			change(&cfg)
			conn := dial(t, cfg)
			if conn.Params().TSIH != 77 {
				t.Errorf("%+v", conn.Params())
			}
			targets, err := conn.SendTargets(timeout(t), "All")
			if want := map[string][]string{iqn: {"127.0.0.1:1,1", "[::1]:1,2"}}; err != nil || !reflect.DeepEqual(targets, want) {
				t.Errorf("%v, %v", targets, err)
			}
		})
	}
}

func TestTaskManagement(t *testing.T) {
	p := newPeer(t, nil)
	conn := dial(t, p.config())
	ctx := timeout(t)
	start := func(lun uint16) *Task {
		task, err := conn.Start(ctx, &Command{LUN: LUN(lun), CDB: []byte{0xff}})
		if err != nil {
			t.Fatal(err)
		}
		return task
	}
	a, b, c := start(0), start(0), start(1)
	if n, err := conn.TaskManagement(ctx, AbortTask, LUN(0), a); n != 0 || err != nil {
		t.Fatalf("abort: %d, %v", n, err)
	}
	if _, err := a.Wait(ctx); err != ErrAborted {
		t.Errorf("aborted task: %v", err)
	}
	if n, err := conn.TaskManagement(ctx, AbortTask, LUN(0), a); n != 1 || err != nil {
		t.Errorf("second abort: %d, %v", n, err)
	}
	select {
	case <-b.Done():
		t.Error("a task ended with another")
	default:
	}
	if n, err := conn.TaskManagement(ctx, LogicalUnitReset, LUN(0), nil); n != 0 || err != nil {
		t.Fatalf("reset: %d, %v", n, err)
	}
	if _, err := b.Wait(ctx); err != ErrAborted {
		t.Errorf("task after a reset: %v", err)
	}
	select {
	case <-c.Done():
		t.Error("a reset ended a task of another LU")
	default:
	}
	conn.Close()
	if _, err := c.Wait(ctx); err != ErrClosed {
		t.Errorf("task after Close: %v", err)
	}
	if _, err := conn.Do(ctx, &Command{CDB: TestUnitReady()}); err != ErrClosed {
		t.Errorf("command after Close: %v", err)
	}
}

func TestLongCDBAndLUN(t *testing.T) {
	p := newPeer(t, nil)
	cfg := p.config()
	cfg.Keys = WithKeys(Key{"HeaderDigest", "CRC32C"})
	conn := dial(t, cfg)
	cdb := fill(33, 1)
	cdb[0] = 0x7f
	if _, err := conn.Do(timeout(t), &Command{LUN: LUN(300), CDB: cdb, Attr: 3}); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	p.l.Close()
	<-p.done
	got := p.seen[len(p.seen)-1]
	// AHS: length 18 (17 bytes of CDB and the reserved one), type 1, padded to a word.
	want := append([]byte{0, 18, 1, 0}, cdb[16:]...)
	want = append(want, 0, 0, 0)
	if !bytes.Equal(got.AHS, want) || !bytes.Equal(got.BHS[32:], cdb[:16]) || got.BHS[1] != final|3 || got.U16(8) != 0x412c {
		t.Errorf("%x %x", got.BHS, got.AHS)
	}
}

// TestViolations breaks the rules one by one: each must end the connection, by its name.
func TestViolations(t *testing.T) {
	read := func(c *Conn) error {
		_, err := c.Do(timeout(t), &Command{CDB: Read16(0, 12), In: make([]byte, 12*512)})
		return err
	}
	write := func(c *Conn) error {
		_, err := c.Do(timeout(t), &Command{CDB: Write16(0, 20), Out: make([]byte, 20*512)})
		return err
	}
	tur := func(c *Conn) error {
		_, err := c.Do(timeout(t), &Command{CDB: TestUnitReady()})
		return err
	}
	ping := func(c *Conn) error {
		_, err := c.Ping(timeout(t), []byte("ping"), true)
		return err
	}
	add := func(at int, n uint32) func(*PDU) { return func(p *PDU) { p.Put32(at, p.U32(at)+n) } }
	or := func(at int, bits byte) func(*PDU) { return func(p *PDU) { p.BHS[at] |= bits } }
	and := func(at int, bits byte) func(*PDU) { return func(p *PDU) { p.BHS[at] &= bits } }
	for _, c := range []struct {
		name    string
		opcode  byte
		nth     int
		break_  func(*PDU)
		do      func(*Conn) error
		section string
	}{
		{"StatSN skipped", OpResponse, 1, add(24, 1), tur, "4.2.2.2"},
		{"StatSN repeated", OpResponse, 1, add(24, ^uint32(0)), tur, "4.2.2.2"},
		{"ExpCmdSN back", OpResponse, 1, add(28, ^uint32(3)), tur, "4.2.2.1"},
		{"ExpCmdSN ahead", OpResponse, 1, add(28, 1), tur, "4.2.2.1"},
		{"MaxCmdSN back", OpResponse, 1, add(32, ^uint32(7)), tur, "4.2.2.1"},
		{"unknown tag", OpResponse, 1, add(16, 99), tur, "11.2.1.8"},
		{"unknown opcode", OpResponse, 1, func(p *PDU) { p.BHS[0] = 0x3c }, tur, "11.2.1.2"},
		{"both residuals", OpResponse, 1, or(1, 6), tur, "11.4.1"},
		{"residual without bit", OpResponse, 1, add(44, 5), tur, "11.4.5.1"},
		{"no sense", OpResponse, 1, or(3, 2), tur, "11.4.7.1"},
		{"cut sense", OpResponse, 1, func(p *PDU) { p.Data = []byte{0, 9, 1} }, tur, "11.4.7"},
		{"DataSN", OpDataIn, 2, add(36, 1), read, "11.7.5"},
		{"offset", OpDataIn, 2, add(40, 512), read, "13.18"},
		{"too much data", OpDataIn, 12, func(p *PDU) { p.Data = make([]byte, 1024) }, read, "11.7.6"},
		{"burst without end", OpDataIn, 8, and(1, 0x7f), read, "13.13"},
		{"status without final", OpDataIn, 12, and(1, 0x7f), read, "11.7.3"},
		{"residual in the middle", OpDataIn, 3, or(1, 2), read, "11.7.3"},
		{"A bit", OpDataIn, 3, or(1, 0x40), read, "11.7.2"},
		{"data too short", OpDataIn, 12, func(p *PDU) { p.Data = p.Data[:100] }, read, "11.4.5.1"},
		{"status lost", OpDataIn, 12, func(p *PDU) { p.BHS[3] = 2 }, read, "11.7.4"},
		{"R2TSN", OpR2T, 2, add(36, 1), write, "11.8.3"},
		{"R2T tag", OpR2T, 1, func(p *PDU) { p.Put32(20, NoTag) }, write, "11.8.5"},
		{"R2T length", OpR2T, 1, func(p *PDU) { p.Put32(44, 8192) }, write, "11.8.4"},
		{"R2T of nothing", OpR2T, 1, func(p *PDU) { p.Put32(44, 0) }, write, "11.8.4"},
		{"R2T offset", OpR2T, 1, add(40, 512), write, "13.19"},
		{"R2T LUN", OpR2T, 1, or(9, 1), write, "11.8"},
		{"R2T StatSN", OpR2T, 1, add(24, 1), write, "4.2.2.2"},
		{"ping data", OpNopIn, 1, func(p *PDU) { p.Data = []byte("pong") }, ping, "11.19"},
		{"ping tag", OpNopIn, 1, func(p *PDU) { p.Put32(20, 4) }, ping, "11.19.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := 0
			p := newPeer(t, func(p *peer) {
				p.break_ = func(p *PDU) {
					if p.Opcode() == c.opcode {
						if n++; n == c.nth {
							c.break_(p)
						}
					}
				}
			})
			conn := dial(t, p.config())
			err := c.do(conn)
			var v *Violation
			if !errors.As(err, &v) || v.Section != c.section {
				t.Errorf("%v, want a violation of section %s", err, c.section)
			}
		})
	}
}

func TestDigestErrors(t *testing.T) {
	for name, break_ := range map[string]func(*PDU){
		"header": func(p *PDU) { p.BadHeaderDigest = true },
		"data":   func(p *PDU) { p.BadDataDigest = true },
	} {
		p := newPeer(t, func(p *peer) {
			p.break_ = func(p *PDU) {
				if p.Opcode() == OpDataIn {
					break_(p)
				}
			}
		})
		cfg := p.config()
		cfg.Keys = WithKeys(Key{"HeaderDigest", "CRC32C"}, Key{"DataDigest", "CRC32C"})
		conn := dial(t, cfg)
		if _, err := conn.Do(timeout(t), &Command{CDB: Read16(0, 1), In: make([]byte, 512)}); !errors.Is(err, errDigest) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLoginViolations(t *testing.T) {
	for _, c := range []struct {
		name    string
		nth     int
		break_  func(*PDU)
		section string
	}{
		{"no TSIH", 2, func(p *PDU) { p.Put16(14, 0) }, "11.13.5"},
		{"TSIH too early", 1, func(p *PDU) { p.Put16(14, 5) }, "11.13.5"},
		{"ISID", 1, func(p *PDU) { p.BHS[9]++ }, "11.13.5"},
		{"StatSN", 2, func(p *PDU) { p.Put32(24, 5) }, "11.13.4"},
		{"tag", 1, func(p *PDU) { p.Put32(16, 5) }, "6.3"},
		{"stage", 1, func(p *PDU) { p.BHS[1] = final | 2 }, "11.13.3"},
		{"no equals sign", 1, func(p *PDU) { p.Data = []byte("AuthMethod\x00") }, "6.1"},
		{"no end", 1, func(p *PDU) { p.Data = []byte("AuthMethod=None") }, "6.1"},
		{"twice", 1, func(p *PDU) { p.Data = []byte("AuthMethod=None\x00AuthMethod=None\x00") }, "6.2"},
		{"no common method", 1, func(p *PDU) { p.Data = []byte("AuthMethod=KRB5\x00") }, "12.1"},
		{"digest not offered", 2, func(p *PDU) {
			p.Data = bytes.Replace(p.Data, []byte("HeaderDigest=None"), []byte("HeaderDigest=CRC32C"), 1)
		}, "6.2.1"},
		{"no portal group tag", 1, func(p *PDU) { p.Data = []byte("AuthMethod=None\x00") }, "13.9"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := 0
			p := newPeer(t, func(p *peer) {
				p.break_ = func(p *PDU) {
					if n++; n == c.nth {
						c.break_(p)
					}
				}
			})
			_, err := Dial(timeout(t), p.config())
			var v *Violation
			if !errors.As(err, &v) || v.Section != c.section {
				t.Errorf("%v, want a violation of section %s", err, c.section)
			}
		})
	}
}

// TestRawPDUs: what the test sends is what the target gets, and what belongs to
// nothing is an event.
func TestRawPDUs(t *testing.T) {
	p := newPeer(t, func(p *peer) {
		p.break_ = func(r *PDU) {
			if r.Opcode() == OpNopIn && string(r.Data) == "reject" {
				*r = PDU{Data: make([]byte, headerLen), BHS: r.BHS}
				r.BHS[0], r.BHS[2] = OpReject, 4
				r.Put32(16, NoTag)
			}
		}
	})
	var outgoing int
	cfg := p.config()
	cfg.Outgoing = func(*PDU) { outgoing++ }
	conn := dial(t, cfg)
	nop := NewPDU(OpNopOut|Immediate, 0x1234)
	nop.Put32(20, NoTag)
	nop.Data = []byte("reject")
	if err := conn.Send(nop); err != nil {
		t.Fatal(err)
	}
	ev, err := conn.Event(timeout(t))
	if err != nil || ev.Opcode() != OpReject || ev.BHS[2] != 4 {
		t.Fatalf("event %v, %v", ev, err)
	}
	// A header that promises more than comes: the target waits for the rest.
	short := NewPDU(OpNopOut|Immediate, 1)
	short.BHS[7], short.RawLengths = 64, true
	if err := conn.Send(short); err != nil {
		t.Fatal(err)
	}
	rest := fill(64, 1)
	if err := conn.SendBytes(rest); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Event(timeout(t)); err == nil {
		t.Error("an answer to a PDU without a request is no violation")
	}
	conn.Close()
	p.l.Close()
	<-p.done
	if got := p.seen[len(p.seen)-1]; !bytes.Equal(got.Data, rest) {
		t.Errorf("the target got %x", got.Data)
	}
	if outgoing != 4 { // two of the login, two PDUs; not the bytes
		t.Errorf("%d PDUs were seen on their way", outgoing)
	}
}

// FuzzReadPDU: any bytes are a PDU within the limit, or an error.
func FuzzReadPDU(f *testing.F) {
	p := NewPDU(OpDataIn, 1)
	p.Data = []byte("data")
	p.AHS = []byte{0, 1, 1, 0}
	f.Add(p.appendTo(nil, true, true), true, true)
	f.Add(p.appendTo(nil, false, false), false, false)
	f.Add([]byte{0x25, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, false, true)
	f.Fuzz(func(t *testing.T, b []byte, hd, dd bool) {
		const limit = 1 << 16
		p, err := readPDU(bytes.NewReader(b), hd, dd, limit)
		if err != nil {
			return
		}
		if len(p.Data) > limit {
			t.Fatalf("data segment of %d bytes", len(p.Data))
		}
		q, err := readPDU(bytes.NewReader(p.appendTo(nil, hd, dd)), hd, dd, limit)
		if err != nil || !reflect.DeepEqual(p, q) {
			t.Fatalf("%v comes back as %v, %v", p, q, err)
		}
	})
}

func FuzzDecodeKeys(f *testing.F) {
	f.Add([]byte("A=b\x00C=\x00"))
	f.Add([]byte("A=b"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeKeys(b)
		if err == nil && len(m) == 0 && len(b) > 0 {
			t.Fatalf("%q is nothing", b)
		}
	})
}
