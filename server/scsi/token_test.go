package scsi_test

import (
	"bytes"
	"encoding/binary"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

var (
	tokenType    = code{5, 0x23, 1}
	tokenRemote  = code{5, 0x23, 2}
	tokenUnknown = code{5, 0x23, 4}
	tokenCorrupt = code{5, 0x23, 5}
	tokenRevoked = code{5, 0x23, 6}
	tokenExpired = code{5, 0x23, 7}
	tokenGone    = code{5, 0x23, 8}
	tokenDeleted = code{5, 0x23, 9}
	tokenLength  = code{5, 0x23, 0xa}
	noROD        = code{5, 0x55, 0xc}
	noToken      = code{5, 0x55, 0xd}
)

// clock is moved by a test.
type clock struct{ ns atomic.Int64 }

func (c *clock) now() time.Time          { return time.Unix(1e9, c.ns.Load()) }
func (c *clock) advance(d time.Duration) { c.ns.Add(int64(d)) }

// tokenRig is a copyRig whose server has a clock that the test moves.
type tokenRig struct {
	*copyRig
	clock *clock
}

func newTokenRig(t testing.TB, size uint64, change func(*scsi.LUConfig)) *tokenRig {
	t.Helper()
	r := &tokenRig{copyRig: &copyRig{rig: &rig{t: t}}, clock: &clock{}}
	r.lu, r.other, r.hidden = memlu.New(size), memlu.New(size), memlu.New(size)
	r.lu.SetID(1)
	r.other.SetID(2)
	r.hidden.SetID(3)
	r.lu.SetID(1, r.other, r.hidden)
	r.other.SetID(2, r.lu, r.hidden)
	r.s = r.server(2, change)
	r.n = r.attach(initiator, 1)
	return r
}

// server is a node with the rig's volumes.
func (r *tokenRig) server(port uint16, change func(*scsi.LUConfig)) *scsi.Server {
	r.t.Helper()
	s := scsi.New(scsi.Config{Backend: r.lu, NodePort: port, PortGroup: port, TargetName: target, Now: r.clock.now})
	r.t.Cleanup(s.Close)
	for lun, v := range []*memlu.LU{r.lu, r.other, r.hidden} {
		c := unitConfig(uint16(lun), v)
		c.VolumeUUID[15] = byte(lun)
		if change != nil {
			change(&c)
		}
		if err := s.SetLU(c); err != nil {
			r.t.Fatal(err)
		}
		s.SetAccess(uint16(lun), scsi.Visibility{Any: lun < 2})
	}
	return s
}

func withID(c []byte, at int, id uint32) []byte {
	binary.BigEndian.PutUint32(c[at:], id)
	return c
}

func populateList(flags byte, timeout, kind uint32, ranges ...[2]uint64) []byte {
	b := make([]byte, 16)
	binary.BigEndian.PutUint16(b, uint16(14+16*len(ranges)))
	b[2] = flags
	binary.BigEndian.PutUint32(b[4:], timeout)
	binary.BigEndian.PutUint32(b[8:], kind)
	binary.BigEndian.PutUint16(b[14:], uint16(16*len(ranges)))
	return cdb.AppendRanges(b, ranges...)
}

func (r *tokenRig) populate(id uint32, list []byte) result {
	r.t.Helper()
	return r.write(withID(thirdParty(cdb.ThirdPartyCopyOut, cdb.ActionPopulateToken, uint32(len(list))), 6, id), list)
}

// information is RECEIVE ROD TOKEN INFORMATION with room for all.
func (p port) information(id uint32) result {
	p.t.Helper()
	return p.run(command{cdb: withID(thirdParty(cdb.ThirdPartyCopyIn, cdb.ActionTokenInformation, 1024), 2, id), read: true, expected: 1024})
}

// token populates one and receives it.
func (r *tokenRig) token(timeout uint32, ranges ...[2]uint64) []byte {
	r.t.Helper()
	r.good(r.populate(0xfffffff0, populateList(0, timeout, 0, ranges...)))
	in := r.good(r.on(r.n, 0).information(0xfffffff0)).in
	if len(in) != 32+4+2+512 || int(binary.BigEndian.Uint32(in)) != len(in)-4 || in[4] != 0x10 || in[5] != 1 ||
		in[15] != 0xf1 || binary.BigEndian.Uint32(in[32:]) != 514 {
		r.t.Fatalf("ROD token information %x", in)
	}
	return slices.Clone(in[38:])
}

func writeList(flags byte, offset uint64, token []byte, ranges ...[2]uint64) []byte {
	b := make([]byte, 536)
	binary.BigEndian.PutUint16(b, uint16(534+16*len(ranges)))
	b[2] = flags
	binary.BigEndian.PutUint64(b[8:], offset)
	copy(b[16:], token)
	binary.BigEndian.PutUint16(b[534:], uint16(16*len(ranges)))
	return cdb.AppendRanges(b, ranges...)
}

func (p port) use(id uint32, list []byte) result {
	p.t.Helper()
	n := uint32(len(list))
	return p.run(command{cdb: withID(thirdParty(cdb.ThirdPartyCopyOut, cdb.ActionWriteUsingToken, n), 6, id), write: true, expected: n, out: list})
}

const lun1 = 1 << 48

// written is the status and transfer count of a WRITE USING TOKEN.
func (p port) written(id uint32) (status byte, blocks uint64) {
	p.t.Helper()
	in := p.good(p.information(id)).in
	if in[4] != 0x11 || in[15] != 0xf1 {
		p.t.Fatalf("ROD token information %x", in)
	}
	return in[5], binary.BigEndian.Uint64(in[16:])
}

func TestTokenIsAPointInTime(t *testing.T) {
	r := newTokenRig(t, 256*mib, nil)
	first, second := pattern(8*mib, 1), pattern(mib, 2)
	fill(r.lu, 16*mib, first)
	fill(r.lu, 3*mib, second)
	token := r.token(0, [2]uint64{16 * 2048, 8 * 2048}, [2]uint64{3 * 2048, 4 * 2048}) // the second is followed by holes
	if binary.BigEndian.Uint32(token) != cdb.RODPointInTime || binary.BigEndian.Uint64(token[56:]) != 12*mib || !bytes.Equal(token[24:32], naa(0)) {
		t.Errorf("token %x", token[:128])
	}
	reads := r.lu.Count(scsi.OpRead)
	fill(r.lu, 16*mib, pattern(8*mib, 77)) // later writes to the source do not matter

	// Another initiator, another node, another unit.
	node := r.server(130, nil)
	b := &rig{t: t, s: node, lu: r.lu}
	b.n = b.attach("iqn.2026-11.test:another", 1)
	p := b.on(b.n, lun1)
	b.good(p.use(1, writeList(0, 0, token, [2]uint64{2048, 10 * 2048}, [2]uint64{100 * 2048, 2 * 2048})))
	if status, n := p.written(1); status != 1 || n != 12*2048 {
		t.Errorf("status %02x, %d blocks", status, n)
	}
	want := append(slices.Clone(first), append(second, make([]byte, 3*mib)...)...)
	got := append(contents(t, r.other, mib, 10*mib), contents(t, r.other, 100*mib, 2*mib)...)
	if !bytes.Equal(got, want) {
		t.Error("the copy differs")
	}
	if r.lu.Count(scsi.OpRead) != reads || r.other.Count(scsi.OpWrite) != 0 {
		t.Error("data was moved")
	}
	if n := r.other.Allocated(); n != 9*mib/4096 {
		t.Errorf("%d blocks allocated: holes were filled", n)
	}
	// From the middle, of the unit itself, at addresses that are no whole blocks.
	r.good(r.on(r.n, 0).use(2, writeList(0, 5, token, [2]uint64{3, 100})))
	if !bytes.Equal(contents(t, r.lu, 3*512, 100*512), first[5*512:105*512]) {
		t.Error("the copy from the middle differs")
	}
	if s := r.s.Stats()[0]; s.Classes[scsi.ClassPopulateToken].Bytes != 12*mib || s.Classes[scsi.ClassWriteUsingToken].Bytes != 100*512 {
		t.Errorf("statistics: %+v", s.Classes[scsi.ClassWriteUsingToken])
	}
}

// 64 ranges of odd sizes come back in their order.
func TestTokenOfManyRanges(t *testing.T) {
	r := newTokenRig(t, 64*mib, nil)
	image := pattern(32*mib, 7)
	fill(r.lu, 0, image)
	var ranges [][2]uint64
	var want []byte
	for i := range uint64(64) {
		lba, n := (63-i)*900+i%7, 1+i*13
		ranges = append(ranges, [2]uint64{lba, n})
		want = append(want, image[lba*512:(lba+n)*512]...)
	}
	token := r.token(600, ranges...)
	p := r.on(r.n, lun1)
	sectors := uint64(len(want) / 512)
	for _, noClone := range []bool{false, true} {
		if noClone {
			r.other.SetFail(func(q *scsi.Request) error {
				if q.Op == scsi.OpClone {
					return scsi.ErrNoClone
				}
				return nil
			})
		}
		r.good(p.use(1, writeList(0, 0, token, [2]uint64{9, 1000}, [2]uint64{4096, sectors - 1000})))
		r.other.SetFail(nil)
		got := append(contents(t, r.other, 9*512, 1000*512), contents(t, r.other, 2*mib, uint64(len(want))-1000*512)...)
		if !bytes.Equal(got, want) {
			t.Errorf("the copy differs, cloned: %v", !noClone)
		}
		fill(r.other, 0, make([]byte, 32*mib))
	}
	ranges = append(ranges, [2]uint64{70000, 1})
	r.refused(r.populate(2, populateList(0, 0, 0, ranges...)), tooManySegs)
	r.refused(p.use(2, writeList(0, 0, token, ranges...)), tooManySegs)
}

func TestPopulateRefusals(t *testing.T) {
	r := newTokenRig(t, 2048*mib, nil)
	one := [2]uint64{0, 8}
	short := populateList(0, 0, 0, one)
	short[1]--
	claims := populateList(0, 0, 0, one)
	claims[15] = 32
	claims[1] = 46
	for _, c := range []struct {
		name string
		list []byte
		want code
	}{
		{"data length", short, badParam},
		{"fewer ranges than it says", claims, badParam},
		{"timeout", populateList(0, 601, 0, one), badParam},
		{"ROD type", populateList(2, 0, 0x00010000, one), tokenType},
		{"no ranges", populateList(0, 0, 0), badParam},
		{"empty ranges", populateList(0, 0, 0, [2]uint64{5, 0}), badParam},
		{"overlap", populateList(0, 0, 0, [2]uint64{8, 8}, [2]uint64{100, 1}, [2]uint64{0, 9}), badParam},
		{"beyond the end", populateList(0, 0, 0, [2]uint64{4194303, 2}), badLBA},
		{"address wraps", populateList(0, 0, 0, [2]uint64{1<<64 - 1, 2}), badLBA},
		{"too much", populateList(0, 0, 0, [2]uint64{0, 1 << 20}, [2]uint64{1 << 20, 1<<20 + 1}), badParam},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.t = t
			r.refused(r.populate(1, c.list), c.want)
		})
	}
	r.t = t
	r.good(r.populate(1, nil))
	r.refused(r.populate(1, make([]byte, 15)), listLen)
	if n := r.lu.Count(scsi.OpClone) + r.lu.Count(scsi.OpState); n != 0 {
		t.Errorf("%d requests of refused commands", n)
	}
	r.good(r.populate(1, populateList(2, 600, cdb.RODPointInTime, [2]uint64{0, 1 << 20}, [2]uint64{1 << 20, 1 << 20}))) // all limits met
}

func TestWriteUsingTokenRefusals(t *testing.T) {
	r := newTokenRig(t, 2048*mib, nil)
	fill(r.lu, 0, pattern(mib, 1))
	token := r.token(0, [2]uint64{0, 2048})
	one := [2]uint64{0, 8}
	with := func(at int, v byte) []byte {
		b := slices.Clone(token)
		b[at] ^= v
		return b
	}
	short := writeList(0, 0, token, one)
	short[1]--
	for _, c := range []struct {
		name string
		list []byte
		want code
	}{
		{"data length", short, badParam},
		{"no ranges", writeList(0, 0, token), badParam},
		{"overlap", writeList(0, 0, token, [2]uint64{0, 8}, [2]uint64{7, 1}), badParam},
		{"beyond the end", writeList(0, 0, token, [2]uint64{4194304, 1}), badLBA},
		{"too much", writeList(0, 0, token, [2]uint64{0, 1<<21 + 1}), badParam},
		{"token length", writeList(0, 0, with(7, 1), one), tokenLength},
		{"token type", writeList(0, 0, with(1, 1), one), tokenUnknown},
		{"id", writeList(0, 0, with(9, 1), one), tokenUnknown},
		{"secret", writeList(0, 0, with(511, 1), one), tokenUnknown},
		{"number of bytes", writeList(0, 0, with(57, 1), one), tokenCorrupt},
		{"unused bytes", writeList(0, 0, with(70, 1), one), tokenCorrupt},
		{"creator gone", writeList(0, 0, with(31, 0x40), one), tokenRevoked},
		{"another unit's id", writeList(0, 0, with(31, 1), one), tokenUnknown},
		{"another system's", writeList(0, 0, slices.Concat(with(31, 0x40)[:133], []byte("x"), token[134:]), one), tokenRemote},
		{"nothing", writeList(0, 0, make([]byte, 512), one), tokenLength},
		{"offset at the end", writeList(0, 2048, token, one), badParam},
		{"offset out of bounds", writeList(0, 1<<63, token, one), badParam},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.t = t
			r.refused(r.on(r.n, lun1).use(1, c.list), c.want)
		})
	}
	r.t = t
	if n := r.other.Count(scsi.OpClone) + r.other.Count(scsi.OpWrite) + r.other.Count(scsi.OpUnmap); n != 0 {
		t.Errorf("%d requests of refused commands", n)
	}
	r.s.SetAccess(1, scsi.Visibility{Any: true, ReadOnly: []string{initiator}})
	r.n = r.attach(initiator, 4)
	r.refused(r.on(r.n, lun1).use(1, writeList(0, 0, token, one)), readOnly)
	stranger := r.attach("iqn.2026-11.test:stranger", 5)
	r.refused(r.on(stranger, 2<<48).use(1, writeList(0, 0, token, one)), badLUN)
	r.refused(r.on(r.n, 0).information(77), badField)
}

func TestTokenWithAnotherBlockSize(t *testing.T) {
	r := newTokenRig(t, 64*mib, func(c *scsi.LUConfig) {
		if c.LUN == 1 {
			c.LogicalBlock = 4096
		}
	})
	token := r.token(0, [2]uint64{0, 16})
	r.refused(r.on(r.n, lun1).use(1, writeList(0, 0, token, [2]uint64{0, 2})), badParam)
}

// More asked for than the token has: what there is, and the host is told.
func TestPartialUse(t *testing.T) {
	r := newTokenRig(t, 64*mib, nil)
	data := pattern(mib, 1)
	fill(r.lu, 0, data)
	token := r.token(0, [2]uint64{0, 2048})
	p := r.on(r.n, lun1)
	r.good(p.use(1, writeList(0, 2000, token, [2]uint64{0, 40}, [2]uint64{64, 40})))
	if status, n := p.written(1); status != 3 || n != 48 {
		t.Errorf("status %02x, %d blocks", status, n)
	}
	got := append(contents(t, r.other, 0, 40*512), contents(t, r.other, 64*512, 40*512)...)
	if !bytes.Equal(got, append(slices.Clone(data[2000*512:]), make([]byte, 32*512)...)) {
		t.Error("the copy differs")
	}

	// Out of time: what was done counts, the host goes on from there.
	r.other.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpClone {
			r.clock.advance(5 * time.Second)
		}
		return nil
	})
	r.good(p.use(2, writeList(0, 0, token, [2]uint64{1024, 8}, [2]uint64{2048, 80})))
	r.other.SetFail(nil)
	status, n := p.written(2)
	if status != 3 || n != 8 {
		t.Errorf("status %02x, %d blocks", status, n)
	}
	r.good(p.use(2, writeList(0, n, token, [2]uint64{2048, 80})))
	if !bytes.Equal(contents(t, r.other, mib, 80*512), data[8*512:88*512]) {
		t.Error("the continued copy differs")
	}
}

func TestZeroToken(t *testing.T) {
	r := newTokenRig(t, 64*mib, nil)
	fill(r.other, 0, pattern(32*mib, 1))
	zero := make([]byte, 512)
	binary.BigEndian.PutUint32(zero, cdb.RODZero)
	zero[6], zero[7] = 1, 0xf8
	p := r.on(r.n, lun1)
	r.good(p.use(1, writeList(0, 1<<40, zero, [2]uint64{8, 8*2048 - 16}, [2]uint64{16 * 2048, 1}, [2]uint64{20 * 2048, 0})))
	if status, n := p.written(1); status != 1 || n != 8*2048-15 {
		t.Errorf("status %02x, %d blocks", status, n)
	}
	if !bytes.Equal(contents(t, r.other, 4096, 8*mib-8192), make([]byte, 8*mib-8192)) || !bytes.Equal(contents(t, r.other, 16*mib, 512), make([]byte, 512)) {
		t.Error("not zero")
	}
	if want := pattern(32*mib, 1); !bytes.Equal(contents(t, r.other, 16*mib+512, mib), want[16*mib+512:17*mib+512]) {
		t.Error("more was zeroed than was asked for")
	}
	if r.other.Allocated() != (24*mib+8192)/4096 || r.other.Count(scsi.OpWrite) != 1 {
		t.Errorf("%d blocks allocated", r.other.Allocated())
	}
	if r.lu.Count(scsi.OpReadState) != 0 {
		t.Error("the zero token needs no record")
	}
}

func TestTokenExpires(t *testing.T) {
	r := newTokenRig(t, 64*mib, nil)
	fill(r.lu, 0, pattern(mib, 1))
	before := r.lu.Allocated()
	token := r.token(60, [2]uint64{0, 2048})
	p := r.on(r.n, lun1)
	use := writeList(0, 0, token, [2]uint64{0, 8})
	for range 10 { // each use starts the time again
		r.clock.advance(40 * time.Second)
		r.s.Tick()
		r.good(p.use(1, use))
	}
	r.clock.advance(59 * time.Second)
	r.s.Tick()
	if list := r.all(); len(list) != 1 || !bytes.Equal(list[0], token[:96]) {
		t.Errorf("REPORT ALL ROD TOKENS %x", list)
	}
	r.clock.advance(2 * time.Second)
	r.refused(p.use(1, use), tokenExpired)
	if r.lu.Allocated() != before+256 {
		t.Error("the data went before its time")
	}
	r.clock.advance(31 * time.Second)
	r.s.Tick()
	eventually(t, "the copy goes on", func() bool { return r.lu.Allocated() == before })
	eventually(t, "the token goes", func() bool { return r.lu.Count(scsi.OpUnmap) == 1 && len(r.all()) == 0 })
	r.refused(p.use(1, use), tokenExpired)
	if after := r.lu.Count(scsi.OpState); after == 0 {
		t.Error("no change of state")
	}
}

// all are the management tokens of REPORT ALL ROD TOKENS.
func (r *tokenRig) all() (list [][]byte) {
	r.t.Helper()
	in := r.good(r.read(thirdParty(cdb.ThirdPartyCopyIn, cdb.ActionAllTokens, 65535), 65535)).in
	if int(binary.BigEndian.Uint32(in)) != len(in)-4 || (len(in)-8)%96 != 0 {
		r.t.Fatalf("REPORT ALL ROD TOKENS %x", in)
	}
	for d := in[8:]; len(d) > 0; d = d[96:] {
		list = append(list, slices.Clone(d[:96]))
	}
	return list
}

func TestDeleteToken(t *testing.T) {
	r := newTokenRig(t, 64*mib, nil)
	fill(r.lu, 0, pattern(mib, 1))
	before := r.lu.Allocated()
	token := r.token(0, [2]uint64{1, 2047})
	p := r.on(r.n, lun1)
	r.good(p.use(1, writeList(2, 0, token, [2]uint64{0, 2047})))
	if !bytes.Equal(contents(t, r.other, 0, 2047*512), pattern(mib, 1)[512:]) {
		t.Error("the copy differs")
	}
	r.refused(p.use(1, writeList(0, 0, token, [2]uint64{0, 8})), tokenDeleted)
	if len(r.all()) != 0 || r.lu.Allocated() != before {
		t.Errorf("%d blocks allocated, %d before", r.lu.Allocated(), before)
	}
}

// A token that goes while it is used: the use fails, for what it read may be zeros.
func TestTokenRemovedDuringUse(t *testing.T) {
	r := newTokenRig(t, 64*mib, nil)
	fill(r.lu, 0, pattern(mib, 1))
	token := r.token(0, [2]uint64{0, 2048})
	p := r.on(r.n, lun1)
	list := writeList(0, 0, token, [2]uint64{0, 2048})
	n := uint32(len(list))
	r.other.Hold()
	task, done := p.pending(command{cdb: withID(thirdParty(cdb.ThirdPartyCopyOut, cdb.ActionWriteUsingToken, n), 6, 1), write: true, expected: n, out: list})
	waitQueued(t, r.other, 1)
	r.good(r.on(r.n, 0).use(9, writeList(2, 0, token, [2]uint64{8192, 2048})))
	r.other.Release()
	<-done
	if s, _, _ := cdb.ParseSense(task.Sense[:task.SenseLen]); task.Status != cdb.CheckCondition || (code{s.Key, s.ASC, s.ASCQ}) != tokenDeleted {
		t.Errorf("status %02x, sense %+v", task.Status, s)
	}
	if status, blocks := p.written(1); status != 2 || blocks != 0 {
		t.Errorf("status %02x, %d blocks", status, blocks)
	}
}

// When clones fail the place in the annex is given back and the host copies by itself.
func TestPopulateWithoutClones(t *testing.T) {
	for name, c := range map[string]struct {
		err    error
		status byte
		want   code
	}{
		"no clone": {scsi.ErrNoClone, cdb.CheckCondition, noROD},
		"no space": {scsi.ErrNoSpace, cdb.CheckCondition, code{7, 0x27, 7}},
		"conflict": {scsi.ErrReserved, cdb.ReservationConflict, code{}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newTokenRig(t, 512*mib, nil)
			fill(r.lu, 0, pattern(mib, 1))
			before := r.lu.Allocated()
			clones := 0
			r.lu.SetFail(func(q *scsi.Request) error {
				if q.Op == scsi.OpClone {
					if clones++; clones == 3 {
						return c.err
					}
				}
				return nil
			})
			res := r.populate(1, populateList(0, 0, 0, [2]uint64{0, 2048}, [2]uint64{4096, 500000}))
			if res.status != c.status || res.code() != c.want {
				t.Errorf("status %02x sense %x", res.status, res.code())
			}
			r.lu.SetFail(nil)
			if r.lu.Allocated() != before || len(r.all()) != 0 {
				t.Errorf("%d blocks allocated, %d before, %d tokens", r.lu.Allocated(), before, len(r.all()))
			}
			in := r.good(r.on(r.n, 0).information(1)).in
			if in[5] != 2 || in[12] != c.status || binary.BigEndian.Uint32(in[32+int(in[13]):]) != 0 {
				t.Errorf("ROD token information %x", in)
			}
		})
	}
}

// A token that a dead node was filling is removed by another one.
func TestTokenLeftBehind(t *testing.T) {
	r := newTokenRig(t, 64*mib, nil)
	fill(r.lu, 0, pattern(mib, 1))
	before := r.lu.Allocated()
	ready := errorsOnce(r.lu, scsi.OpState, 2) // "ready", and then whatever would clean up
	res := r.populate(1, populateList(0, 0, 0, [2]uint64{0, 2048}))
	if res.status != cdb.Busy {
		t.Errorf("status %02x", res.status)
	}
	ready()
	if r.lu.Allocated() != before+256 {
		t.Fatal("nothing was left behind")
	}
	r.s.Tick()
	r.clock.advance(119 * time.Second)
	r.s.Tick()
	if r.lu.Allocated() != before+256 {
		t.Error("removed too early")
	}
	r.clock.advance(2 * time.Second)
	r.s.Tick()
	eventually(t, "the condition", func() bool { return r.lu.Allocated() == before })
}

// errorsOnce lets the first request of a kind pass and the others fail as busy.
func errorsOnce(v *memlu.LU, op scsi.RequestOp, from int) (end func()) {
	seen := 0
	v.SetFail(func(q *scsi.Request) error {
		if q.Op == op {
			if seen++; seen >= from {
				return scsi.ErrBusy
			}
		}
		return nil
	})
	return func() { v.SetFail(nil) }
}

// Tokens are bounded; those used to their end make room for new ones.
func TestTokensMakeRoom(t *testing.T) {
	r := newTokenRig(t, 64*mib, nil)
	fill(r.lu, 0, pattern(mib, 1))
	var tokens [][]byte
	for i := range uint64(64) {
		tokens = append(tokens, r.token(0, [2]uint64{i, 16}))
	}
	r.refused(r.populate(1, populateList(0, 0, 0, [2]uint64{0, 8})), noToken)
	p := r.on(r.n, lun1)
	r.good(p.use(1, writeList(0, 0, tokens[5], [2]uint64{0, 8}))) // a part only
	r.refused(r.populate(1, populateList(0, 0, 0, [2]uint64{0, 8})), noToken)
	r.good(p.use(1, writeList(0, 0, tokens[7], [2]uint64{0, 16})))
	newest := r.token(0, [2]uint64{3, 16})
	eventually(t, "the condition", func() bool { return len(r.all()) == 64 })
	r.refused(p.use(1, writeList(0, 0, tokens[7], [2]uint64{0, 8})), tokenGone)
	r.good(p.use(1, writeList(0, 0, newest, [2]uint64{0, 16})))
	for i, token := range tokens {
		if i != 7 {
			r.good(p.use(1, writeList(0, 8, token, [2]uint64{64, 8})))
			if !bytes.Equal(contents(t, r.other, 64*512, 8*512), pattern(mib, 1)[(i+8)*512:(i+16)*512]) {
				t.Fatalf("token %d reads another's data", i)
			}
		}
	}
}

func TestImmediateTokens(t *testing.T) {
	r := newTokenRig(t, 64*mib, nil)
	data := pattern(mib, 1)
	fill(r.lu, 0, data)
	r.lu.Hold()
	_, done := r.on(r.n, 0).pending(r.populateCommand(3, populateList(1, 0, 0, [2]uint64{0, 2048})))
	<-done // GOOD before the work
	in := r.good(r.on(r.n, 0).information(3)).in
	if in[5] != 0x12 || binary.BigEndian.Uint32(in[8:]) == 0 || len(in) != 36 {
		t.Errorf("while it runs: %x", in)
	}
	r.refused(r.populate(3, populateList(0, 0, 0, [2]uint64{0, 8})), inProgress)
	var token []byte
	eventually(t, "the condition", func() bool {
		r.lu.Release()
		in := r.good(r.on(r.n, 0).information(3)).in
		if in[5] != 1 {
			return false
		}
		token = slices.Clone(in[38:])
		return true
	})
	r.refused(r.on(r.n, 0).information(3), badField) // read
	p := r.on(r.n, lun1)
	r.good(p.use(4, writeList(1, 0, token, [2]uint64{0, 2048})))
	eventually(t, "the condition", func() bool {
		in := r.good(p.run(command{cdb: withID(thirdParty(cdb.ThirdPartyCopyIn, cdb.ActionTokenInformation, 32), 2, 4), read: true, expected: 32})).in
		return in[5] == 1 // cut: it is kept
	})
	if status, n := p.written(4); status != 1 || n != 2048 {
		t.Errorf("status %02x, %d blocks", status, n)
	}
	if !bytes.Equal(contents(t, r.other, 0, mib), data) {
		t.Error("the copy differs")
	}
	// What fails in the background is told when it is asked for.
	r.other.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpClone {
			return scsi.ErrNoSpace
		}
		return nil
	})
	r.good(p.use(5, writeList(1, 0, token, [2]uint64{0, 2048})))
	eventually(t, "the condition", func() bool {
		in := r.good(p.run(command{cdb: withID(thirdParty(cdb.ThirdPartyCopyIn, cdb.ActionTokenInformation, 64), 2, 5), read: true, expected: 64})).in
		return in[5] == 2 && in[12] == cdb.CheckCondition && in[32+2] == 7 && in[32+12] == 0x27
	})
}

func (r *tokenRig) populateCommand(id uint32, list []byte) command {
	n := uint32(len(list))
	return command{cdb: withID(thirdParty(cdb.ThirdPartyCopyOut, cdb.ActionPopulateToken, n), 6, id), write: true, expected: n, out: list}
}

func TestPopulateAborts(t *testing.T) {
	r := newTokenRig(t, 512*mib, nil)
	fill(r.lu, 0, pattern(mib, 1))
	before := r.lu.Allocated()
	r.lu.Hold()
	task, done := r.on(r.n, 0).pending(r.populateCommand(3, populateList(0, 0, 0, [2]uint64{0, 4000}, [2]uint64{8192, 400000})))
	waitQueued(t, r.lu, 1) // the state
	r.lu.Release()
	r.lu.Hold()
	response := make(chan scsi.TaskResponse, 1)
	r.s.TaskManagement(r.n, scsi.AbortTask, 0, task, func(f scsi.TaskResponse) { response <- f })
	eventually(t, "the condition", func() bool {
		r.lu.Release()
		select {
		case <-done:
			return true
		default:
			return false
		}
	})
	<-response
	if r.lu.Allocated() != before || len(r.all()) != 0 {
		t.Errorf("%d blocks allocated, %d before", r.lu.Allocated(), before)
	}
}

// Status is forgotten after a minute.
func TestStatusIsForgotten(t *testing.T) {
	r := newTokenRig(t, 64*mib, nil)
	r.good(r.populate(1, populateList(0, 600, 0, [2]uint64{0, 8})))
	r.clock.advance(59 * time.Second)
	r.s.Tick()
	r.good(r.on(r.n, 0).run(command{cdb: withID(thirdParty(cdb.ThirdPartyCopyIn, cdb.ActionTokenInformation, 4), 2, 1), read: true, expected: 4}))
	r.clock.advance(time.Second)
	r.refused(r.on(r.n, 0).information(1), badField)
	r.s.Tick()
	r.refused(r.on(r.n, 0).information(1), badField)
}

// Clones share whole pages of the map: a range lies in the annex as it does in the volume.
func TestAnnexPlacesLieAlike(t *testing.T) {
	r := newTokenRig(t, 512*mib, nil)
	r.lu.SetFail(func(q *scsi.Request) error {
		if q.Op != scsi.OpClone {
			return nil
		}
		if q.Off < replication.AnnexOff || (q.Off-q.SourceOff)%(2*mib) != 0 {
			t.Errorf("clone of %d to %d", q.SourceOff, q.Off-replication.AnnexOff)
		}
		return nil
	})
	for i := range uint64(5) {
		r.token(0, [2]uint64{i * 1000, 300000}, [2]uint64{700000 + i, 17}, [2]uint64{600000, 65536})
	}
}

// A copy waits out a take-over; one that lasts too long ends it.
func TestCopyMeetsABusyVolume(t *testing.T) {
	for _, c := range []struct {
		op    scsi.RequestOp
		times int
		good  bool
	}{{scsi.OpClone, 1, true}, {scsi.OpClone, 5, true}, {scsi.OpClone, 6, false}, {scsi.OpWrite, 2, true}, {scsi.OpWrite, 6, false}} {
		r := newTokenRig(t, 64*mib, nil)
		data := pattern(3*mib, 1)
		fill(r.lu, 0, data)
		var left atomic.Int32
		left.Store(int32(c.times))
		r.other.SetFail(func(q *scsi.Request) error {
			switch {
			case q.Op == c.op && left.Add(-1) >= 0:
				return scsi.ErrBusy
			case q.Op == scsi.OpClone && c.op != scsi.OpClone:
				return scsi.ErrNoClone
			}
			return nil
		})
		list := xcopyList(1, 0, bothUnits, blocks(0, 1, 0, 8, 4096), blocks(0, 1, 3, 8192, 4096))
		task, done := r.on(r.n, 0).pending(r.xcopyCommand(list))
		eventually(t, "the condition", func() bool {
			select {
			case <-done:
				return true
			default:
				r.s.Tick()
				return false
			}
		})
		r.other.SetFail(nil)
		if c.good {
			if task.Status != cdb.Good || !bytes.Equal(contents(t, r.other, 4096, 2*mib), data[:2*mib]) ||
				!bytes.Equal(contents(t, r.other, 4*mib, 2*mib), data[3*512:3*512+2*mib]) {
				t.Errorf("%+v: status %02x", c, task.Status)
			}
			continue
		}
		s, _, _ := cdb.ParseSense(task.Sense[:task.SenseLen])
		if task.Status != cdb.CheckCondition || s.Key != cdb.CopyAborted || task.Sense[task.Sense[9]] != cdb.Busy {
			t.Errorf("%+v: status %02x sense %x", c, task.Status, task.Sense[:task.SenseLen])
		}
	}
}
