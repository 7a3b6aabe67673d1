//go:build !amd64

package dedup

// wide is a variable as elsewhere, for tests.
var wide = false

const lanesBlocks = 4

type tree4 struct{ cvs [4][32]byte }

func (t *tree4) hash4(*[8]uint32, *[lanesBlocks][]byte, int) { panic("dedup: no wide hash here") }
