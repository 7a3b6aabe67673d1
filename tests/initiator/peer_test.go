package initiator

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// peer is the smallest target that a test of the initiator needs: one connection
// after the other, one disk of 1 MiB, everything done at once and in order. break_
// changes what it sends, so that each rule that the initiator watches can be broken.
type peer struct {
	t      *testing.T
	l      net.Listener
	disk   []byte
	keys   map[string]string // its own operational values
	chap   *CHAP             // demanded; Secret is the initiator's
	break_ func(*PDU)
	burst  int
	window uint32
	seen   []*PDU // requests in full feature phase; read after the connection ended
	done   chan struct{}
}

const iqn = "iqn.2026-01.example:disk"

func newPeer(t *testing.T, set func(*peer)) *peer {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{t: t, l: l, disk: make([]byte, 1<<20), burst: 4096, window: 8, done: make(chan struct{}),
		keys: map[string]string{
			"HeaderDigest": "CRC32C,None", "DataDigest": "CRC32C,None", "InitialR2T": "No", "ImmediateData": "Yes",
			"MaxBurstLength": "4096", "FirstBurstLength": "2048", "MaxOutstandingR2T": "1", "MaxRecvDataSegmentLength": "1024",
		}}
	if set != nil {
		set(p)
	}
	go func() {
		defer close(p.done)
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			(&peerConn{peer: p, nc: nc, statSN: 100}).serve()
			nc.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-p.done })
	return p
}

type peerConn struct {
	*peer
	nc     net.Conn
	hd, dd bool
	statSN uint32
	exp    uint32
	held   map[uint32]bool
}

func (c *peerConn) send(p *PDU, status bool) {
	if p.Opcode() != OpLoginResponse || p.BHS[36] == 0 {
		p.Put32(28, c.exp)
		p.Put32(32, c.exp+c.window-1)
	}
	if status || p.Opcode() == OpR2T {
		p.Put32(24, c.statSN)
	}
	if status {
		c.statSN++
	}
	if c.break_ != nil {
		c.break_(p)
	}
	if !p.Drop {
		c.nc.Write(p.appendTo(nil, c.hd, c.dd)) // an error shows at the next read
	}
}

func (c *peerConn) recv() *PDU {
	p, err := readPDU(c.nc, c.hd, c.dd, 1<<20)
	if err != nil {
		return nil
	}
	return p
}

func (c *peerConn) serve() {
	c.held = map[uint32]bool{}
	if !c.login() {
		return
	}
	for p := c.recv(); p != nil; p = c.recv() {
		c.seen = append(c.seen, p)
		if p.BHS[0]&Immediate == 0 && p.Opcode() != OpDataOut {
			if p.U32(24) != c.exp {
				c.t.Errorf("CmdSN %d, expected %d: %v", p.U32(24), c.exp, p)
			}
			c.exp++
		}
		if !c.request(p) {
			return
		}
	}
}

func (c *peerConn) login() bool {
	const chapID, challenge = 9, "sixteen bytes 00"
	var algorithm int
	var part []byte
	for first := true; ; first = false {
		p := c.recv()
		if p == nil || p.Opcode() != OpLogin {
			return false
		}
		if first {
			c.exp = p.U32(24)
		}
		for part = nil; p.BHS[1]&cont != 0; p = c.recv() {
			part = append(part, p.Data...)
			r := NewPDU(OpLoginResponse, p.ITT())
			r.BHS[1] = p.BHS[1] & 0xc
			copy(r.BHS[8:14], p.BHS[8:14])
			c.send(r, true)
		}
		p.Data = append(part, p.Data...)
		keys, err := decodeKeys(p.Data)
		if err != nil {
			c.t.Error(err)
			return false
		}
		r := NewPDU(OpLoginResponse, p.ITT())
		r.BHS[1] = p.BHS[1] & (final | 0xf)
		copy(r.BHS[8:14], p.BHS[8:14])
		var answer []Key
		refuse := func(detail byte) bool {
			r.BHS[1] &^= final
			r.BHS[36], r.BHS[37] = 2, detail
			c.send(r, true)
			return false
		}
		csg := p.BHS[1] >> 2 & 3
		switch {
		case keys["AuthMethod"] == "CHAP" && c.chap != nil:
			answer = append(answer, Key{"AuthMethod", "CHAP"}, Key{"TargetPortalGroupTag", "1"})
			r.BHS[1] &^= final
		case keys["CHAP_A"] != "":
			for _, a := range strings.Split(keys["CHAP_A"], ",") {
				if n, _ := strconv.Atoi(a); algorithm == 0 && (n == CHAPMD5 || n == CHAPSHA256) {
					algorithm = n
				}
			}
			answer = append(answer, Key{"CHAP_A", strconv.Itoa(algorithm)}, Key{"CHAP_I", strconv.Itoa(chapID)},
				Key{"CHAP_C", c.chap.encode([]byte(challenge))})
		case keys["CHAP_R"] != "":
			want, _ := digest(algorithm, chapID, c.chap.Secret, []byte(challenge))
			if got, err := decodeBinary(keys["CHAP_R"]); err != nil || !bytes.Equal(got, want) || keys["CHAP_N"] != c.chap.Name {
				return refuse(1)
			}
			if keys["CHAP_I"] != "" {
				id, _ := strconv.Atoi(keys["CHAP_I"])
				ch, _ := decodeBinary(keys["CHAP_C"])
				if string(ch) == challenge {
					return refuse(1)
				}
				sum, _ := digest(algorithm, byte(id), c.chap.MutualSecret, ch)
				answer = append(answer, Key{"CHAP_N", "target"}, Key{"CHAP_R", c.chap.encode(sum)})
			}
		case csg == 0 && first && c.chap != nil:
			return refuse(1)
		case keys["AuthMethod"] != "":
			answer = append(answer, Key{"AuthMethod", "None"}, Key{"TargetPortalGroupTag", "1"})
		}
		if csg == 1 {
			if first {
				answer = append(answer, Key{"TargetPortalGroupTag", "1"})
			}
			for name, ours := range c.keys {
				theirs, ok := keys[name]
				if !ok {
					continue
				}
				value := ours
				switch name {
				case "HeaderDigest", "DataDigest":
					value = strings.Split(theirs, ",")[0]
				case "InitialR2T":
					if theirs == "Yes" {
						value = "Yes"
					}
				case "ImmediateData":
					if theirs == "No" {
						value = "No"
					}
				case "MaxBurstLength", "FirstBurstLength", "MaxOutstandingR2T":
					a, _ := strconv.Atoi(ours)
					b, _ := strconv.Atoi(theirs)
					value = strconv.Itoa(min(a, b))
				}
				answer = append(answer, Key{name, value})
			}
		}
		r.Data = encodeKeys(answer)
		last := r.Final() && r.BHS[1]&3 == 3
		if last {
			r.Put16(14, 77)
		}
		c.send(r, true)
		if last {
			for _, k := range answer {
				c.hd = c.hd || k == Key{"HeaderDigest", "CRC32C"}
				c.dd = c.dd || k == Key{"DataDigest", "CRC32C"}
			}
			return true
		}
	}
}

func (c *peerConn) request(p *PDU) bool {
	switch p.Opcode() {
	case OpNopOut:
		if p.ITT() != NoTag {
			r := NewPDU(OpNopIn, p.ITT())
			r.Put32(20, NoTag)
			r.Data = p.Data
			c.send(r, true)
		}
	case OpText:
		r := NewPDU(OpTextResponse, p.ITT())
		r.Put32(20, NoTag)
		text := encodeKeys([]Key{{"TargetName", iqn}, {"TargetAddress", "127.0.0.1:1,1"}, {"TargetAddress", "[::1]:1,2"}})
		if len(p.Data) > 0 { // the second half on demand
			r.Put32(20, 5)
			r.BHS[1] = cont
			r.Data = text[:30]
		} else {
			r.Data = text[30:]
		}
		c.send(r, true)
	case OpLogout:
		c.send(NewPDU(OpLogoutResponse, p.ITT()), true)
		return false
	case OpTaskManagement:
		r := NewPDU(OpTaskManagementResponse, p.ITT())
		if p.BHS[1]&0x7f == AbortTask {
			if !c.held[p.U32(20)] {
				r.BHS[2] = 1
			}
			delete(c.held, p.U32(20))
		} else {
			clear(c.held)
		}
		c.send(r, true)
	case OpCommand:
		return c.command(p)
	}
	return true
}

func (c *peerConn) command(p *PDU) bool {
	r := NewPDU(OpResponse, p.ITT())
	cdb := p.BHS[32:]
	off := int(binary.BigEndian.Uint64(cdb[2:])) * 512
	n := int(binary.BigEndian.Uint32(cdb[10:])) * 512
	switch cdb[0] {
	case 0x00:
	case 0x88:
		sn := uint32(0)
		for at := 0; at < n; at += 512 {
			d := NewPDU(OpDataIn, p.ITT())
			d.Put32(20, NoTag)
			d.Put32(36, sn)
			d.Put32(40, uint32(at))
			d.Data = c.disk[off+at : off+at+512]
			last := at+512 == n
			if !last && (at+512)%c.burst != 0 {
				d.BHS[1] &^= final
			}
			if last {
				d.BHS[1] |= 1
			}
			sn++
			c.send(d, last)
		}
		if n > 0 {
			return true
		}
	case 0x8a:
		if !c.write(p, off, n) {
			return false
		}
	case 0xff:
		c.held[p.ITT()] = true
		return true
	default:
		r.BHS[3] = 2
		sense := make([]byte, 18)
		sense[0], sense[2], sense[12] = 0x70, 5, 0x20
		r.Data = append([]byte{0, 18}, sense...)
		if e := p.U32(20); e > 0 {
			r.BHS[1] |= 2
			r.Put32(44, e)
		}
	}
	c.send(r, true)
	return true
}

func (c *peerConn) write(p *PDU, off, n int) bool {
	got := copy(c.disk[off:], p.Data)
	ttt := uint32(NoTag)
	for fin, r2t := p.Final(), uint32(0); got < n; {
		if fin {
			r := NewPDU(OpR2T, p.ITT())
			copy(r.BHS[8:16], p.BHS[8:16])
			ttt = 0x40 + r2t
			r.Put32(20, ttt)
			r.Put32(36, r2t)
			r.Put32(40, uint32(got))
			r.Put32(44, uint32(min(n-got, c.burst)))
			r2t++
			c.send(r, false)
		}
		d := c.recv()
		if d == nil {
			return false
		}
		c.seen = append(c.seen, d)
		if d.Opcode() != OpDataOut || d.ITT() != p.ITT() || d.U32(20) != ttt || int(d.U32(40)) != got {
			c.t.Errorf("Data-Out %v with tag %x at %d, expected %x at %d", d, d.U32(20), d.U32(40), ttt, got)
			return false
		}
		got += copy(c.disk[off+got:], d.Data)
		fin = d.Final()
	}
	return true
}

func (p *peer) config() Config {
	return Config{Addr: p.l.Addr().String(), InitiatorName: "iqn.2026-01.example:host", TargetName: iqn, ISID: [6]byte{0x80, 1, 2, 3, 4, 5}, CmdSN: 0xfffffffe}
}

// timeout bounds a test that hangs; it decides nothing.
func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func dial(t testing.TB, cfg Config) *Conn {
	t.Helper()
	c, err := Dial(timeout(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
