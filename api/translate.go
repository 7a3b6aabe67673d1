package api

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server"
)

// enum turns a word of package server into the value of an enum with that
// prefix; a word that the enum lacks becomes its zero, "unspecified".
func enum[E ~int32](values map[string]int32, prefix, word string) E {
	return E(values[prefix+strings.ToUpper(word)])
}

// Word turns a value of an enum into the word of package server, which is also
// what people and scripts see; "unknown" for a value that this program does not know.
func Word(value interface{ String() string }, prefix string) string {
	word, ok := strings.CutPrefix(value.String(), prefix)
	if !ok || word == "UNSPECIFIED" {
		return "unknown"
	}
	return strings.ToLower(word)
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// Time is the time of an optional timestamp: zero when absent.
func Time(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func each[A, B any](list []A, f func(*A) B) []B {
	out := make([]B, len(list))
	for i := range list {
		out[i] = f(&list[i])
	}
	return out
}

func health(h server.Health) v1.Health {
	return enum[v1.Health](v1.Health_value, "HEALTH_", string(h))
}

func role(r server.Role) v1.Role { return enum[v1.Role](v1.Role_value, "ROLE_", string(r)) }

func statusMessage(s *server.Status) *v1.Status {
	return &v1.Status{
		Cluster: s.Cluster, Health: health(s.Health), AnsweredBy: s.AnsweredBy, Quorum: s.Quorum, Leader: s.Leader,
		Voters: uint32(s.Voters), VotersUp: uint32(s.VotersUp),
		Problems: each(s.Problems, func(p *server.Problem) *v1.Problem {
			return &v1.Problem{Severity: health(p.Severity), Code: p.Code, Cause: p.Cause, Risk: p.Risk, Remedy: p.Remedy}
		}),
		Nodes:      each(s.Nodes, nodeMessage),
		Volumes:    each(s.Volumes, volumeMessage),
		Operations: each(s.Operations, operationMessage),
		Risk: &v1.Risk{Survives: s.Risk.Survives, Text: s.Risk.Text, Stops: each(s.Risk.Stops, func(x *server.Stop) *v1.Stop {
			return &v1.Stop{Node: x.Node, Volumes: x.Volumes, Quorum: x.Quorum}
		})},
	}
}

func infoMessage(i *server.Info) *v1.ClusterInfo {
	return &v1.ClusterInfo{
		Name: i.Name, Uuid: i.UUID, Created: stamp(i.Created), Target: i.Target, FeatureLevel: uint32(i.FeatureLevel),
		Leader: i.Leader, Quorum: i.Quorum, Voters: uint32(i.Voters),
		Discovery:     enum[v1.DiscoveryMode](v1.DiscoveryMode_value, "DISCOVERY_MODE_", string(i.Discovery)),
		DiscoveryUser: i.DiscoveryUser, DiscoveryMutualUser: i.DiscoveryMutual,
		LevelKnown: uint32(i.LevelKnown), QuorumMode: enum[v1.QuorumMode](v1.QuorumMode_value, "QUORUM_MODE_", string(i.QuorumMode)),
		PreferredNode: i.Preferred, ResyncMibPerSecond: i.ResyncRate, Balance: i.Balance, BalanceAfter: durationpb.New(i.BalanceAfter),
		Portals: each(i.Portals, func(p *server.Portal) *v1.Portal {
			return &v1.Portal{Address: p.Address, Node: p.Node, Group: uint32(p.Group)}
		}),
	}
}

func nodeMessage(n *server.Member) *v1.Node {
	return &v1.Node{
		Id: uint32(n.ID), Name: n.Name, Role: role(n.Role),
		State:       enum[v1.NodeState](v1.NodeState_value, "NODE_STATE_", string(n.State)),
		SyncAddress: n.Sync, ManagementAddress: n.Management, Portals: n.Portals, ApiAddress: n.API, MetricsAddress: n.Metrics,
		Leader: n.Leader, Voter: n.Voter, Incarnation: n.Incarnation, Version: n.Version, Started: stamp(n.Started),
		Owns: uint32(n.Owns), InSync: uint32(n.InSync), Replicas: uint32(n.Replicas),
		Pool: poolMessage(n.Pool), Traffic: trafficMessage(&n.Traffic), Sessions: uint32(n.Sessions), Error: n.Error,
		Draining: n.Draining, Mode: enum[v1.NodeMode](v1.NodeMode_value, "NODE_MODE_", string(n.Mode)), EvacuateTo: n.EvacuateTo, ModeSince: stamp(n.ModeSince),
		Scrub: scrubMessage(n.Scrub),
	}
}

func poolMessage(p *server.Pool) *v1.Pool {
	if p == nil {
		return nil
	}
	m := &v1.Pool{SizeBytes: p.Size, LiveBytes: p.Live, GarbageBytes: p.Garbage, FreeBytes: p.Free,
		UsableBytes: p.Usable, MappedBytes: p.Mapped, StoredBytes: p.Stored,
		ReclaimBytes: p.Reclaim, WriteAmplification: p.WriteAmplification}
	for _, c := range p.Caches {
		m.Caches = append(m.Caches, &v1.Cache{Tier: c.Tier, Path: c.Path, Bytes: c.Bytes, CapacityBytes: c.Capacity, Hits: c.Hits, Misses: c.Misses,
			WrittenBytes: c.Written, Failure: c.Failure, Warming: c.Warming})
	}
	return m
}

func poolOf(p *v1.Pool) *server.Pool {
	if p == nil {
		return nil
	}
	x := &server.Pool{Size: p.SizeBytes, Live: p.LiveBytes, Garbage: p.GarbageBytes, Free: p.FreeBytes,
		Usable: p.UsableBytes, Mapped: p.MappedBytes, Stored: p.StoredBytes,
		Reclaim: p.ReclaimBytes, WriteAmplification: p.WriteAmplification}
	for _, c := range p.Caches {
		x.Caches = append(x.Caches, server.Cache{Tier: c.Tier, Path: c.Path, Bytes: c.Bytes, Capacity: c.CapacityBytes, Hits: c.Hits, Misses: c.Misses,
			Written: c.WrittenBytes, Failure: c.Failure, Warming: c.Warming})
	}
	return x
}

func trafficMessage(t *server.Traffic) *v1.Traffic {
	return &v1.Traffic{ReadOps: t.ReadOps, WriteOps: t.WriteOps, ReadBytes: t.ReadBytes, WriteBytes: t.WriteBytes}
}

func trafficOf(t *v1.Traffic) server.Traffic {
	return server.Traffic{ReadOps: t.GetReadOps(), WriteOps: t.GetWriteOps(), ReadBytes: t.GetReadBytes(), WriteBytes: t.GetWriteBytes()}
}

func deviceMessage(d *server.Device) *v1.Device {
	return &v1.Device{
		Node: d.Node, Path: d.Path, Uuid: d.UUID, SizeBytes: d.Size, State: d.State, DirectIo: d.DirectIO, Errors: d.Errors,
		Class: d.Class, LiveBytes: d.Live, FreeBytes: d.Free, DrainBytes: d.Drain, Stuck: d.Stuck,
		ReadNanoseconds: uint64(d.ReadLatency), WriteNanoseconds: uint64(d.WriteLatency), FlushNanoseconds: uint64(d.FlushLatency),
	}
}

func deviceOf(d **v1.Device) server.Device {
	m := *d
	return server.Device{
		Node: m.Node, Path: m.Path, UUID: m.Uuid, Size: m.SizeBytes, State: m.State, DirectIO: m.DirectIo, Errors: m.Errors,
		Class: m.Class, Live: m.LiveBytes, Free: m.FreeBytes, Drain: m.DrainBytes, Stuck: m.Stuck,
		ReadLatency: time.Duration(m.ReadNanoseconds), WriteLatency: time.Duration(m.WriteNanoseconds), FlushLatency: time.Duration(m.FlushNanoseconds),
	}
}

func replicaMessage(r *server.Replica) *v1.Replica {
	return &v1.Replica{
		Node: r.Node, State: enum[v1.ReplicaState](v1.ReplicaState_value, "REPLICA_STATE_", string(r.State)),
		Owner: r.Owner, ResyncDoneBytes: r.ResyncDone, ResyncTotalBytes: r.ResyncTotal,
		ResyncSentBytes: r.ResyncSent, ResyncLeft: span(r.ResyncLeft), OutOfSyncSince: stamp(r.Since),
	}
}

func replicaOf(r **v1.Replica) server.Replica {
	m := *r
	return server.Replica{Node: m.Node, State: server.ReplicaState(Word(m.State, "REPLICA_STATE_")), Owner: m.Owner,
		ResyncDone: m.ResyncDoneBytes, ResyncTotal: m.ResyncTotalBytes, ResyncSent: m.ResyncSentBytes, ResyncLeft: m.ResyncLeft.AsDuration(), Since: Time(m.OutOfSyncSince)}
}

func volumeMessage(v *server.Volume) *v1.Volume {
	return &v1.Volume{
		Id: uint64(v.ID), Name: v.Name, Uuid: v.UUID, Lun: uint32(v.LUN), Serial: v.Serial, Naa: v.NAA,
		SizeBytes: v.Size, LogicalBlockBytes: v.LogicalBlock, Dedup: v.Dedup, Compress: v.Compress, Thin: v.Thin,
		Hosts: v.Hosts, AnyHost: v.AnyHost, Created: stamp(v.Created),
		State: enum[v1.VolumeState](v1.VolumeState_value, "VOLUME_STATE_", string(v.State)),
		Epoch: v.Epoch, Owner: v.Owner, Replicas: each(v.Replicas, replicaMessage),
		MappedBytes: v.Mapped, Traffic: trafficMessage(&v.Traffic), ServedBy: v.ServedBy,
		PhysicalBlockBytes: v.PhysicalBlock, ReadOnlyHosts: v.ReadOnly, RoomBytes: v.Room, Paths: each(v.Paths, pathMessage),
		Counts: each(v.Counts, countMessage), Reservations: reservationsMessage(v.Reservations),
		Snapshots: uint32(v.Snapshots), Origin: v.Origin, Restoring: v.Restoring,
		PreferredNode: v.Preferred, Lineage: v.Lineage,
		Offloads: each(server.Offloads(v.Counts), func(o *server.Offload) *v1.Offload {
			return &v1.Offload{Name: o.Name, Used: o.Used, Refused: o.Refused}
		}),
	}
}

func hostMessage(h *server.Host) *v1.Host {
	return &v1.Host{Name: h.Name, Initiators: h.Initiators, ChapUser: h.CHAPUser, MutualUser: h.MutualUser, Volumes: h.Volumes, Paths: h.Paths}
}

func sessionMessage(s *server.Session) *v1.Session {
	return &v1.Session{
		Node: s.Node, Host: s.Host, Initiator: s.Initiator, Isid: s.ISID[:], Tsih: uint32(s.TSIH), Portal: s.Portal, Peer: s.Peer,
		Since: stamp(s.Since), Auth: s.Auth, Digests: s.Digests, Commands: s.Commands, BytesIn: s.BytesIn, BytesOut: s.BytesOut, Tasks: uint32(s.Tasks),
	}
}

func sessionOf(m **v1.Session) server.Session {
	s := *m
	out := server.Session{
		Node: s.Node, Host: s.Host, Initiator: s.Initiator, TSIH: uint16(s.Tsih), Portal: s.Portal, Peer: s.Peer,
		Since: Time(s.Since), Auth: s.Auth, Digests: s.Digests, Commands: s.Commands, BytesIn: s.BytesIn, BytesOut: s.BytesOut, Tasks: int(s.Tasks),
	}
	copy(out.ISID[:], s.Isid)
	return out
}

func unreachableMessage(u *server.Unreachable) *v1.Unreachable {
	return &v1.Unreachable{Node: u.Node, Error: u.Error}
}

func eventMessage(e *server.Event) *v1.Event {
	return &v1.Event{Number: e.Number, Time: stamp(e.Time), Severity: enum[v1.Severity](v1.Severity_value, "SEVERITY_", string(e.Severity)),
		Code: e.Code, Text: e.Text, Node: e.Node}
}

func reportMessage(r *server.Report) *v1.NodeReport {
	return &v1.NodeReport{
		Node: uint32(r.Node), Version: r.Version, Started: stamp(r.Started), Ready: r.Ready, Pool: poolMessage(r.Pool), Scrub: scrubMessage(r.Scrub),
		Devices: each(r.Devices, deviceMessage), Sessions: each(r.Sessions, sessionMessage),
		Volumes: each(r.Volumes, func(v *server.VolumeReport) *v1.VolumeReport {
			return &v1.VolumeReport{Id: uint64(v.ID), Role: v.Role, Owner: v.Owner, Epoch: uint64(v.Epoch), Served: v.Served, MappedBytes: v.Mapped,
				Traffic: trafficMessage(&v.Traffic), Replicas: each(v.Replicas, replicaMessage),
				RoomBytes: v.Room, Counts: each(v.Counts, countMessage), Reservations: reservationsMessage(v.Reservations), Standing: standingMessage(v.Standing)}
		}),
	}
}

func reportOf(m *v1.NodeReport) *server.Report {
	return &server.Report{
		Node: replication.NodeID(m.Node), Version: m.Version, Started: Time(m.Started), Ready: m.Ready, Pool: poolOf(m.Pool), Scrub: scrubOf(m.Scrub),
		Devices: each(m.Devices, deviceOf), Sessions: each(m.Sessions, sessionOf),
		Volumes: each(m.Volumes, func(v **v1.VolumeReport) server.VolumeReport {
			r := *v
			return server.VolumeReport{ID: lsfs.VolumeID(r.Id), Role: r.Role, Owner: r.Owner, Epoch: lsfs.Epoch(r.Epoch), Served: r.Served, Mapped: r.MappedBytes,
				Traffic: trafficOf(r.Traffic), Replicas: each(r.Replicas, replicaOf),
				Room: r.RoomBytes, Counts: each(r.Counts, countOf), Reservations: reservationsOf(r.Reservations), Standing: standingOf(r.Standing)}
		}),
	}
}

func digestMessage(d *server.Digest) *v1.ReplicaDigest {
	return &v1.ReplicaDigest{Node: d.Node, Digest: d.Sum, DifferentChunks: d.Different, Error: d.Error, DifferentSnapshots: d.Snapshots}
}

func digestOf(d **v1.ReplicaDigest) server.Digest {
	m := *d
	return server.Digest{Node: m.Node, Sum: m.Digest, Different: m.DifferentChunks, Error: m.Error, Snapshots: m.DifferentSnapshots}
}
