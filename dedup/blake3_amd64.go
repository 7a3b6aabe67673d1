package dedup

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/cpu"
)

// A kernel works on chunks of 1 KiB side by side. A block has four of them: alone it fills
// half of AVX2's places and a quarter of AVX-512's, and costs hardly less than two or four blocks.
type kernel uint8

const (
	narrow kernel = iota // block by block, by the library
	avx2                 // two blocks at once
	avx512               // four
)

// wide is the kernel of this processor. One, or what emulates it, that comes to other
// results than the library is not believed.
var wide = widest()

func widest() kernel {
	switch {
	case cpu.X86.HasAVX512F && avx512.agrees():
		return avx512
	case cpu.X86.HasAVX2 && avx2.agrees():
		return avx2
	}
	return narrow
}

func (k kernel) agrees() bool {
	var data [lanesBlocks * BlockSize]byte
	var blocks [lanesBlocks][]byte
	for i := range data {
		data[i] = byte(i>>8 ^ i*7)
	}
	for i := range blocks {
		blocks[i] = data[i*BlockSize:][:BlockSize]
	}
	r := NewReducer(Key(data[:]))
	r.tree.hash4(k, &r.key, &blocks, lanesBlocks)
	for i := range blocks {
		if r.Fingerprint(blocks[i]) != r.tree.cvs[i] {
			return false
		}
	}
	return true
}

// Flags of BLAKE3's compression, of its specification.
const (
	chunkStart = 1
	chunkEnd   = 2
	parentNode = 4
	rootNode   = 8
	keyedHash  = 16
)

const (
	chunkBytes  = 1024
	chunks      = BlockSize / chunkBytes
	lanes       = 16
	lanesBlocks = lanes / chunks
)

// compress16 chains so many messages of 64 bytes from in[i] on, in each of 16 lanes, beginning
// with the key, and puts word w of lane i's result to out[w][i]. The flags first and last are added
// for the first and the last message. It needs AVX-512F.
//
//go:noescape
func compress16(in *[lanes]*byte, key *[8]uint32, counters *[lanes]uint32, blocks int, flags, first, last uint32, out *[8][lanes]uint32)

// compress8 is the same for 8 lanes, at in, counters and out: those of compress16, or the second
// half of each. It needs AVX2.
//
//go:noescape
func compress8(in **byte, key *[8]uint32, counters *uint32, blocks int, flags, first, last uint32, out *uint32, scratch *[17][8]uint32)

// chunkNumbers are the numbers of the chunks in the lanes, noNumbers those of parents.
var (
	chunkNumbers = [lanes]uint32{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3}
	noNumbers    [lanes]uint32
)

// tree4 is the memory of hash4: the tree over a block is four chunks, two parents, the root.
type tree4 struct {
	in  [lanes]*byte
	out [8][lanes]uint32
	cvs [lanes][32]byte

	scratch [17][8]uint32 // of compress8
}

// compress does it for the first n lanes at least.
func (t *tree4) compress(k kernel, n int, key *[8]uint32, counters *[lanes]uint32, blocks int, flags, first, last uint32) {
	if k == avx512 && n > 8 { // the narrower one is quicker for what it has places for
		compress16(&t.in, key, counters, blocks, flags, first, last, &t.out)
		return
	}
	for i := 0; i < n; i += 8 {
		compress8(&t.in[i], key, &counters[i], blocks, flags, first, last, &t.out[0][i], &t.scratch)
	}
}

// untangle writes the results of the first n lanes behind each other.
func (t *tree4) untangle(n int) {
	for i := range n {
		cv := &t.cvs[i]
		for w := range 8 {
			binary.LittleEndian.PutUint32(cv[4*w:], t.out[w][i])
		}
	}
}

// pairs makes the pairs of results the messages of so many lanes; the others repeat the last.
func (t *tree4) pairs(n int) {
	for i := range t.in {
		t.in[i] = &t.cvs[2*min(i, n-1)][0]
	}
}

// hash4 is the keyed BLAKE3-256 of one to four blocks, which need not stand beside each other.
func (t *tree4) hash4(k kernel, key *[8]uint32, blocks *[lanesBlocks][]byte, n int) {
	for i := range t.in {
		b := unsafe.Pointer(unsafe.SliceData(blocks[min(i/chunks, n-1)][:BlockSize]))
		t.in[i] = (*byte)(unsafe.Add(b, i%chunks*chunkBytes))
	}
	t.compress(k, chunks*n, key, &chunkNumbers, chunkBytes/64, keyedHash, chunkStart, chunkEnd)
	t.untangle(chunks * n)
	t.pairs(2 * n)
	t.compress(k, 2*n, key, &noNumbers, 1, keyedHash|parentNode, 0, 0)
	t.untangle(2 * n)
	t.pairs(n)
	t.compress(k, n, key, &noNumbers, 1, keyedHash|parentNode|rootNode, 0, 0)
	t.untangle(n)
	clear(t.in[:]) // nothing of the caller's is kept
}
