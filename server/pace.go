package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// deviceUse is what replication judges the devices of this node by.
func (n *Node) deviceUse() []replication.DeviceUse {
	list := n.store.Devices()
	out := make([]replication.DeviceUse, 0, len(list))
	for i := range list {
		d, u := &list[i], &list[i].Usage
		out = append(out, replication.DeviceUse{
			Name: d.Path, Capacity: d.Class == lsfs.Capacity, Writes: u.Writes, Flushes: u.Flushes, WriteWait: u.WriteWait, FlushWait: u.FlushWait,
		})
	}
	return out
}

// probeLog makes the log write and flush: it stores what is stored already.
func (n *Node) probeLog(ctx context.Context) error {
	for _, id := range n.store.Volumes() {
		v := n.store.Volume(id)
		if v == nil {
			continue
		}
		if err := v.UpdateMeta(ctx, func(*lsfs.Meta) {}); !errors.Is(err, lsfs.ErrNoVolume) {
			return err
		}
	}
	return nil
}

// paces are the devices and links of this node as they are judged; nil before it serves.
func (n *Node) paces() []replication.Pace {
	if parts := n.serving.Load(); parts != nil {
		return parts.replication.Paces()
	}
	return nil
}

func (n *Node) deviceSlow(path string) bool {
	for _, p := range n.paces() {
		if p.Device == path {
			return p.Slow
		}
	}
	return false
}

// linkProblems are the links of the node that is asked.
func linkProblems(self string, paces []replication.Pace, name func(replication.NodeID) string) (list []Problem) {
	for _, p := range paces {
		if p.Device == "" && p.Slow {
			list = append(list, Problem{Healthy, "link-slow",
				fmt.Sprintf("the sync link between nodes %s and %s is slow: %s a round trip, usual are %s", self, name(p.Peer), p.Now.Round(100*time.Microsecond), p.Usual.Round(100*time.Microsecond)),
				"every write waits for it", "look at cables, switch ports and their error counters; see docs/operations.md, Slow disks and links"})
		}
	}
	return list
}

// paces sends how fast devices and links are.
func (m metricSink) paces(list []replication.Pace, name func(replication.NodeID) string) {
	for _, p := range list {
		slow, seconds, label := descDevSlow, descDevPace, p.Device
		if p.Device == "" {
			slow, seconds, label = descLinkSlow, descLinkPace, name(p.Peer)
		}
		m.gauge(slow, flag(p.Slow), label)
		m.gauge(seconds, p.Now.Seconds(), label, "now")
		m.gauge(seconds, p.Usual.Seconds(), label, "usual")
	}
}
