package server

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/server/cluster"
	"github.com/twinsan/twinsan/server/iscsi"
	"github.com/twinsan/twinsan/server/scsi"
)

// metricsServer serves /metrics. It has one goroutine and those of net/http,
// which end with it.
type metricsServer struct {
	http  *http.Server
	group sync.WaitGroup
}

// serveMetrics starts to serve the metrics of n; without an address it serves none.
func serveMetrics(address string, n *Node) (*metricsServer, error) {
	if address == "" {
		return nil, nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("metrics address: %w", err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collector{n},
	)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	m := &metricsServer{http: &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}}
	m.group.Go(func() {
		if err := m.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			n.log.Error("metrics ended", "err", err)
		}
	})
	return m, nil
}

func (m *metricsServer) close() {
	_ = m.http.Close() // the listener's error changes nothing: it is gone
	m.group.Wait()
}

// collector reads the counters of all parts at each scrape. A part that does not
// exist (yet) has no metrics.
type collector struct{ node *Node }

func description(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("twinsan_"+name, help, labels, nil)
}

// The metrics, in the order in which collect sends them.
var (
	descBuild  = description("build_info", "The program; always 1.", "version", "revision")
	descQuorum = description("cluster_quorum", "1 while this node sees a quorum.")
	descLeader = description("raft_leader", "1 for the node that leads the cluster, as this node sees it.", "node")
	descReady  = description("node_ready", "1 while this node serves.")

	descOwner       = description("volume_owner", "1 for the recorded owner of the volume.", "volume", "node")
	descReplica     = description("volume_replica_in_sync", "1 for replicas that are recorded in sync, 0 for others.", "volume", "node")
	descProvisioned = description("volume_provisioned_bytes", "Size of the volume.", "volume")
	descMapped      = description("volume_mapped_bytes", "Bytes that the local replica maps, before reduction.", "volume")
	descSnapshots   = description("volume_snapshots", "Snapshots of the volume.", "volume")
	descServed      = description("volume_served", "1 while initiators reach the volume through this node.", "volume")
	descEpoch       = description("volume_epoch", "Epoch of the volume: rises with every change of owner or in-sync set.", "volume")
	descLag         = description("replication_lag_ops", "Operations that the replica has not acknowledged; on the owner.", "volume", "node")
	descResyncLeft  = description("resync_remaining_bytes", "Bytes that a resync has still to look at; on the owner.", "volume", "node")
	descResyncs     = description("resyncs", "Resyncs that this node drives.", "state")
	descResyncTotal = description("resync_sent_bytes_total", "Bytes of content that resyncs from this node have sent.")
	descResyncLimit = description("resync_limit_bytes_per_second", "What resyncs from this node may send together now; 0: no limit.")
	descResyncSent  = description("resync_sent_bytes", "Bytes of content that the running resync has sent; on the owner.", "volume", "node")

	descSeconds = map[scsi.OpClass]*prometheus.Desc{
		scsi.ClassRead:  description("volume_read_seconds", "Time from a READ's receipt to its end.", "volume"),
		scsi.ClassWrite: description("volume_write_seconds", "Time from a WRITE's receipt to its end.", "volume"),
		scsi.ClassUnmap: description("volume_unmap_seconds", "Time from an UNMAP's receipt to its end.", "volume"),
	}
	descBytes    = description("volume_bytes_total", "Bytes moved by commands that ended GOOD.", "volume", "op")
	descCommands = description("volume_commands_total", "SCSI commands that ended, by their class and result.", "volume", "class", "result")
	descRefusals = description("volume_refused_total", "SCSI commands that did not end GOOD, by reason; the reasons are a fixed set.", "volume", "class", "reason")
	descInFlight = description("scsi_commands_in_flight", "SCSI commands under way.", "volume")

	descSessions   = description("iscsi_sessions", "Sessions, those of discovery included.")
	descLogins     = description("iscsi_logins_total", "Logins by their status; abandoned: the connection ended before.", "result")
	descHalfOpen   = description("iscsi_half_open", "Connections in login phase.")
	descDigest     = description("iscsi_digest_errors_total", "PDUs with a wrong digest.")
	descAborts     = description("iscsi_task_aborts_total", "Tasks that ended without a response.")
	descManagement = description("iscsi_task_management_total", "Task management functions.")
	descWindow     = description("iscsi_window_drops_total", "PDUs outside of the command window, or doubled.")
	descRejects    = description("iscsi_rejects_total", "PDUs that were rejected.")
	descMemory     = description("iscsi_memory_waits_total", "Tasks that waited for a data buffer or were refused one.", "result")
	descStalls     = description("iscsi_write_stalls_total", "Writes that a socket did not take at once.")
	descBuffers    = description("iscsi_buffer_bytes", "Memory for data in transfer.")

	descPoolSize    = description("pool_size_bytes", "Size of the pool.")
	descPoolUsed    = description("pool_used_bytes", "Live data and metadata.")
	descPoolGarbage = description("pool_garbage_bytes", "Dead bytes in used segments.")
	descPoolFree    = description("pool_free_bytes", "Bytes in free segments.")
	descPoolUsable  = description("pool_usable_bytes", "What used bytes may grow to before writes are refused.")
	descMerged      = description("pool_merged_blocks_total", "Blocks of 4 KiB that were stored twice and were merged in the background.")
	descMergedBytes = description("pool_merged_bytes_total", "Stored bytes that merging duplicates has won.")
	descMerging     = description("pool_merge_progress", "Part of the running pass that looks for duplicates, 0 while none runs.")
	descCatalogue   = description("pool_catalogue_bytes", "Size of the catalogue of fingerprints on the node's file system.")
	descPacked      = description("pool_recompressed_blocks_total", "Cold blocks that were compressed once more when they moved.")
	descCold        = description("pool_cold_segments_total", "Segments whose blocks were compressed once more, where that pays, because they were cold.")
	descPackedWon   = description("pool_recompressed_won_bytes_total", "Stored bytes that recompression has won.")
	descToReclaim   = description("pool_reclaim_bytes", "Mapped bytes of deleted volumes, not yet given back.")
	descAmp         = description("pool_write_amplification", "Bytes written to the devices for each byte of new blocks, since the start.")
	descPoolMapped  = description("pool_mapped_bytes", "Bytes that volumes map, before reduction.")
	descPoolStored  = description("pool_stored_bytes", "Bytes that mapped blocks take on the devices.")
	descSavings     = description("pool_savings_ratio", "Mapped bytes to stored bytes.")

	descCacheHits     = description("cache_hits_total", "Lookups in a cache.", "tier", "result")
	descCacheBytes    = description("cache_bytes", "Bytes held by a cache.", "tier")
	descCacheCapacity = description("cache_capacity_bytes", "Bytes of blocks that a cache can hold.", "tier")
	descCacheAhead    = description("cache_ahead_blocks_total", "Blocks of 4 KiB read ahead of sequential streams.")
	descCacheFirst    = description("cache_first_hits_total", "Hits of blocks that had been read ahead or written and were wanted for the first time.")
	descCachePassed   = description("cache_passed_blocks_total", "Blocks of 4 KiB of long scans by large reads, which the cache remembered without holding them.")
	descCacheShared   = description("cache_shared_reads_total", "Blocks that were wanted while they were being read, and were not read again.")
	descCacheWarm     = description("cache_written_blocks_total", "Blocks of 4 KiB that entered the cache when they were written, because what they replaced had been read there.")
	descFlashUp       = description("flash_cache_up", "1 while the cache on flash works, 0 when its device has failed.")
	descFlashWritten  = description("flash_cache_written_bytes_total", "Bytes written to the cache on flash.")
	descFlashStale    = description("flash_cache_stale_total", "Places of the cache on flash that held something else than expected: replaced meanwhile, or damaged.")
	descFlashDropped  = description("flash_cache_dropped_total", "Blocks that were not written to the cache on flash because they came faster than it is written.")

	descDedup      = description("dedup_lookups_total", "Lookups of fingerprints while writing.", "result")
	descIndex      = description("dedup_index_entries", "Fingerprints that the index remembers.")
	descReduce     = description("reduce_blocks_total", "Blocks of 4 KiB by what reduction made of them.", "kind")
	descReduced    = description("reduce_stored_bytes_total", "Bytes of new blocks after compression.")
	descCommit     = description("log_commit_seconds", "Write and flush of a commit.")
	descFlush      = description("log_flush_seconds", "Flush of a commit.")
	descCommitOps  = description("log_commit_ops", "Operations in a commit.")
	descLogBytes   = description("log_bytes_total", "Bytes written to the devices: log, checkpoints, moved blocks.")
	descUnflushed  = description("log_unflushed_bytes", "Bytes of log that wait for a flush (write policy mirrored-ram).")
	descRelaxed    = description("log_relaxed_commits_total", "Commits that were answered before their flush.")
	descCleaner    = description("cleaner_bytes_total", "Bytes that the cleaner moved.")
	descPaced      = description("space_paced_seconds_total", "Time that operations were held back so that cleaning and checkpoints keep up.")
	descSegments   = description("segments", "Segments of the pool.", "state")
	descMetadata   = description("metadata_bytes", "RAM of map pages.")
	descFixed      = description("metadata_directory_bytes", "RAM of the page directory and the segment table.")
	descIndexBytes = description("dedup_index_bytes", "RAM of the index of fingerprints.")
	descDevErrors  = description("device_errors_total", "Operations of a device that failed.", "device", "op")
	descDevOps     = description("device_operations_total", "Operations of a device.", "device", "op")
	descDevLatency = description("device_latency_seconds", "Mean latency of the last few dozen operations of a device.", "device", "op")
	descDevLive    = description("device_live_bytes", "Bytes of blocks and metadata that stand on a device.", "device", "class")
	descDevSize    = description("device_size_bytes", "Size of a device's segments.", "device", "class")
	descDevState   = description("device_state", "1 for the state that a device is in.", "device", "state")
	descDevSlow    = description("device_slow", "1 while a device is ten times slower than usual and than others of its class.", "device")
	descDevPace    = description("device_wait_seconds", "A write and its flush beyond the transfer of their bytes: in the last seconds, and usually.", "device", "of")
	descLinkSlow   = description("link_slow", "1 while the link to a node is ten times slower than usual and than other links.", "node")
	descLinkPace   = description("link_round_trip_seconds", "Round trip of a beacon: in the last seconds, and usually.", "node", "of")
	descChecksum   = description("checksum_errors_total", "Blocks and pages whose checksum was wrong.")
	descRepaired   = description("repaired_total", "Blocks that were repaired from another replica.")
	descRebuilt    = description("pages_rebuilt_total", "Metadata pages that were made again from parity.")
	descScrub      = description("scrub_progress", "Part of the scrub pass under way that is done, 0 to 1.")
	descScrubbed   = description("scrub_running", "1 while a scrub pass runs.")
	descScrubEnd   = description("scrub_finished_timestamp_seconds", "When the last scrub pass ended; absent: none has.")
	descScrubRead  = description("scrub_read_bytes", "Bytes that the newest scrub pass has read.")
	descScrubFound = description("scrub_found", "What the newest scrub pass found.", "kind")
	descReclaim    = description("pool_reclaim", "0 while nothing is given back because a reference count was too low.")
	descRefused    = description("space_refused_total", "Operations refused for want of space.")
)

// Describe makes this an unchecked collector: which metrics exist depends on the node.
func (collector) Describe(chan<- *prometheus.Desc) {}

// Collect sends all metrics.
func (c collector) Collect(out chan<- prometheus.Metric) {
	m := metricSink{out}
	n := c.node
	b := Build()
	m.gauge(descBuild, 1, b.Version, b.Revision)
	state := n.cluster.State()
	m.gauge(descQuorum, flag(n.cluster.Quorum()))
	if leader := n.cluster.Leader(); leader != 0 {
		m.gauge(descLeader, 1, state.NodeName(leader))
	}
	m.gauge(descReady, flag(n.ready.Load()))
	c.volumes(m, state)
	if n.store != nil {
		m.store(n.store.Stats(), n.store.Room())
		m.merge(n.store.Merge())
		m.scrub(n.store.Scrub())
		m.devices(n.store.Devices())
		m.paces(n.paces(), state.NodeName)
	}
}

func (c collector) volumes(m metricSink, state *cluster.State) {
	n := c.node
	parts := n.serving.Load()
	snapshots := state.SnapshotCounts()
	for _, v := range state.Volumes {
		if v.Record.Deleted {
			continue
		}
		m.gauge(descProvisioned, float64(v.Record.SizeBytes), v.Name)
		m.gauge(descSnapshots, float64(snapshots[v.ID]), v.Name)
		m.gauge(descEpoch, float64(v.Record.Epoch), v.Name)
		if v.Record.Owner != 0 {
			m.gauge(descOwner, 1, v.Name, state.NodeName(v.Record.Owner))
		}
		for _, r := range v.Record.Replicas {
			m.gauge(descReplica, flag(v.Record.Has(r.Node)), v.Name, state.NodeName(r.Node))
		}
		if parts == nil {
			continue
		}
		volume := parts.replication.Volume(v.ID)
		if volume == nil {
			continue
		}
		s := volume.Status()
		report := n.volumeReport(state, v, s)
		m.gauge(descServed, flag(report.Served), v.Name)
		m.gauge(descMapped, float64(report.Mapped), v.Name)
		if !report.Owner {
			continue
		}
		for _, r := range s.Replicas {
			if r.Node == n.cluster.Self() {
				continue
			}
			name := state.NodeName(r.Node)
			m.gauge(descLag, float64(r.Lag), v.Name, name)
			if r.Syncing {
				m.gauge(descResyncLeft, float64(max(r.Total-r.Done, 0))*chunkBytes, v.Name, name)
				m.gauge(descResyncSent, float64(r.SentBytes), v.Name, name)
			}
		}
	}
	if parts == nil {
		return
	}
	r := parts.replication.Resyncs()
	m.gauge(descResyncs, float64(r.Running), "running")
	m.gauge(descResyncs, float64(r.Waiting), "waiting")
	m.count(descResyncTotal, float64(r.SentBytes))
	m.gauge(descResyncLimit, float64(r.LimitBytes))
	for _, u := range parts.scsi.Stats() {
		m.unit(&u)
	}
	m.transport(parts.target.Stats())
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

type metricSink struct{ out chan<- prometheus.Metric }

func (m metricSink) send(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels []string) {
	m.out <- prometheus.MustNewConstMetric(d, kind, v, labels...)
}

func (m metricSink) gauge(d *prometheus.Desc, v float64, labels ...string) {
	m.send(d, prometheus.GaugeValue, v, labels)
}

func (m metricSink) count(d *prometheus.Desc, v float64, labels ...string) {
	m.send(d, prometheus.CounterValue, v, labels)
}

// unit sends the counters of one logical unit.
func (m metricSink) unit(u *scsi.LUStats) {
	m.gauge(descInFlight, float64(u.InFlight), u.Name)
	for i := range u.Classes {
		class, c := scsi.OpClass(i), &u.Classes[i]
		op := class.String()
		m.count(descBytes, float64(c.Bytes), u.Name, op)
		for _, s := range []struct {
			status string
			n      uint64
		}{{"good", c.Good}, {"check_condition", c.CheckConditions}, {"conflict", c.Conflicts}, {"busy", c.Busy}, {"aborted", c.Aborted}} {
			m.count(descCommands, float64(s.n), u.Name, op, s.status)
		}
		for _, r := range byReason(refusals(c)) {
			m.count(descRefusals, float64(r.count), u.Name, op, r.label)
		}
		d := descSeconds[class]
		if d == nil {
			continue
		}
		buckets, total := map[float64]uint64{}, uint64(0)
		for b, n := range c.Latency {
			total += n
			if bound := scsi.LatencyBound(b); bound > 0 {
				buckets[bound.Seconds()] = total
			}
		}
		m.out <- prometheus.MustNewConstHistogram(d, total, float64(c.Nanoseconds)/1e9, buckets, u.Name)
	}
}

// transport sends the counters of the iSCSI target.
func (m metricSink) transport(s iscsi.Stats) {
	m.gauge(descSessions, float64(s.Sessions))
	for status, n := range s.Logins {
		result := fmt.Sprintf("%04x", status) // class and detail, as in RFC 7143
		if status == 0 {
			result = "success"
		}
		m.count(descLogins, float64(n), result)
	}
	m.count(descLogins, float64(s.LoginsAbandoned), "abandoned")
	m.gauge(descHalfOpen, float64(s.HalfOpen))
	m.count(descDigest, float64(s.DigestErrors))
	m.count(descAborts, float64(s.TasksAborted))
	m.count(descManagement, float64(s.TaskManagement))
	m.count(descWindow, float64(s.WindowDrops))
	m.count(descRejects, float64(s.Rejects))
	m.count(descMemory, float64(s.MemoryWaits), "waited")
	m.count(descMemory, float64(s.MemoryRefusals), "refused")
	m.count(descStalls, float64(s.WriteStalls))
	m.gauge(descBuffers, float64(s.BuffersInUse))
}

// powers sends a histogram of the store, whose bucket i holds what is below 1<<i.
func (m metricSink) powers(d *prometheus.Desc, h *lsfs.Histogram, unit float64) {
	buckets, total := map[float64]uint64{}, uint64(0)
	for i, n := range h.Counts {
		total += n
		if i < len(h.Counts)-1 {
			buckets[float64(uint64(1)<<i)*unit] = total
		}
	}
	m.out <- prometheus.MustNewConstHistogram(d, total, float64(h.Sum)*unit, buckets)
}

func (m metricSink) scrub(s lsfs.ScrubStatus) {
	m.gauge(descScrubbed, flag(s.Running))
	m.gauge(descReclaim, flag(s.Reclaim))
	newest := s.Last
	if s.Phase != lsfs.ScrubIdle {
		newest = s.Current
		m.gauge(descScrub, s.Done)
	}
	if !s.Last.Finished.IsZero() {
		m.gauge(descScrubEnd, float64(s.Last.Finished.Unix()))
	}
	m.gauge(descScrubRead, float64(newest.Bytes))
	m.gauge(descScrubFound, float64(newest.Damaged), "damaged")
	m.gauge(descScrubFound, float64(newest.Repaired), "repaired")
	m.gauge(descScrubFound, float64(newest.Lost), "lost")
	m.gauge(descScrubFound, float64(newest.Counters), "counters")
}

func (m metricSink) devices(list []lsfs.DeviceInfo) {
	for i := range list {
		d, u := &list[i], &list[i].Usage
		for _, x := range [...]struct {
			op          string
			ops, errors int64
			latency     time.Duration
		}{
			{"read", u.Reads, u.ReadErrors, u.ReadLatency}, {"write", u.Writes, u.WriteErrors, u.WriteLatency}, {"flush", u.Flushes, u.FlushErrors, u.FlushLatency},
		} {
			m.count(descDevOps, float64(x.ops), d.Path, x.op)
			m.count(descDevErrors, float64(x.errors), d.Path, x.op)
			m.gauge(descDevLatency, x.latency.Seconds(), d.Path, x.op)
		}
		m.gauge(descDevLive, float64(d.LiveBytes), d.Path, d.Class.String())
		m.gauge(descDevSize, float64(d.SizeBytes), d.Path, d.Class.String())
		m.gauge(descDevState, 1, d.Path, string(d.State))
	}
}

func (m metricSink) merge(s lsfs.MergeStatus) {
	m.count(descMerged, float64(s.Blocks))
	m.count(descMergedBytes, float64(s.Bytes))
	m.gauge(descCatalogue, float64(s.CatalogueBytes))
	done := 0.0
	if s.Running {
		done = s.Done
	}
	m.gauge(descMerging, done)
}

func (m metricSink) store(s lsfs.Stats, r lsfs.Room) {
	m.gauge(descPoolSize, float64(r.Size))
	m.gauge(descPoolUsed, float64(r.Live))
	m.gauge(descPoolGarbage, float64(r.Garbage))
	m.gauge(descPoolFree, float64(r.Free))
	m.gauge(descPoolUsable, float64(r.Usable))
	mapped, stored := float64(s.MappedBlocks)*4096, float64(s.UniqueBytes)
	m.gauge(descToReclaim, float64(s.ReclaimBlocks)*4096)
	m.gauge(descAmp, s.WriteAmplification())
	m.count(descPacked, float64(s.Recompressed))
	m.count(descPackedWon, float64(s.RecompressedWon))
	m.count(descCold, float64(s.ColdSegments))
	m.gauge(descPoolMapped, mapped)
	m.gauge(descPoolStored, stored)
	if stored > 0 {
		m.gauge(descSavings, mapped/stored)
	}
	m.count(descCacheHits, float64(s.L1.Hits), "ram", "hit")
	m.count(descCacheHits, float64(s.L1.Misses), "ram", "miss")
	m.gauge(descCacheBytes, float64(s.L1.Bytes), "ram")
	m.gauge(descCacheCapacity, float64(s.L1.Capacity), "ram")
	m.count(descCacheAhead, float64(s.AheadBlocks))
	m.count(descCacheFirst, float64(s.L1.FirstHits))
	m.count(descCachePassed, float64(s.L1.Passed))
	m.count(descCacheWarm, float64(s.WarmBlocks))
	m.count(descCacheShared, float64(s.SharedReads))
	if l2 := &s.L2; l2.Path != "" {
		m.count(descCacheHits, float64(l2.Hits), "flash", "hit")
		m.count(descCacheHits, float64(l2.Misses), "flash", "miss")
		m.gauge(descCacheBytes, float64(l2.Bytes), "flash")
		m.gauge(descCacheCapacity, float64(l2.Capacity), "flash")
		m.gauge(descFlashUp, flag(l2.Failure == nil))
		m.count(descFlashWritten, float64(l2.Written))
		m.count(descFlashStale, float64(l2.Stale))
		m.count(descFlashDropped, float64(l2.Dropped))
	}
	m.count(descDedup, float64(s.PinHits), "hit")
	m.count(descDedup, float64(s.PinMisses), "miss")
	m.gauge(descIndex, float64(s.Index.Entries))
	m.count(descReduce, float64(s.BlocksNew), "new")
	m.count(descReduce, float64(s.BlocksRef), "duplicate")
	m.count(descReduce, float64(s.BlocksZero), "zero")
	m.count(descReduced, float64(s.StoredBytes))
	m.powers(descCommit, &s.CommitMicros, 1e-6)
	m.powers(descFlush, &s.FlushMicros, 1e-6)
	m.powers(descCommitOps, &s.CommitOps, 1)
	m.count(descLogBytes, float64(s.LogBytes))
	m.gauge(descUnflushed, float64(s.Unflushed))
	m.count(descRelaxed, float64(s.Relaxed))
	m.count(descCleaner, float64(s.CleanerBytes))
	m.count(descPaced, s.Paced.Seconds())
	for state, n := range s.Segments {
		m.gauge(descSegments, float64(n), state)
	}
	m.gauge(descMetadata, float64(s.MetadataBytes))
	m.gauge(descFixed, float64(s.FixedBytes))
	m.gauge(descIndexBytes, float64(s.Index.Bytes))
	m.count(descChecksum, float64(s.ChecksumErrors))
	m.count(descRepaired, float64(s.Repairs))
	m.count(descRebuilt, float64(s.PagesRebuilt))
	m.count(descRefused, float64(s.SpaceRefused))
}
