// Package lsfs is the log-structured store of one node: a pool of devices, and
// on it one replica of each volume that the node holds.
//
// The types to know are Store (the pool), Volume (one replica) and Op (one
// reduced operation, as it is logged and as it travels between nodes).
//
// # Flow
//
// All writing is appending to one log over all devices; the log is the store,
// there is no second journal. Append queues an operation, Kick commits what is
// queued: records and payload are staged, written at the head of the log as one
// self-addressed, chained commit, made durable by one flush (or by a later one, if
// all of them are Relaxed), applied to the
// pages of maps and identities in RAM, and reported. Replay runs the same
// records through the same function (apply), so the two cannot drift.
//
// A map page leads from a block number to a block identity (BID), an identity
// page from there to address, checksum, fingerprint and reference count. Pages
// are found by id through the page directory. Changed pages stay in RAM until a
// checkpoint writes them, beside the log, then the directory, then the root,
// then the superblocks. A start loads the root and replays what came later.
//
//	queue.go commit.go task.go   what waits, and how it becomes a commit
//	log.go flush.go              the head of the log, and making it durable
//	apply.go tree.go identity.go what a record does to the pages
//	clone.go annex.go            leaves that maps share; blocks behind a volume's end
//	own.go snapshot.go           trees that share pages: copy on write, snapshots, rollback
//	shed.go changed.go           what is left of them; what differs between them
//	page.go budget.go            pages in RAM, and how much of it metadata takes
//	checkpoint.go replay.go      how the state gets to a device and back
//	cleaner.go trim.go stream.go how space is given back, and what is kept apart
//	cold.go                      what nobody touches is moved, to be compressed anew
//	recompress.go group.go       cold blocks are compressed once more on the way, eight at a time; reading those
//	background.go duplicates.go merge.go  blocks that are stored twice become one
//	catalogue.go                 the fingerprints of all blocks, to find them by
//	pace.go allot.go             how operations wait for that, who leaves room for whom; where identities come from
//	fault.go fill.go             pages read many at once; the index after a start
//	import.go superblocks.go     which devices the pool has, and finding them
//	member.go devices.go drain.go  devices that come and go while the pool is in use
//	tier.go lost.go              two classes of devices; a device that failed for good
//	read.go volume.go extents.go what callers see
//	fetch.go flight.go           from identities to bytes; one read for many who want a block
//	readahead.go l2.go           streams; the cache on flash
//	explain.go explainwalk.go    what a pool's bytes are there for
//	check.go dump.go             the walk that proves the counters, offline; what people look at
//	scrub.go scrubread.go ...    the same while operations go on, and the repair of what is damaged
//	refcheck.go parity.go        references counted beside operations; metadata made again
//
// # Roles and locks
//
// One goroutine at a time has the committing role (queue.busy): the committer, or
// a caller of Kick that found nobody else and at most two operations. Only the
// role takes operations, applies records and cuts checkpoints. The checkpoint
// goroutine, the cleaner, the trimmer and the goroutine that fills the fingerprint
// index work beside it; what they want changed goes to the role as a task, which
// comes before operations.
//
// Readers ahead and the writer of the flash cache only read the store. The goroutine that
// merges duplicates reads it, and has a task for each change.
//
// Lock order: Store.changing (of the list of devices), committing role, logWriter.turn, flusher.turn, flusher.mu, queue.mu, Store.mu, then without
// order among them the shards of pins, checkpointer.mu, the index and the cache.
// Only the role and the turns are held across I/O: logWriter's turn is the meaning of "one commit
// in flight". Store.mu guards pages, directory, segments and volumes; it is held
// for the walk of a request, never for I/O: who misses a page lets go, faults it
// in, and walks again. Bytes on a device are protected by their segment's reader
// count, taken under Store.mu: a segment with readers is not reused.
//
// # Invariants kept here
//
//	DURABLE    Done without an error comes after the flush of the commit, unless it is
//	           relaxed; a failed write or flush stops the store for good (poison)
//	ATOMIC-4K  a block is old or new: a commit that is not whole is cut off, and a
//	           map that a start reads names a block only after it is durable
//	ORDERED    operations of a volume are applied in sequence without gaps
//	REFS       references of an identity = entries of leaves that name it, a leaf that
//	           several ways lead to counted once; parents of a page = places that lead
//	           to it; increments come before decrements, in the commit that changes the map
//	LIVE       live bytes are the stored bytes that identities name; of a group each member
//	           counts a share, and all of them its bytes. A segment is reused when no
//	           checkpoint that a start may load, no replay and no reader needs it: two
//	           checkpoints after its last byte died, so that the newest and the one before
//	           can both be opened
//	BOUNDED    frames, index, caches and read buffers have fixed sizes; replay is
//	           bounded by the bytes between checkpoints
//	CHECKED    pages and blocks are compared with checksums kept apart from them
//
// # Shared pages
//
// A snapshot, a volume made of one and a rollback make two trees lead to one top page.
// OpClone makes maps share leaves (512 blocks) where both ranges hold one whole. The
// directory counts the parents of a page, and a change of the count alone writes its
// entry there and not the page. A page with more than one parent stays as it is: before
// anything below it changes, it and all that is shared on the way are copied from the
// top down (own), at last the leaf (unshare). So what an operation touches is no longer
// what it names: the scan that holds its pages takes in all identities of a leaf that
// will be copied, and of one whose last parent it may be.
//
// A snapshot takes no room when it is taken. What it costs is paid by the writes that
// come later: Admit and AdmitUnmap count the pages that they copy.
package lsfs
