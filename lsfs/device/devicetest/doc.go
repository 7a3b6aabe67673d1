// Package devicetest is a device for tests: a disk in memory that fails, loses,
// tears, reorders and corrupts when it is told to, the same way for the same seed.
//
// [Disk] implements device.Device. What was written and not flushed is kept
// apart, write by write, so that [Disk.Crash] can give the disk that a power cut
// would leave at any moment, while the first one goes on. [Conform] is the suite
// that every implementation of device.Device passes.
//
// Locks: one mutex per Disk, held over the copying of an operation. Hooks are
// called without it.
package devicetest
