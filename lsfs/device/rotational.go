package device

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Rotational says whether the system takes the block device at path for a disk
// that rotates, where sequential I/O is many times as fast as any other. It is
// false for a file, and where nobody knows.
func Rotational(path string) bool {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return false
	}
	dir := fmt.Sprintf("/sys/dev/block/%d:%d/", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	for _, name := range [...]string{"queue/rotational", "../queue/rotational"} { // of the disk of a partition
		if text, err := os.ReadFile(dir + name); err == nil {
			return strings.TrimSpace(string(text)) == "1"
		}
	}
	return false
}
