package device

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// AlignedBuffer gives n bytes of zeroed memory outside the Go heap, aligned to a
// page, for direct I/O. The garbage collector does not know it: the owner returns
// it by FreeAligned. Taking one costs a system call and page faults, so buffers
// are taken once and kept. Like make, it panics when there is no memory, and when
// n is not positive.
func AlignedBuffer(n int) []byte {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		panic("device: map an aligned buffer: " + err.Error())
	}
	if n >= 2<<20 {
		_ = unix.Madvise(b, unix.MADV_HUGEPAGE) // a hint
	}
	return b
}

// FreeAligned returns a buffer to the system: exactly the slice that
// AlignedBuffer gave (a shorter slice of it from its start will do). Any use
// afterwards, by the system too, is a fault. nil is ignored.
func FreeAligned(b []byte) {
	if b == nil {
		return
	}
	// x/sys looks the mapping up by its last byte: give it the whole one.
	if err := unix.Munmap(b[:cap(b)]); err != nil {
		panic("device: free of a buffer that AlignedBuffer did not give: " + err.Error())
	}
}

// Aligned says whether p begins where direct I/O may begin in memory.
func Aligned(p []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%Align == 0
}
