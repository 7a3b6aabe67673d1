package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/tests/initiator"
)

// cost is a feature of the target that should cost no more than what it is held
// against. Both are measured with the initiator of tests/initiator, which the
// load generator cannot replace here; its own work is part of both.
type cost struct {
	name    string
	against string // name of another one; "" for a base
	keys    []initiator.Key
	out, in int // bytes
	cdb     func(n uint64) []byte
	fill    func(n uint64, out []byte) // sets what the target must find
	set     func(context.Context, *costRun) error
}

const costBlocks = 1024 // 4 KiB blocks of the range that is used

func lba(n uint64) uint64 { return n % costBlocks * 8 }

func scsi16(op byte, lba uint64, blocks uint32) []byte {
	c := make([]byte, 16)
	c[0] = op
	binary.BigEndian.PutUint64(c[2:], lba)
	binary.BigEndian.PutUint32(c[10:], blocks)
	return c
}

var crc = []initiator.Key{{Name: "HeaderDigest", Value: "CRC32C"}, {Name: "DataDigest", Value: "CRC32C"}}

func costs() []cost {
	write := func(n uint64) []byte { return scsi16(0x8a, lba(n), 8) }
	read := func(n uint64) []byte { return scsi16(0x88, lba(n), 8) }
	content := func(n uint64, out []byte) { binary.BigEndian.PutUint64(out, n%costBlocks+1) }
	return []cost{
		{name: "4K write", out: 4096, cdb: write, fill: content},
		{name: "COMPARE AND WRITE of 4K", against: "4K write", out: 8192,
			cdb: func(n uint64) []byte { return initiator.CompareAndWrite(lba(n), 8) },
			fill: func(n uint64, out []byte) {
				content(n, out)
				content(n, out[4096:])
			}},
		{name: "4K write, CRC32C digests", against: "4K write", out: 4096, cdb: write, fill: content, keys: crc},
		{name: "4K read, cached", in: 4096, cdb: read},
		{name: "4K read, cached, CRC32C digests", against: "4K read, cached", in: 4096, cdb: read, keys: crc},
		{name: "4K read, cached, reserved by us", against: "4K read, cached", in: 4096, cdb: read, set: reserveFirst},
		{name: "PERSISTENT RESERVE OUT (new key)", against: "4K write", out: 24,
			cdb:  func(uint64) []byte { return []byte{0x5f, 6, 0, 0, 0, 0, 0, 0, 24, 0} },
			fill: func(n uint64, out []byte) { binary.BigEndian.PutUint64(out[8:], n+1) }},
	}
}

// reserveFirst registers and reserves, so that every command is checked against a reservation.
func reserveFirst(ctx context.Context, r *costRun) error {
	key := make([]byte, 24)
	binary.BigEndian.PutUint64(key[8:], 77)
	if err := r.do(ctx, []byte{0x5f, 6, 0, 0, 0, 0, 0, 0, 24, 0}, key); err != nil {
		return err
	}
	clear(key)
	binary.BigEndian.PutUint64(key, 77)
	return r.do(ctx, []byte{0x5f, 1, 5, 0, 0, 0, 0, 0, 24, 0}, key)
}

// costRun is one session that measures.
type costRun struct {
	conn *initiator.Conn
	lun  [8]byte
}

func (r *costRun) do(ctx context.Context, cdb, out []byte) error {
	for {
		res, err := r.conn.Do(ctx, &initiator.Command{LUN: r.lun, CDB: cdb, Out: out})
		if err != nil {
			return err
		}
		if key, _, _ := res.SenseKey(); res.Status == 2 && key == 6 {
			continue // unit attention
		}
		if !res.OK() {
			return errors.New(res.String())
		}
		return nil
	}
}

// dialCost logs in at an iscsi:// URL.
func dialCost(ctx context.Context, target string, keys []initiator.Key) (*costRun, error) {
	u, err := url.Parse(target)
	if err != nil {
		return nil, err
	}
	name, number, _ := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	lun, err := strconv.ParseUint(number, 10, 14)
	if err != nil {
		return nil, err
	}
	conn, err := initiator.Dial(ctx, initiator.Config{Addr: u.Host, TargetName: name, InitiatorName: "iqn.2026-11.io.twinsan:bench",
		ISID: [6]byte{0x40, 0, 0, 9}, Keys: initiator.WithKeys(keys...)})
	if err != nil {
		return nil, err
	}
	r := &costRun{conn: conn, lun: initiator.LUN(uint16(lun))}
	return r, r.do(ctx, initiator.TestUnitReady(), nil)
}

const costDepth = 16

// measureCost returns commands per second.
func (b *bench) measureCost(ctx context.Context, c *cost, target string) (float64, error) {
	r, err := dialCost(ctx, target, c.keys)
	if err != nil {
		return 0, err
	}
	defer r.conn.Close()
	if c.set != nil {
		if err := c.set(ctx, r); err != nil {
			return 0, err
		}
	}
	defer func() { // nobody else shall meet this key
		key := make([]byte, 24)
		_ = r.do(ctx, []byte{0x5f, 6, 0, 0, 0, 0, 0, 0, 24, 0}, key)
	}()
	end := time.Now().Add(b.runtime)
	var done atomic.Uint64
	var failed atomic.Pointer[error]
	var group sync.WaitGroup
	start := time.Now()
	for worker := range uint64(costDepth) {
		group.Go(func() {
			out, in := make([]byte, c.out), make([]byte, c.in)
			for n := worker; time.Now().Before(end) && failed.Load() == nil; n += costDepth {
				if c.fill != nil {
					c.fill(n, out)
				}
				res, err := r.conn.Do(ctx, &initiator.Command{LUN: r.lun, CDB: c.cdb(n), Out: out, In: in})
				if err == nil && !res.OK() {
					err = errors.New(res.String())
				}
				if err != nil {
					failed.Store(&err)
					return
				}
				done.Add(1)
			}
		})
	}
	group.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return float64(done.Load()) / time.Since(start).Seconds(), nil
}

// costTable measures what features cost, on twinsan and on the peer in turns.
func (b *bench) costTable(ctx context.Context) (string, error) {
	type place struct{ label, url string }
	var places []place
	for _, t := range b.targets() {
		if t.label == "twinsan" || t.label == "tgt, volatile cache" {
			places = append(places, place{t.label, t.url})
		}
	}
	all := costs()
	rates := map[string][]float64{}
	for range b.rounds {
		for i := range all {
			for _, p := range places {
				rate, err := b.measureCost(ctx, &all[i], p.url)
				if err != nil {
					b.say("%s on %s: %v", all[i].name, p.label, err)
				}
				rates[p.label+all[i].name] = append(rates[p.label+all[i].name], rate)
				b.say("%-34s %-20s %8.0f /s", all[i].name, p.label, rate)
			}
		}
	}
	median := func(key string) float64 {
		r := slices.Clone(rates[key])
		slices.Sort(r)
		return r[(len(r)-1)/2]
	}
	var t strings.Builder
	fmt.Fprintf(&t, "\nWhat features cost, %d commands in flight in one session, 0 where the target does not have it:\n\n| command |", costDepth)
	for _, p := range places {
		fmt.Fprintf(&t, " %s /s | of its base |", p.label)
	}
	t.WriteString("\n|---|" + strings.Repeat("--:|--:|", len(places)) + "\n")
	for i := range all {
		fmt.Fprintf(&t, "| %s |", all[i].name)
		for _, p := range places {
			rate, share := median(p.label+all[i].name), ""
			if all[i].against != "" {
				if base := median(p.label + all[i].against); base > 0 {
					share = fmt.Sprintf("%.2f", rate/base)
				}
			}
			fmt.Fprintf(&t, " %.0f | %s |", rate, share)
		}
		t.WriteString("\n")
	}
	return t.String(), nil
}
