package sim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

const blockBytes = 4096

func utoa(i int) string { return fmt.Sprint(i) }

// client is a host: it has a session with each node that it can reach, uses one path
// at a time, and repeats what was lost, with the same or with other data.
type client struct {
	w        *world
	id       int
	r        *random
	path     replication.NodeID
	sessions [maxNodes + 1]*session
	regs     [][]*register // by volume
	current  atomic.Pointer[command]
	busy     bool           // an attempt at it ended with BUSY
	done     []atomic.Int64 // by volume: when its newest good write ended, in nanoseconds of the clock
	room     []byte         // for the next read; nil: a new one
	lockSeq  uint64
	lockDead map[uint64]bool
}

// command is what a client has under way, with the versions that it makes.
type command struct {
	regs []target
}

type target struct {
	reg     *register
	version int
}

func newClient(w *world, id int) *client {
	c := &client{w: w, id: id, r: newRandom(w.seed, 100+uint64(id)), regs: make([][]*register, birthsMax+1), done: make([]atomic.Int64, birthsMax+1), lockDead: map[uint64]bool{}}
	c.path = replication.NodeID(1 + c.r.n(w.nodes))
	for v := 1; v <= w.volumes(); v++ {
		for _, first := range hostRuns(id) {
			for i := range runBlocks {
				c.regs[v] = append(c.regs[v], newRegister(lsfs.VolumeID(v), first+lsfs.BlockNo(i), id))
			}
		}
	}
	return c
}

// session is a session on the present path, or on another one if that gives none. Nodes
// without a copy of the volume offer no path to it (ALUA: unavailable).
func (c *client) session(vol lsfs.VolumeID) *session {
	w := c.w
	if c.r.chance(w.wander) {
		c.path = replication.NodeID(1 + c.r.n(w.nodes))
	}
	for !w.over() {
		for range w.nodes {
			if w.placing && !w.offers(c.path, vol) {
				c.path = c.path%replication.NodeID(w.nodes) + 1
				continue
			}
			if s := c.sessions[c.path]; s != nil && !s.isOver() && w.reaches(c, c.path) {
				return s
			}
			time.Sleep(c.r.between(500*time.Microsecond, 3*time.Millisecond))
			if p, _ := w.processAt(c.path); p != nil && w.reaches(c, c.path) {
				if s := p.login(c); s != nil {
					if old := c.sessions[c.path]; old != nil {
						old.end() // session reinstatement (Z4)
					}
					c.sessions[c.path] = s
					return s
				}
			}
			c.path = c.path%replication.NodeID(w.nodes) + 1
		}
		time.Sleep(c.r.between(20*time.Millisecond, 200*time.Millisecond))
	}
	return nil
}

// do executes one command until it ends or is lost; BUSY is repeated. mk makes the
// request anew for each attempt.
func (c *client) do(vol lsfs.VolumeID, mk func() *replication.Request) (*replication.Request, error) {
	for {
		s := c.session(vol)
		if s == nil {
			return nil, errLost
		}
		r := mk()
		if err := c.ask(s, vol, r); err != nil {
			c.path = c.path%replication.NodeID(c.w.nodes) + 1
			return nil, err
		}
		if !errors.Is(r.Err, replication.ErrBusy) {
			return r, r.Err
		}
		c.busy = true // of a write that was forwarded it may have taken effect
		select {
		case <-time.After(c.r.between(50*time.Millisecond, 300*time.Millisecond)):
		case <-c.w.stop:
			return nil, errLost
		}
	}
}

func (c *client) run() {
	for !c.w.over() {
		c.w.hosts.enter()
		if c.r.chance(0.1) && c.w.burst {
			for range 5 + c.r.n(20) {
				c.step()
			}
		} else {
			c.step()
		}
		c.w.hosts.leave()
		select {
		case <-time.After(c.r.exp(c.w.think)):
		case <-c.w.stop:
		}
	}
}

// watch is the life of a host that only reads, mostly what others are writing just now:
// what it has seen once must stay (I9, R2).
func (c *client) watch() {
	for !c.w.over() {
		c.observe(1 + c.r.n(c.w.volumes()))
		select {
		case <-time.After(c.r.exp(c.w.think)):
		case <-c.w.stop:
		}
	}
}

// step does one thing.
func (c *client) step() {
	if c.w.over() {
		return
	}
	v := 1 + c.r.n(c.w.volumes())
	if c.w.ram[v] {
		if c.w.restore[v].Load() && c.r.chance(0.5) {
			c.rewrite(v)
			return
		}
		c.stepRelaxed(v)
		return
	}
	switch k := c.r.n(100); {
	case c.w.restore[v].Load() && c.r.chance(0.5):
		c.rewrite(v)
	case k < 35:
		c.write(v)
	case k < 48:
		c.observe(v)
	case k < 65:
		c.readOwn(v)
	case k < 72:
		c.unmap(v)
	case k < 78:
		c.ragged(v)
	case k < 83:
		c.same(v)
	case k < 90:
		c.compare(v)
	case k < 95 && c.w.clones:
		c.clone(v)
	case c.w.locks:
		c.lock(v)
	default:
		c.write(v)
	}
}

// stepRelaxed does one thing with a volume of which acknowledged writes may be lost. What
// makes a block from what it was is left out: nobody knows for certain what it is.
func (c *client) stepRelaxed(v int) {
	switch k := c.r.n(100); {
	case k < 50:
		c.write(v)
	case k < 60:
		c.observe(v)
	case k < 72:
		c.readOwn(v)
	case k < 80:
		c.unmap(v)
	case k < 85:
		c.same(v)
	case k < 92 || !c.w.locks:
		c.flush(v)
	default:
		c.lock(v)
	}
}

// run1 is a run of own registers in one place of a volume.
func (c *client) some(v int) []*register {
	half := c.regs[v][c.r.n(2)*8:][:8]
	n := 1
	if c.r.chance(0.4) {
		n += c.r.n(7)
	}
	at := c.r.n(8 - n + 1)
	return half[at : at+n]
}

// content makes a block: mostly unlike any other, sometimes one of few.
func (c *client) content() []byte {
	b := make([]byte, blockBytes)
	c.invent(b)
	return b
}

// invent fills a block.
func (c *client) invent(b []byte) {
	if c.r.chance(0.15) {
		copy(b, c.w.shared[c.r.n(len(c.w.shared))])
		return
	}
	stampOn(b, c.r.u64(), c.r.chance(0.2))
}

// contents makes one block for each register, and all of them as the data of a write. A
// write only reads it, so all attempts at it share it.
func (c *client) contents(regs []*register) (each [][]byte, data []byte) {
	data = make([]byte, len(regs)*blockBytes)
	each = make([][]byte, len(regs))
	for i := range regs {
		each[i] = data[i*blockBytes:][:blockBytes:blockBytes]
		c.invent(each[i])
	}
	return each, data
}

// stamp fills a block from a number, compressible or not.
func stamp(x uint64, noise bool) []byte {
	b := make([]byte, blockBytes)
	stampOn(b, x, noise)
	return b
}

func stampOn(b []byte, x uint64, noise bool) {
	for i := 0; i < len(b); i += 8 {
		if noise || i < 16 {
			x = x*6364136223846793005 + 1442695040888963407
		}
		binary.LittleEndian.PutUint64(b[i:], x)
	}
}

// change sends a command that gives regs new contents and notes how it ended.
func (c *client) change(regs []*register, contents [][]byte, mk func() *replication.Request) {
	cmd := &command{}
	for i, r := range regs {
		cmd.regs = append(cmd.regs, target{r, r.sent(contents[i])})
	}
	vol := regs[0].vol
	for first := true; ; first = false {
		c.current.Store(cmd)
		c.busy = false
		r, err := c.do(vol, mk)
		c.current.Store(nil)
		switch {
		case err == nil:
			for _, t := range cmd.regs {
				t.reg.good(t.version)
				if r.FUA || r.Op != replication.OpWrite && r.Op != replication.OpWriteSame {
					t.reg.secure(t.version) // not relaxed (W6)
				}
			}
			c.done[vol].Store(time.Now().UnixNano())
			c.w.note("good", uint64(c.id), uint64(vol), uint64(regs[0].no), uint64(cmd.regs[0].version))
			return
		case errors.Is(err, errLost):
			c.w.note("lost", uint64(c.id), uint64(vol), uint64(regs[0].no), uint64(cmd.regs[0].version))
			if r := mk(); r.Op != replication.OpCompareAndWrite && r.Op != replication.OpClone && c.r.chance(0.6) && !c.w.over() {
				continue // as multipath does: the same on another path
			}
			return
		case errors.Is(err, replication.ErrReserved), errors.Is(err, replication.ErrNoClone):
			c.w.note("refused-"+err.Error(), uint64(c.id), uint64(vol), uint64(regs[0].no), uint64(cmd.regs[0].version))
			for _, t := range cmd.regs {
				if first && !c.busy { // else an attempt before this one may have taken effect
					t.reg.refused(t.version)
				}
			}
			return
		case errors.Is(err, replication.ErrMiscompare):
			c.w.fail("I2: volume %d block %d: COMPARE AND WRITE miscompares at %d although its only writer knows the content", vol, regs[0].no, r.Miscompare)
			return
		case errors.Is(err, replication.ErrMedium) && c.w.rot:
			c.w.note("medium", uint64(c.id), uint64(vol), uint64(regs[0].no), uint64(cmd.regs[0].version))
			return // beyond repair just now: an error, and never wrong data (I10)
		default:
			c.w.fail("volume %d block %d: operation %d failed: %v", vol, regs[0].no, mk().Op, err)
			return
		}
	}
}

func off(r *register) uint64 { return uint64(r.no) * blockBytes }

func (c *client) write(v int) {
	regs := c.some(v)
	contents, data := c.contents(regs)
	atomic, fua := c.r.chance(0.3), c.w.ram[v] && c.r.chance(0.15)
	c.change(regs, contents, func() *replication.Request {
		return &replication.Request{Op: replication.OpWrite, Off: off(regs[0]), Len: uint64(len(data)), Data: data, Atomic: atomic, FUA: fua}
	})
}

// rewrite is what an administrator does when blocks are lost (Y8): it replaces a whole
// run of them.
func (c *client) rewrite(v int) {
	regs := c.regs[v][c.r.n(2)*8:][:8]
	contents, data := c.contents(regs)
	c.change(regs, contents, func() *replication.Request {
		return &replication.Request{Op: replication.OpWrite, Off: off(regs[0]), Len: uint64(len(data)), Data: data}
	})
}

func (c *client) unmap(v int) {
	regs := c.some(v)
	contents := make([][]byte, len(regs))
	for i := range regs {
		contents[i] = hole
	}
	c.change(regs, contents, func() *replication.Request {
		return &replication.Request{Op: replication.OpUnmap, Off: off(regs[0]), Len: uint64(len(regs)) * blockBytes}
	})
}

func (c *client) same(v int) {
	regs := c.some(v)
	contents := make([][]byte, len(regs))
	data := c.content()
	for i := range regs {
		contents[i] = data
	}
	c.change(regs, contents, func() *replication.Request {
		return &replication.Request{Op: replication.OpWriteSame, Off: off(regs[0]), Len: uint64(len(regs)) * blockBytes, Data: data}
	})
}

// known reads registers until the client knows their contents.
func (c *client) known(regs []*register) ([][]byte, bool) {
	for range 20 {
		out := make([][]byte, 0, len(regs))
		for _, r := range regs {
			if d, ok := r.settled(); ok {
				out = append(out, d)
			}
		}
		if len(out) == len(regs) {
			return out, true
		}
		if !c.read(regs, true) {
			return nil, false
		}
	}
	return nil, false
}

// ragged writes, unmaps or merges sectors inside a block.
func (c *client) ragged(v int) {
	regs := c.some(v)[:1]
	old, ok := c.known(regs)
	if !ok {
		return
	}
	first := c.r.n(8)
	n := 1 + c.r.n(8-first)
	data := stamp(c.r.u64(), true)[:n*512]
	op := []replication.RequestOp{replication.OpWrite, replication.OpUnmap, replication.OpOrWrite, replication.OpWriteSame}[c.r.n(4)]
	plain := append([]byte(nil), old[0]...)
	part := plain[first*512:][:n*512]
	switch op {
	case replication.OpWrite:
		copy(part, data)
	case replication.OpUnmap:
		clear(part)
	case replication.OpOrWrite:
		for i := range part {
			part[i] |= data[i]
		}
	case replication.OpWriteSame:
		for i := range n {
			copy(part[i*512:], data[:512])
		}
	}
	c.change(regs, [][]byte{plain}, func() *replication.Request {
		r := &replication.Request{Op: op, Off: off(regs[0]) + uint64(first)*512, Len: uint64(n) * 512}
		switch op {
		case replication.OpWrite, replication.OpOrWrite:
			r.Data = data
		case replication.OpWriteSame:
			r.Data = data[:512]
		}
		return r
	})
}

// compare is a COMPARE AND WRITE of a block that nobody else writes.
func (c *client) compare(v int) {
	regs := c.some(v)[:1]
	old, ok := c.known(regs)
	if !ok {
		return
	}
	both := make([]byte, 2*blockBytes)
	data := both[blockBytes:]
	c.invent(data)
	copy(both, old[0])
	c.change(regs, [][]byte{data}, func() *replication.Request {
		return &replication.Request{Op: replication.OpCompareAndWrite, Off: off(regs[0]), Len: blockBytes, Data: both}
	})
}

// clone copies a run by reference, inside a volume or from another.
func (c *client) clone(v int) {
	from := 1 + c.r.n(c.w.volumes())
	src, dst := c.some(from), c.some(v)
	n := min(len(src), len(dst))
	src, dst = src[:n], dst[:n]
	contents, ok := c.known(src)
	if !ok {
		return
	}
	c.change(dst, contents, func() *replication.Request {
		return &replication.Request{Op: replication.OpClone, Off: off(dst[0]), Len: uint64(n) * blockBytes, Source: lsfs.VolumeID(from), SourceOff: off(src[0])}
	})
}

// read reads consecutive registers and checks them.
func (c *client) read(regs []*register, own bool) bool {
	begins := make([]begin, len(regs))
	for {
		for i, r := range regs {
			begins[i] = r.begin()
		}
		r, err := c.do(regs[0].vol, func() *replication.Request {
			size := len(regs) * blockBytes
			if c.room == nil {
				c.room = make([]byte, runBlocks*blockBytes)
			}
			data := c.room[:size]
			c.room = nil // whoever answers late still writes there
			return &replication.Request{Op: replication.OpRead, Off: off(regs[0]), Len: uint64(size), Data: data}
		})
		switch {
		case err == nil:
			for i, x := range regs {
				x.read(c.w, begins[i], r.Data[i*blockBytes:][:blockBytes], own, c.id)
			}
			c.w.note("read", uint64(c.id), uint64(regs[0].vol), uint64(regs[0].no), uint64(len(regs)), sum(r.Data))
			c.room = r.Data[:cap(r.Data)]
			return true
		case c.w.over():
			return false
		case errors.Is(err, errLost):
		case errors.Is(err, replication.ErrMedium) && c.w.rot:
			return false
		default:
			c.w.fail("volume %d block %d: a read failed: %v", regs[0].vol, regs[0].no, err)
			return false
		}
	}
}

func (c *client) readOwn(v int) { c.read(c.some(v), true) }

func (c *client) observe(v int) {
	other := c.w.clients[c.r.n(len(c.w.clients))]
	for range 3 {
		if other.current.Load() == nil { // rather one that writes
			other = c.w.clients[c.r.n(len(c.w.clients))]
		}
	}
	if other == c {
		c.readOwn(v)
		return
	}
	if cmd := other.current.Load(); cmd != nil && c.r.chance(0.7) {
		c.read([]*register{cmd.regs[c.r.n(len(cmd.regs))].reg}, false) // what is just being written
		return
	}
	half := other.regs[v][c.r.n(2)*8:][:8]
	n := 1 + c.r.n(8)
	c.read(half[:n], false)
}

// lock takes and releases a lock that all clients share, with COMPARE AND WRITE on a
// sector, as clusters of hosts do. Its content is the token of the holder, 0 when free.
func (c *client) lock(v int) {
	w := c.w
	l := &w.lockOf[v]
	at := uint64(lockBlock) * blockBytes
	sector := func(token uint64) []byte {
		b := make([]byte, 512)
		binary.LittleEndian.PutUint64(b, token)
		return b
	}
	look := func() (uint64, bool) {
		for !w.over() {
			r, err := c.do(lsfs.VolumeID(v), func() *replication.Request {
				return &replication.Request{Op: replication.OpRead, Off: at, Len: 512, Data: make([]byte, 512)}
			})
			if err == nil {
				token := binary.LittleEndian.Uint64(r.Data)
				if c.lockDead[token] {
					w.fail("I13: volume %d: client %d finds token %d, which it had given up and seen without effect", v, c.id, token)
				}
				return token, true
			}
			if !errors.Is(err, errLost) {
				return 0, false
			}
		}
		return 0, false
	}
	swap := func(old, new uint64) (done, known bool) {
		_, err := c.do(lsfs.VolumeID(v), func() *replication.Request {
			return &replication.Request{Op: replication.OpCompareAndWrite, Off: at, Len: 512, Data: append(sector(old), sector(new)...)}
		})
		return err == nil, err == nil || errors.Is(err, replication.ErrMiscompare) || errors.Is(err, replication.ErrReserved)
	}
	token, ok := look()
	if !ok || token != 0 {
		return
	}
	c.lockSeq++
	mine := uint64(c.id+1)<<32 | c.lockSeq
	done, known := swap(0, mine)
	if !known {
		if token, ok = look(); !ok {
			return
		}
		done = token == mine
	}
	if !done {
		c.lockDead[mine] = true
		return
	}
	l.Lock()
	if l.holder != 0 {
		w.fail("I2: volume %d: clients %d and %d hold the same lock", v, l.holder-1, c.id)
	}
	l.holder = c.id + 1
	l.Unlock()
	w.note("locked", uint64(c.id), uint64(v), c.lockSeq)
	time.Sleep(c.r.exp(100 * time.Millisecond))
	l.Lock()
	l.holder = 0
	l.Unlock()
	for !w.over() {
		done, known = swap(mine, 0)
		if done {
			break
		}
		if token, ok = look(); ok && token != mine {
			break // released by a command whose answer was lost
		}
		if known && ok { // fenced
			time.Sleep(c.r.between(100*time.Millisecond, time.Second))
		}
	}
}
