package initiator_test

import (
	"encoding/binary"
	"errors"
	"flag"
	"os"
	"testing"

	"github.com/twinsan/twinsan/server/iscsi"
	"github.com/twinsan/twinsan/tests/initiator"
)

// The tests that ask for a lab run against a target in this process, or against
// a real one:
//
//	go test ./tests/initiator -args -target iscsi://user%secret@192.0.2.1:3260/iqn.2026-01.example:san/0
//
// They write to its first MiB. The tests that need to look into the target
// are skipped then.
var (
	targetURL     = flag.String("target", os.Getenv("TWINSAN_TEST_TARGET"), "iSCSI URL of a target whose data may be lost; empty is one in this process")
	initiatorName = flag.String("initiator", initiator.DefaultInitiator, "initiator name for -target")
)

// lab is a logical unit that may be written, and how to reach it.
type lab struct {
	t     testing.TB
	cfg   initiator.Config
	url   initiator.URL
	lun   [8]byte
	block int // bytes of a logical block
}

func newLab(t testing.TB) *lab {
	t.Helper()
	l := &lab{t: t}
	if *targetURL == "" {
		l.cfg = newRig(t, true, iscsi.Limits{}).config()
		l.url = initiator.URL{Addr: l.cfg.Addr, Target: l.cfg.TargetName}
	} else {
		var err error
		if l.url, err = initiator.ParseURL(*targetURL); err != nil {
			t.Fatal(err)
		}
		l.cfg = initiator.Config{Addr: l.url.Addr, TargetName: l.url.Target, InitiatorName: *initiatorName, ISID: initiator.DefaultISID, CmdSN: 1}
		if l.url.User != "" {
			l.cfg.CHAP = &initiator.CHAP{Name: l.url.User, Secret: l.url.Secret}
		}
	}
	l.lun = initiator.LUN(l.url.LUN)
	in := make([]byte, 32)
	if r := l.do(l.dial(nil), &initiator.Command{CDB: initiator.ReadCapacity16(32), In: in}); !r.OK() {
		t.Fatalf("READ CAPACITY(16): %v", r)
	}
	l.block = int(binary.BigEndian.Uint32(in[8:]))
	return l
}

// dial logs in and takes the unit attentions.
func (l *lab) dial(change func(*initiator.Config)) *initiator.Conn {
	l.t.Helper()
	cfg := l.cfg
	if change != nil {
		change(&cfg)
	}
	c, err := initiator.Dial(wait(l.t), cfg)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { c.Close() })
	for range 8 {
		if r := l.do(c, &initiator.Command{CDB: initiator.TestUnitReady()}); r.OK() {
			return c
		}
	}
	l.t.Fatal("the logical unit does not get ready")
	return nil
}

func (l *lab) do(c *initiator.Conn, cmd *initiator.Command) *initiator.Result {
	l.t.Helper()
	cmd.LUN = l.lun
	return do(l.t, c, cmd)
}

// write and read move whole blocks and must end well.
func (l *lab) write(c *initiator.Conn, lba int, data []byte) {
	l.t.Helper()
	if r := l.do(c, &initiator.Command{CDB: initiator.Write16(uint64(lba), uint32(len(data)/l.block)), Out: data}); !r.OK() {
		l.t.Fatalf("write: %v", r)
	}
}

func (l *lab) read(c *initiator.Conn, lba, blocks int) []byte {
	l.t.Helper()
	in := make([]byte, blocks*l.block)
	if r := l.do(c, &initiator.Command{CDB: initiator.Read16(uint64(lba), uint32(blocks)), In: in}); !r.OK() {
		l.t.Fatalf("read: %v", r)
	}
	return in
}

// ready logs in and takes the unit attentions of LUN 0, whatever they are.
func ready(t testing.TB, cfg initiator.Config) *initiator.Conn {
	t.Helper()
	l := &lab{t: t, cfg: cfg}
	return l.dial(nil)
}

// works proves that a connection is well.
func (l *lab) works(c *initiator.Conn) {
	l.t.Helper()
	data := fill(2*l.block, 99)
	l.write(c, 60, data)
	if string(l.read(c, 60, 2)) != string(data) {
		l.t.Fatal("read differs from what was written")
	}
}

// names are the keys with which a login says who it is.
func (l *lab) names() []initiator.Key {
	return []initiator.Key{{Name: "InitiatorName", Value: l.cfg.InitiatorName}, {Name: "TargetName", Value: l.cfg.TargetName}}
}

// exchange makes the first login exchange on a new connection.
func (l *lab) exchange(csg, nsg byte, transit bool, keys []initiator.Key, change func(*initiator.PDU)) (*initiator.Conn, *initiator.PDU) {
	l.t.Helper()
	c, err := initiator.Open(wait(l.t), l.cfg)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { c.Close() })
	p := c.LoginRequest(csg, nsg, transit, keys)
	if change != nil {
		change(p)
	}
	r, err := c.Exchange(p)
	if err != nil {
		l.t.Fatal(err)
	}
	return c, r
}

// answers decodes the text of a login response; a key that comes twice is wrong.
func answers(t testing.TB, p *initiator.PDU) map[string]string {
	t.Helper()
	m := make(map[string]string)
	for _, pair := range splitText(p.Data) {
		if _, twice := m[pair[0]]; twice {
			t.Fatalf("%s is answered twice", pair[0])
		}
		m[pair[0]] = pair[1]
	}
	return m
}

func splitText(b []byte) (pairs [][2]string) {
	for len(b) > 0 {
		end := 0
		for end < len(b) && b[end] != 0 {
			end++
		}
		eq := 0
		for eq < end && b[eq] != '=' {
			eq++
		}
		if eq < end {
			pairs = append(pairs, [2]string{string(b[:eq]), string(b[eq+1 : end])})
		}
		b = b[min(end+1, len(b)):]
	}
	return pairs
}

// asReject is errors.As for rejects.
func asReject(err error, r **initiator.RejectError) bool { return errors.As(err, r) }

// keys makes keys of "Name=value".
func keys(pairs ...string) []initiator.Key {
	var k []initiator.Key
	for _, p := range pairs {
		s := splitText([]byte(p))
		k = append(k, initiator.Key{Name: s[0][0], Value: s[0][1]})
	}
	return k
}
