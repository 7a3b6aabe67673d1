// Package dedup reduces 4 KiB blocks: it finds the zero ones, names the others
// by a keyed fingerprint, compresses them, and remembers in bounded memory where
// a block with a given fingerprint is already stored.
//
// The types to know are [Block], one block after reduction; [Reducer], the work
// of one goroutine that makes blocks; and [Index], the memory of what is stored.
//
// A write flows through them like this:
//
//	IsZero(block)                   -> Zero: nothing is stored
//	Reducer.Fingerprint(block)      -> the name of the block everywhere
//	Index.Candidates(fp)            -> where it may be stored already; the store verifies
//	Reducer.Encode(dst, block, ...) -> the stored bytes, when it is not
//	Sum(stored)                     -> the checksum that travels with them
//
// and a read through [Verify] (or a comparison with Sum) and then [Decode].
//
// # Locks
//
// A Reducer belongs to one goroutine. An Index is safe for concurrent use: its
// sets are guarded by striped mutexes, one of which is held at a time, and no
// call out of the package is made under one.
//
// # Invariants
//
// CHECKED: Sum covers the stored bytes, is made where the block is reduced, and
// is compared before each use. Decode takes any bytes without a panic.
//
// The Index is a hint. It may forget an entry at any time and may name a block
// that is gone or another one: whoever uses a reference compares the full
// fingerprint first, and pins the block before sharing it.
package dedup
