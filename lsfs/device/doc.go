// Package device reads and writes block devices and preallocated files in
// aligned pieces, past the page cache where the file system allows it.
//
// [Device] is the border that the store sees; [Open] answers it with a real
// device, and the package devicetest with one that lies. [ReadPool] turns many
// scattered reads into system calls without a goroutine per read. Memory for
// direct I/O comes from [AlignedBuffer].
//
// # Flow
//
// A write is one pwrite of the caller's aligned buffer, a Flush one fdatasync.
// Nothing is buffered or reordered here: what WriteAt returned for is in the
// device's (or, without direct I/O, the system's) cache, and what Flush returned
// for is on stable storage.
//
// # Locks
//
// A device holds a read lock for the length of each operation and the write lock
// in Close, so that no descriptor is reused under a running system call. The
// ReadPool's mutex guards its queue, is never held across I/O, and no other lock
// is taken under it.
//
// # Invariants
//
// One owner: a device that is open for writing is open once on this machine.
//
// DURABLE: after a Flush has failed nothing is known about any write since the
// last good one, and the system reports such a failure only once. The device
// therefore refuses every later write and flush with [ErrPoisoned]; only opening
// it again, and replaying what it really holds, leaves that state.
package device
