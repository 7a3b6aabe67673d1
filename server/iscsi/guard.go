package iscsi

import (
	"net/netip"
	"sync"
	"time"
)

// maxGuarded bounds the memory of failed logins. At the bound the entry whose
// minute is over soonest makes room.
const maxGuarded = 1024

// guard slows down guessing of secrets: it counts failed authentications per
// source address and initiator name.
type guard struct {
	mu       sync.Mutex
	failures map[guardKey]guardEntry
}

type guardKey struct {
	address   netip.Addr
	initiator string
}

type guardEntry struct {
	count int
	until time.Time // the count starts again then
}

// failed notes a failed authentication and returns how many there were within
// a minute.
func (g *guard) failed(address netip.Addr, initiator string, now time.Time) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	key := guardKey{address, initiator}
	e, ok := g.failures[key]
	if !ok || !now.Before(e.until) {
		e = guardEntry{until: now.Add(time.Minute)}
	}
	e.count++
	if g.failures == nil {
		g.failures = make(map[guardKey]guardEntry)
	}
	if !ok && len(g.failures) >= maxGuarded {
		g.evictLocked()
	}
	g.failures[key] = e
	return e.count
}

func (g *guard) evictLocked() {
	var oldest guardKey
	var at time.Time
	for k, e := range g.failures {
		if at.IsZero() || e.until.Before(at) {
			oldest, at = k, e.until
		}
	}
	delete(g.failures, oldest)
}

// sweep forgets what is over.
func (g *guard) sweep(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for k, e := range g.failures {
		if !now.Before(e.until) {
			delete(g.failures, k)
		}
	}
}
