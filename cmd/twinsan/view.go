package main

import (
	"encoding/hex"
	"time"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

// The views are the JSON of nodes, volumes and so on; see page for the promise.

type problemView struct {
	Severity string `json:"severity"`
	Code     string `json:"code"`
	Cause    string `json:"cause"`
	Risk     string `json:"risk"`
	Remedy   string `json:"do"`
}

type nodeView struct {
	ID          uint32      `json:"id"`
	Name        string      `json:"name"`
	Role        string      `json:"role"`
	State       string      `json:"state"`
	Leader      bool        `json:"leader"`
	Voter       bool        `json:"voter"`
	Sync        string      `json:"sync_address"`
	Management  string      `json:"management_address"`
	Portals     []string    `json:"portals"`
	API         string      `json:"api_address"`
	Metrics     string      `json:"metrics_address"`
	Version     string      `json:"software"`
	Started     *time.Time  `json:"started,omitempty"`
	Incarnation uint64      `json:"incarnation"`
	Owns        uint32      `json:"owns"`
	InSync      uint32      `json:"in_sync"`
	Replicas    uint32      `json:"replicas"`
	Sessions    uint32      `json:"sessions"`
	Pool        *poolView   `json:"pool,omitempty"`
	Traffic     trafficView `json:"traffic"`
	Draining    bool        `json:"draining"`
	Scrub       *scrubView  `json:"scrub,omitempty"`
	Mode        string      `json:"mode"`
	EvacuateTo  string      `json:"evacuate_to,omitempty"`
	ModeSince   *time.Time  `json:"mode_since,omitempty"`
	Error       string      `json:"error,omitempty"`
}

type poolView struct {
	Size    uint64      `json:"size_bytes"`
	Live    uint64      `json:"live_bytes"`
	Garbage uint64      `json:"garbage_bytes"`
	Free    uint64      `json:"free_bytes"`
	Usable  uint64      `json:"usable_bytes"`
	Mapped  uint64      `json:"mapped_bytes"`
	Stored  uint64      `json:"stored_bytes"`
	Savings float64     `json:"savings"` // mapped / stored; 0: nothing stored
	Caches  []cacheView `json:"caches"`
	Reclaim uint64      `json:"reclaim_bytes"` // of deleted volumes, not yet free
	Amp     float64     `json:"write_amplification"`
}

type cacheView struct {
	Tier     string  `json:"tier"`
	Path     string  `json:"path,omitempty"`
	Bytes    uint64  `json:"bytes"`
	Capacity uint64  `json:"capacity_bytes"`
	Hits     uint64  `json:"hits"`
	Misses   uint64  `json:"misses"`
	HitRate  float64 `json:"hit_rate"` // 0 to 1
	Written  uint64  `json:"written_bytes"`
	Failure  string  `json:"failure,omitempty"`
	Warming  bool    `json:"warming,omitempty"`
}

type trafficView struct {
	ReadOps    uint64 `json:"read_ops"`
	WriteOps   uint64 `json:"write_ops"`
	ReadBytes  uint64 `json:"read_bytes"`
	WriteBytes uint64 `json:"write_bytes"`
}

type replicaView struct {
	Node        string `json:"node"`
	State       string `json:"state"`
	Owner       bool   `json:"owner"`
	ResyncDone  uint64 `json:"resync_done_bytes"`
	ResyncTotal uint64 `json:"resync_total_bytes"`

	ResyncSent uint64     `json:"resync_sent_bytes"`
	ResyncLeft float64    `json:"resync_left_seconds,omitempty"`
	Since      *time.Time `json:"out_of_sync_since,omitempty"`
}

type volumeView struct {
	ID           uint64        `json:"id"`
	Name         string        `json:"name"`
	UUID         string        `json:"uuid"`
	LUN          uint32        `json:"lun"`
	Serial       string        `json:"serial"`
	NAA          string        `json:"naa"`
	Size         uint64        `json:"size_bytes"`
	LogicalBlock uint32        `json:"logical_block_bytes"`
	Dedup        bool          `json:"dedup"`
	Compress     bool          `json:"compress"`
	Thin         bool          `json:"thin"`
	Hosts        []string      `json:"hosts"`
	AnyHost      bool          `json:"any_host"`
	Created      *time.Time    `json:"created,omitempty"`
	State        string        `json:"state"`
	Epoch        uint64        `json:"epoch"`
	Owner        string        `json:"owner"`
	Replicas     []replicaView `json:"replicas"`
	ServedBy     []string      `json:"served_by"`
	Mapped       uint64        `json:"mapped_bytes"`
	Traffic      trafficView   `json:"traffic"`

	PhysicalBlock uint32            `json:"physical_block_bytes"`
	ReadOnlyHosts []string          `json:"read_only_hosts"`
	Paths         []pathView        `json:"paths"`
	Room          uint64            `json:"room_bytes"`
	Commands      []countView       `json:"commands"`
	Offloads      []offloadView     `json:"offloads"`
	Reservations  *reservationsView `json:"reservations,omitempty"`
	Snapshots     uint32            `json:"snapshots"`
	Origin        string            `json:"origin,omitempty"`
	Restoring     bool              `json:"restoring,omitempty"`

	Preferred string `json:"preferred_node,omitempty"`
	Lineage   string `json:"lineage,omitempty"`
}

type deviceView struct {
	Node     string `json:"node"`
	Path     string `json:"path"`
	UUID     string `json:"uuid"`
	Size     uint64 `json:"size_bytes"`
	State    string `json:"state"`
	DirectIO bool   `json:"direct_io"`
	Errors   uint64 `json:"errors"`
	Class    string `json:"class"`
	Live     uint64 `json:"live_bytes"`
	Free     uint64 `json:"free_bytes"`
	Drain    uint64 `json:"drain_bytes"` // what stood on it when its drain began
	Stuck    string `json:"stuck,omitempty"`
	// Means of the last few dozen operations.
	ReadSeconds  float64 `json:"read_seconds"`
	WriteSeconds float64 `json:"write_seconds"`
	FlushSeconds float64 `json:"flush_seconds"`
}

type unreachableView struct {
	Node  string `json:"node"`
	Error string `json:"error"`
}

type hostView struct {
	Name       string   `json:"name"`
	Initiators []string `json:"initiators"`
	CHAPUser   string   `json:"chap_user,omitempty"`
	MutualUser string   `json:"mutual_user,omitempty"`
	Volumes    []string `json:"volumes"`
	Paths      []string `json:"paths"`
}

type sessionView struct {
	Node      string     `json:"node"`
	Host      string     `json:"host"`
	Initiator string     `json:"initiator"`
	ISID      string     `json:"isid"`
	TSIH      uint32     `json:"tsih"`
	Portal    string     `json:"portal"`
	Peer      string     `json:"peer"`
	Since     *time.Time `json:"since,omitempty"`
	Auth      string     `json:"auth"`
	Digests   string     `json:"digests"`
	Commands  uint64     `json:"commands"`
	BytesIn   uint64     `json:"in_bytes"`
	BytesOut  uint64     `json:"out_bytes"`
	Tasks     uint32     `json:"tasks"`
}

type eventView struct {
	Number   uint64    `json:"number"`
	Time     time.Time `json:"time"`
	Severity string    `json:"severity"`
	Code     string    `json:"code"`
	Node     string    `json:"node"`
	Text     string    `json:"text"`
}

func views[A, B any](list []A, f func(A) B) []B {
	out := make([]B, 0, len(list))
	for _, a := range list {
		out = append(out, f(a))
	}
	return out
}

func words(list []string) []string { return append([]string{}, list...) }

func moment(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC().Truncate(time.Millisecond)
	return &t
}

func since(t *time.Time) string {
	if t == nil {
		return ""
	}
	return clock(*t)
}

func viewProblem(p *v1.Problem) problemView {
	return problemView{api.Word(p.Severity, "HEALTH_"), p.Code, p.Cause, p.Risk, p.Remedy}
}

func viewNode(n *v1.Node) nodeView {
	v := nodeView{
		ID: n.Id, Name: n.Name, Role: api.Word(n.Role, "ROLE_"), State: api.Word(n.State, "NODE_STATE_"),
		Leader: n.Leader, Voter: n.Voter, Sync: n.SyncAddress, Management: n.ManagementAddress, Portals: words(n.Portals), API: n.ApiAddress, Metrics: n.MetricsAddress,
		Version: n.Version, Started: moment(api.Time(n.Started)), Incarnation: n.Incarnation,
		Owns: n.Owns, InSync: n.InSync, Replicas: n.Replicas, Sessions: n.Sessions, Traffic: viewTraffic(n.Traffic), Error: n.Error,
		Draining: n.Draining, Mode: api.Word(n.Mode, "NODE_MODE_"), EvacuateTo: n.EvacuateTo, ModeSince: moment(api.Time(n.ModeSince)),
	}
	if n.Scrub != nil {
		s := viewScrub(n.Scrub)
		v.Scrub = &s
	}
	if p := n.Pool; p != nil {
		v.Pool = &poolView{Size: p.SizeBytes, Live: p.LiveBytes, Garbage: p.GarbageBytes, Free: p.FreeBytes,
			Usable: p.UsableBytes, Mapped: p.MappedBytes, Stored: p.StoredBytes, Reclaim: p.ReclaimBytes, Amp: p.WriteAmplification}
		if p.StoredBytes > 0 {
			v.Pool.Savings = float64(p.MappedBytes) / float64(p.StoredBytes)
		}
		v.Pool.Caches = []cacheView{}
		for _, c := range p.Caches {
			x := cacheView{Tier: c.Tier, Path: c.Path, Bytes: c.Bytes, Capacity: c.CapacityBytes, Hits: c.Hits, Misses: c.Misses,
				Written: c.WrittenBytes, Failure: c.Failure, Warming: c.Warming}
			if all := c.Hits + c.Misses; all > 0 {
				x.HitRate = float64(c.Hits) / float64(all)
			}
			v.Pool.Caches = append(v.Pool.Caches, x)
		}
	}
	return v
}

func viewTraffic(t *v1.Traffic) trafficView {
	return trafficView{t.GetReadOps(), t.GetWriteOps(), t.GetReadBytes(), t.GetWriteBytes()}
}

func viewVolume(v *v1.Volume) volumeView {
	return volumeView{
		ID: v.Id, Name: v.Name, UUID: v.Uuid, LUN: v.Lun, Serial: v.Serial, NAA: v.Naa, Size: v.SizeBytes, LogicalBlock: v.LogicalBlockBytes,
		Dedup: v.Dedup, Compress: v.Compress, Thin: v.Thin, Hosts: words(v.Hosts), AnyHost: v.AnyHost, Created: moment(api.Time(v.Created)),
		State: api.Word(v.State, "VOLUME_STATE_"), Epoch: v.Epoch, Owner: v.Owner,
		Replicas: views(v.Replicas, func(r *v1.Replica) replicaView {
			return replicaView{r.Node, api.Word(r.State, "REPLICA_STATE_"), r.Owner, r.ResyncDoneBytes, r.ResyncTotalBytes,
				r.ResyncSentBytes, r.ResyncLeft.AsDuration().Seconds(), moment(api.Time(r.OutOfSyncSince))}
		}),
		ServedBy: words(v.ServedBy), Mapped: v.MappedBytes, Traffic: viewTraffic(v.Traffic),
		PhysicalBlock: v.PhysicalBlockBytes, ReadOnlyHosts: words(v.ReadOnlyHosts), Room: v.RoomBytes, Paths: views(v.Paths, viewPath),
		Commands: views(v.Counts, viewCount), Offloads: views(v.Offloads, viewOffload), Reservations: viewReservations(v.Reservations),
		Snapshots: v.Snapshots, Origin: v.Origin, Restoring: v.Restoring,
		Preferred: v.PreferredNode, Lineage: v.Lineage,
	}
}

func viewDevice(d *v1.Device) deviceView {
	return deviceView{
		Node: d.Node, Path: d.Path, UUID: d.Uuid, Size: d.SizeBytes, State: d.State, DirectIO: d.DirectIo, Errors: d.Errors,
		Class: d.Class, Live: d.LiveBytes, Free: d.FreeBytes, Drain: d.DrainBytes, Stuck: d.Stuck,
		ReadSeconds: float64(d.ReadNanoseconds) / 1e9, WriteSeconds: float64(d.WriteNanoseconds) / 1e9, FlushSeconds: float64(d.FlushNanoseconds) / 1e9,
	}
}

func viewUnreachable(u *v1.Unreachable) unreachableView { return unreachableView{u.Node, u.Error} }

func viewHost(h *v1.Host) hostView {
	return hostView{h.Name, words(h.Initiators), h.ChapUser, h.MutualUser, words(h.Volumes), words(h.Paths)}
}

func viewSession(s *v1.Session) sessionView {
	return sessionView{
		Node: s.Node, Host: s.Host, Initiator: s.Initiator, ISID: hex.EncodeToString(s.Isid), TSIH: s.Tsih, Portal: s.Portal, Peer: s.Peer,
		Since: moment(api.Time(s.Since)), Auth: s.Auth, Digests: s.Digests, Commands: s.Commands, BytesIn: s.BytesIn, BytesOut: s.BytesOut, Tasks: s.Tasks,
	}
}

func viewEvent(e *v1.Event) eventView {
	return eventView{e.Number, api.Time(e.Time).UTC(), api.Word(e.Severity, "SEVERITY_"), e.Code, e.Node, e.Text}
}
