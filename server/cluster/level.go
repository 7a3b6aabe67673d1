package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/twinsan/twinsan/replication"
)

// The feature level of a cluster says what its replicated formats may hold. It is
// raised by an administrator, when every node runs a program that knows the new
// one, and never falls. Until then nodes write what the version before reads, so
// that nodes of two versions work side by side.
//
//	1  encodings 1 and 2
//	2  encoding 3: replicas that are added, removed and moved; modes of nodes;
//	   settings; preferred owners; promotion by force; snapshots
//	3  encoding 4: the rate of resyncs
//	4  encoding 5: a management address of its own for a node; the write policy
//	   mirrored-ram
//	5  pools with groups of cold blocks (root version 5)
const (
	// FeatureLevel is the highest level that this program knows. A node refuses to
	// run in a cluster of a higher one.
	FeatureLevel = 5
	// levelReplicas is the level of everything in encoding 3.
	levelReplicas = 2
	// levelResync is the level of everything in encoding 4.
	levelResync = 3
	// levelNetworks is the level of everything in encoding 5.
	levelNetworks = 4
	// LevelGroups is the level from which on nodes write pools that programs of lower
	// levels do not open.
	LevelGroups = 5
)

// encoding is the version in which this state is written: a cluster of a lower
// level may have members that know no newer one.
func (s *State) encoding() byte { return encodingOf(s.Cluster.FeatureLevel) }

func encodingOf(level uint32) byte {
	switch {
	case level >= levelNetworks:
		return 5
	case level >= levelResync:
		return 4
	case level >= levelReplicas:
		return 3
	}
	return 2
}

// needsLevel is the level that a command needs.
func needsLevel(x command) uint32 {
	switch x.(type) {
	case *cmdInit, *cmdRaiseLevel: // the first says the level, and the other changes it
		return 1
	}
	switch version := oldestVersion(x); {
	case version >= 5:
		return levelNetworks
	case version >= 4:
		return levelResync
	case version >= 3:
		return levelReplicas
	}
	return 1
}

func tooLow(need, level uint32) string {
	return fmt.Sprintf("this needs feature level %d, and the cluster has level %d\n  when all nodes run this version: twinsan upgrade plan", need, level)
}

func (e *edit) level() uint32 { return e.s.Cluster.FeatureLevel }

// encodeMessage encodes what another node is told: in a form that it knows.
func (c *Cluster) encodeMessage(v walker) ([]byte, error) {
	return encodeVersion(v, c.State().encoding())
}

// decodeMessage is its inverse. The other node may know of a higher level already,
// or not yet; a newer form only adds at its end, so that one length fits one form.
func decodeMessage(b []byte, v walker) error {
	var err error
	for version := byte(codecVersion); version >= 2; version-- {
		if err = decodeVersion(b, version, v); err == nil {
			return nil
		}
	}
	return err
}

// LevelOf asks a node which feature level its program knows.
func (c *Cluster) LevelOf(ctx context.Context, n replication.NodeID) (uint32, error) {
	if n == c.id.Node {
		return FeatureLevel, nil
	}
	b, _, err := c.call(ctx, n, rpcLevel, nil)
	switch {
	case errors.Is(err, ErrRefused):
		return 1, nil // a program of before knows no such question
	case err != nil:
		return 0, err
	case len(b) != 4:
		return 0, errEncoding
	}
	return binary.BigEndian.Uint32(b), nil
}

// Readiness is whether a node can go to a higher level.
type Readiness struct {
	Node    replication.NodeID
	Version string // of the program
	Level   uint32 // that it knows; 0: it does not answer
	Err     error  // why it does not
}

// Readiness asks all members.
func (c *Cluster) Readiness(ctx context.Context) []Readiness {
	var list []Readiness
	for _, n := range c.State().Nodes {
		once, cancel := context.WithTimeout(ctx, pingMax)
		level, err := c.LevelOf(once, n.ID)
		cancel()
		list = append(list, Readiness{n.ID, n.Version, level, err})
	}
	return list
}

// RaiseLevel raises the feature level of the cluster. It is refused (ErrRefused)
// while some member does not answer, or runs a program that does not know it.
// There is no way back.
func (c *Cluster) RaiseLevel(ctx context.Context, level uint32) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	state, err := c.Sync(ctx)
	if err != nil {
		return err
	}
	var missing []string
	for _, r := range c.Readiness(ctx) {
		switch {
		case r.Err != nil:
			missing = append(missing, "node "+state.NodeName(r.Node)+" does not answer")
		case r.Level < level:
			missing = append(missing, fmt.Sprintf("node %s runs version %s, which knows level %d", state.NodeName(r.Node), r.Version, r.Level))
		}
	}
	if len(missing) > 0 {
		return errorf(ErrRefused, "level %d must be known to every node: %s\n  see: twinsan upgrade plan", level, strings.Join(missing, "; "))
	}
	x := &cmdRaiseLevel{Level: level}
	for _, n := range state.Nodes {
		x.Asked = append(x.Asked, asked{n.ID, n.Incarnation})
	}
	_, err = c.proposeSync(ctx, x)
	return err
}

// asked is a node that knows the level, in the start that was asked.
type asked struct {
	Node        replication.NodeID
	Incarnation replication.Incarnation
}

// cmdRaiseLevel raises the feature level.
type cmdRaiseLevel struct {
	Level uint32
	Asked []asked
}

func (*cmdRaiseLevel) kind() kind { return kindRaiseLevel }
func (x *cmdRaiseLevel) walk(c *codec) {
	u32(c, &x.Level)
	list(c, &x.Asked, func(c *codec, a *asked) {
		u32(c, &a.Node)
		u64(c, &a.Incarnation)
	})
}

func (x *cmdRaiseLevel) apply(e *edit) result {
	s := e.s
	switch {
	case x.Level > FeatureLevel:
		return refuse(codeRefused, "level %d is not known to this version", x.Level)
	case x.Level <= s.Cluster.FeatureLevel:
		return result{}
	}
	if r := x.unasked(s); r.Code != codeOK {
		return r
	}
	s.Cluster.FeatureLevel = x.Level
	e.event(Warning, "level-raised", "the feature level of the cluster is %d; versions that do not know it cannot run any more", x.Level)
	return result{}
}

// unasked refuses while some member may run another program than was asked.
func (x *cmdRaiseLevel) unasked(s *State) result {
	for _, n := range s.Nodes {
		if !slices.Contains(x.Asked, asked{n.ID, n.Incarnation}) {
			return refuse(codeRefused, "node %s was started or joined meanwhile: ask again", n.Name)
		}
	}
	return result{}
}

// mayAppend keeps a command out of the log that some member could not read: a node
// stops at what it does not know.
func (c *Cluster) mayAppend(x command) error {
	s := c.State()
	if s.Cluster.Name == "" {
		return nil
	}
	if raise, ok := x.(*cmdRaiseLevel); ok {
		r := raise.unasked(s)
		return r.err()
	}
	if need := needsLevel(x); need > s.Cluster.FeatureLevel {
		return errorf(ErrRefused, "%s", tooLow(need, s.Cluster.FeatureLevel))
	}
	return nil
}
