package dedup

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/cpu"
)

// wide says that the processor hashes four blocks at once: with AVX-512 one round works
// on 16 chunks of 1 KiB side by side. A block alone fills four of those places, and
// costs hardly less than four blocks. A processor, or what emulates one, that comes to
// other results than the library is not believed.
var wide = cpu.X86.HasAVX512F && wideAgrees()

func wideAgrees() bool {
	var data [lanesBlocks * BlockSize]byte
	var blocks [lanesBlocks][]byte
	for i := range data {
		data[i] = byte(i>>8 ^ i*7)
	}
	for i := range blocks {
		blocks[i] = data[i*BlockSize:][:BlockSize]
	}
	r := NewReducer(Key(data[:]))
	r.tree.hash4(&r.key, &blocks, lanesBlocks)
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
func (t *tree4) hash4(key *[8]uint32, blocks *[lanesBlocks][]byte, n int) {
	for i := range t.in {
		b := unsafe.Pointer(unsafe.SliceData(blocks[min(i/chunks, n-1)][:BlockSize]))
		t.in[i] = (*byte)(unsafe.Add(b, i%chunks*chunkBytes))
	}
	compress16(&t.in, key, &chunkNumbers, chunkBytes/64, keyedHash, chunkStart, chunkEnd, &t.out)
	t.untangle(chunks * n)
	t.pairs(2 * n)
	compress16(&t.in, key, &noNumbers, 1, keyedHash|parentNode, 0, 0, &t.out)
	t.untangle(2 * n)
	t.pairs(n)
	compress16(&t.in, key, &noNumbers, 1, keyedHash|parentNode|rootNode, 0, 0, &t.out)
	t.untangle(n)
	clear(t.in[:]) // nothing of the caller's is kept
}
