//go:build e2e

package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/twinsan/twinsan/tests/initiator"
)

// host is an initiator with a path to each node. It keeps one session at a time
// and takes the next path when that one fails, as a multipath driver does.
type host struct {
	r     *rig
	name  string
	isid  [6]byte
	lun   int
	nodes []string // by preference
	conn  *initiator.Conn
	at    int // index of the path in use
}

func (r *rig) host(name string, lun int, nodes ...string) *host {
	h := &host{r: r, name: "iqn.2026-11.test:" + name, isid: [6]byte{0x40, 0, 0, 1}, lun: lun, nodes: nodes}
	r.Cleanup(h.close)
	return h
}

func (h *host) close() {
	if h.conn != nil {
		h.conn.Close()
		h.conn = nil
	}
}

// errOutcome: the session was lost while the command was under way; it may or
// may not have taken effect.
var errOutcome = errors.New("the outcome of the command is not known")

const (
	statusGood     = 0x00
	statusCheck    = 0x02
	statusBusy     = 0x08
	statusConflict = 0x18
	statusSetFull  = 0x28
	statusAborted  = 0x40
)

// connect logs in on the path in use, or on the next one that works.
func (h *host) connect(ctx context.Context) error {
	for ctx.Err() == nil {
		if h.conn != nil {
			return nil
		}
		if h.r.inside == nil {
			h.r.must(h.r.c.Reload(), "demo.json")
		}
		node := h.r.c.Node(h.nodes[h.at])
		dial, cancel := context.WithTimeout(ctx, 3*time.Second)
		isid := h.isid
		isid[5] = byte(h.at + 1)
		conn, err := h.r.dial(dial, initiator.Config{Addr: node.Portal, InitiatorName: h.name, TargetName: h.r.c.Target, ISID: isid})
		cancel()
		if err == nil {
			h.conn = conn
			return nil
		}
		h.at = (h.at + 1) % len(h.nodes)
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

// dial logs in from where the initiators are.
func (r *rig) dial(ctx context.Context, c initiator.Config) (conn *initiator.Conn, err error) {
	if r.inside == nil {
		return initiator.Dial(ctx, c)
	}
	r.must(r.inside(func() { conn, err = initiator.Dial(ctx, c) }), "network of the initiators")
	return conn, err
}

// do runs a command once it can be run. Unit attentions, BUSY and paths in
// transition are repeated. A lost session is errOutcome.
func (h *host) do(ctx context.Context, cdb, out []byte, in int) (*initiator.Result, []byte, error) {
	for {
		if err := h.connect(ctx); err != nil {
			return nil, nil, err
		}
		data := make([]byte, in)
		one, cancel := context.WithTimeout(ctx, 20*time.Second)
		res, err := h.conn.Do(one, &initiator.Command{LUN: initiator.LUN(uint16(h.lun)), CDB: cdb, Out: out, In: data})
		cancel()
		if err != nil {
			if ctx.Err() != nil {
				return nil, nil, ctx.Err()
			}
			h.close()
			h.at = (h.at + 1) % len(h.nodes)
			return nil, nil, fmt.Errorf("%w: %w", errOutcome, err)
		}
		key, asc, ascq := res.SenseKey()
		switch {
		case res.Status == statusBusy, res.Status == statusSetFull:
		case res.Status == statusCheck && key == 6:
			continue
		case res.Status == statusCheck && key == 2 && asc == 4 && ascq >= 0x0a && ascq <= 0x0c:
			h.close() // this path cannot: take the other
			h.at = (h.at + 1) % len(h.nodes)
		default:
			return res, data[:res.Received], nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
}

// good runs a command that may be repeated and must end well.
func (h *host) good(what string, cdb, out []byte, in int) []byte {
	h.r.Helper()
	res, data := h.result(what, cdb, out, in)
	if !res.OK() {
		h.r.Fatalf("%s of %s: %s", what, h.name, res)
	}
	return data
}

// result runs a command that may be repeated.
func (h *host) result(what string, cdb, out []byte, in int) (*initiator.Result, []byte) {
	h.r.Helper()
	ctx, cancel := context.WithTimeout(h.r.ctx, time.Minute)
	defer cancel()
	for {
		res, data, err := h.do(ctx, cdb, out, in)
		if err == nil {
			return res, data
		}
		if !errors.Is(err, errOutcome) {
			h.r.Fatalf("%s of %s: %v", what, h.name, err)
		}
	}
}

// Persistent reservations.
const (
	prRegister        = 0x00
	prReserve         = 0x01
	prClear           = 0x03
	prPreemptAbort    = 0x05
	prRegisterIgnore  = 0x06
	prReadKeys        = 0x00
	prReadReservation = 0x01

	prWriteExclusiveRegistrants = 5
)

// prOut is PERSISTENT RESERVE OUT with its parameter list.
func prOut(action, kind byte, key, serviceKey uint64) (cdb, list []byte) {
	cdb = []byte{0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0}
	list = make([]byte, 24)
	binary.BigEndian.PutUint64(list, key)
	binary.BigEndian.PutUint64(list[8:], serviceKey)
	if action == prRegister || action == prRegisterIgnore {
		list[20] = 1 // APTPL
	}
	return cdb, list
}

func prIn(action byte) []byte { return []byte{0x5e, action, 0, 0, 0, 0, 0, 0x10, 0, 0} }

// register puts a key on the path in use, whatever was there.
func (h *host) register(key uint64) {
	h.r.Helper()
	cdb, list := prOut(prRegisterIgnore, 0, 0, key)
	h.good("REGISTER AND IGNORE", cdb, list, 0)
}

// keys are the registered keys, in the order of the reply.
func (h *host) keys() []uint64 {
	h.r.Helper()
	b := h.good("READ KEYS", prIn(prReadKeys), nil, 4096)
	var keys []uint64
	for b = b[8:]; len(b) >= 8; b = b[8:] {
		keys = append(keys, binary.BigEndian.Uint64(b))
	}
	return keys
}

// reservation is the holder's key and the type, 0 without one.
func (h *host) reservation() (key uint64, kind byte) {
	h.r.Helper()
	b := h.good("READ RESERVATION", prIn(prReadReservation), nil, 4096)
	if len(b) < 24 {
		return 0, 0
	}
	return binary.BigEndian.Uint64(b[8:]), b[21] & 0xf
}
