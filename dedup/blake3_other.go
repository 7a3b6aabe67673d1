//go:build !amd64

package dedup

type kernel uint8

const narrow kernel = 0

// wide is a variable as elsewhere, for tests.
var wide = narrow

const lanesBlocks = 4

type tree4 struct{ cvs [4][32]byte }

func (t *tree4) hash4(kernel, *[8]uint32, *[lanesBlocks][]byte, int) {
	panic("dedup: no wide hash here")
}
