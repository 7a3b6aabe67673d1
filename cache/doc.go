// Package cache keeps 4 KiB blocks in RAM by a 64-bit key that names their
// content: the block identity of a store. A hundred clones of one image share
// one copy.
//
// [Cache] is a fixed number of frames outside the Go heap, split into shards.
// What stays is chosen by S3-FIFO (Yang et al., "FIFO queues are all you need
// for cache eviction", SOSP 2023): a new block enters a small queue, a tenth of
// the shard, and moves on to the main queue only if it was read again while it
// was there; the keys of those that were not are remembered for a while by a
// ghost table, and a block that comes back in that time enters the main queue at
// once. A long scan thus passes through the small queue and leaves the main one alone.
//
// [Flash] is a second level on a device, by the hash of the content, and [Spill] what
// stands between the two: it takes what the first level gives up and is worth keeping.
//
// # Locks
//
// One mutex per shard, held for a probe and the copy of a block. Under it only the
// Spill's mutex is taken. The index of a Flash has mutexes of its own, held for a probe.
//
// # Invariants
//
// BOUNDED: all memory is taken by New: frames, queues, table and ghosts together
// are at most the bytes asked for. No operation allocates.
//
// The cache holds no dirty data and may lose any block at any time.
package cache
