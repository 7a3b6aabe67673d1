package server

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
	"github.com/twinsan/twinsan/server/scsi"
)

const (
	levelInfo = slog.LevelInfo
	// spaceEvery is how often the fill of the pool is looked at. A pool fills at
	// some percent in a minute at worst.
	spaceEvery = time.Second
	// fillSlack is how far the fill must fall below a mark, in percent, before
	// reaching it again is news.
	fillSlack = 2
)

// fillMarks are the fills of a pool, in percent, that are worth an event.
var fillMarks = []int{70, 80, 90}

// levels are the fill of this node's pool as of the last look at it, in bytes.
type levels struct {
	live, usable   uint64
	mapped, stored uint64
}

// fillAlarm says which mark a fill has reached or left, each of them once.
type fillAlarm struct{ mark int }

// step takes the fill in percent and returns the mark that was reached (up) or
// that was left; 0: nothing new.
func (a *fillAlarm) step(percent int) (mark int, up bool) {
	reached := 0
	for _, m := range fillMarks {
		if percent >= m {
			reached = m
		}
	}
	switch {
	case reached > a.mark:
		a.mark = reached
		return reached, true
	case reached < a.mark && percent <= a.mark-fillSlack:
		left := a.mark
		a.mark = reached
		return left, false
	}
	return 0, false
}

// spaceWatch is owned by the goroutine that looks at the fill of the pool.
type spaceWatch struct {
	alarm fillAlarm
	last  levels
	room  map[replication.NodeID]uint64 // of other nodes' pools
}

// look reads the fill of the pool, reports marks that it passes, and when it or
// the room of another node has changed has every logical unit look at its space.
func (n *Node) look(w *spaceWatch) {
	parts := n.serving.Load()
	if parts == nil {
		return
	}
	room := n.store.Room()
	mapped, stored := n.store.Taken()
	now := levels{live: bytesOf(room.Live), usable: bytesOf(room.Usable), mapped: mapped * 4096, stored: bytesOf(stored)}
	n.levels.Store(&now)
	if now.usable > 0 {
		percent := int(now.live * 100 / now.usable)
		switch mark, up := w.alarm.step(percent); {
		case mark != 0 && up:
			level := slog.LevelWarn
			if mark >= 90 {
				level = slog.LevelError
			}
			n.journal.report(level, fmt.Sprintf("pool-%d", mark), fmt.Sprintf("pool of node %s is %d %% full (%s of %s): writes that need new space are refused when it is full", n.id.Name, percent, Size(now.live), Size(now.usable)))
		case mark != 0:
			n.journal.report(levelInfo, "pool-regained", fmt.Sprintf("pool of node %s is %d %% full, below %d %% again", n.id.Name, percent, mark))
		}
	}
	state := n.cluster.State()
	changed := now != w.last
	w.last = now
	for _, id := range state.DataNodes() {
		if _, free, known := parts.replication.Peer(id); known && w.room[id] != free {
			w.room[id], changed = free, true
		}
	}
	if !changed {
		return
	}
	for _, v := range state.Volumes {
		if !v.Record.Deleted {
			parts.scsi.SpaceChanged(v.LUN)
		}
	}
}

// space says how much room a volume has: in the pool of the in-sync copy that has
// the least. The own pool is known exactly (as of the last look), those of other
// nodes by what they told last. Shared is what deduplication and compression save
// in the whole pool, in proportion. It does no I/O.
func (n *Node) space(id lsfs.VolumeID) scsi.Space {
	l, parts := n.levels.Load(), n.serving.Load()
	v := n.cluster.State().Volume(id)
	if l == nil || parts == nil || v == nil {
		return scsi.Space{}
	}
	s := scsi.Space{Free: l.usable - min(l.live, l.usable)}
	for _, other := range v.Record.InSync {
		if _, free, known := parts.replication.Peer(other); known {
			s.Free = min(s.Free, free)
		}
	}
	s.Total = min(l.live, l.usable) + s.Free
	if c := n.store.Volume(id); c != nil {
		s.Used = c.MappedBlocks() * 4096
	}
	if l.mapped > l.stored {
		s.Shared = uint64(float64(s.Used) * float64(l.mapped-l.stored) / float64(l.mapped))
	}
	return s
}

// startWorkers starts what a data node does besides serving.
func (n *Node) startWorkers() {
	w := &spaceWatch{room: map[replication.NodeID]uint64{}}
	n.watch = newWorker(spaceEvery, func(context.Context) { n.look(w) })
	n.moves = newHostMoves()
	k := newKeeper()
	n.keeper = newWorker(keeperEvery, func(ctx context.Context) { n.keep(ctx, k, time.Now()) })
	d := &drainState{}
	n.drainer = newWorker(time.Second, func(ctx context.Context) { n.drain(ctx, d) })
	saved := n.store.Scrub().ScrubState
	n.saver = newWorker(scrubSaveEvery, func(context.Context) { n.saveScrub(&saved) })
	n.history.Store(readHistory(n.config.DataDir))
	n.notes = newWorker(historyEvery, func(context.Context) { n.note(time.Now()) })
	st := &stewardState{}
	n.steward = newWorker(stewardEvery, func(ctx context.Context) {
		n.stewardship(ctx, st)
		n.endSalvage(ctx)
	})
}

// redirect is where a login goes while this node is drained: a portal of a node
// that is linked, and stays.
func (n *Node) redirect(state *cluster.State, parts *serving) (string, bool) {
	self := state.Node(n.cluster.Self())
	if self == nil || !self.Draining || parts == nil {
		return "", false
	}
	for _, node := range state.Nodes {
		if node.Role != cluster.RoleData || !node.Stays() || node.ID == self.ID || len(node.Portals) == 0 {
			continue
		}
		if linked, _, _ := parts.replication.Peer(node.ID); linked {
			return node.Portals[0], true
		}
	}
	return "", false
}
