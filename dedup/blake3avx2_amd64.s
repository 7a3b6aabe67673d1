#include "textflag.h"
#include "blake3_amd64.h"

// The message of 64 bytes for each of 8 lanes stands in scratch, word i of all lanes at 32*i:
// the state takes all registers.
#define M0 0(R11)
#define M1 32(R11)
#define M2 64(R11)
#define M3 96(R11)
#define M4 128(R11)
#define M5 160(R11)
#define M6 192(R11)
#define M7 224(R11)
#define M8 256(R11)
#define M9 288(R11)
#define M10 320(R11)
#define M11 352(R11)
#define M12 384(R11)
#define M13 416(R11)
#define M14 448(R11)
#define M15 480(R11)
#define SPARE 512(R11)

// LOAD8 reads 32 bytes of one lane, from at in its message on.
#define LOAD8(lane, at, to) \
	MOVQ (8*lane)(SI), R8; \
	VMOVDQU at(R8)(R9*1), to

// WORDS8, PAIRS8 and HALVES8 interleave two vectors by 4, 8 and 16 bytes, in place.
#define WORDS8(a, b) \
	VPUNPCKLDQ b, a, Y0; \
	VPUNPCKHDQ b, a, b; \
	VMOVDQA Y0, a

#define PAIRS8(a, b) \
	VPUNPCKLQDQ b, a, Y0; \
	VPUNPCKHQDQ b, a, b; \
	VMOVDQA Y0, a

#define HALVES8(a, b) \
	VPERM2I128 $0x20, b, a, Y0; \
	VPERM2I128 $0x31, b, a, b; \
	VMOVDQA Y0, a

// MESSAGE puts eight words of all lanes, from byte at of their messages on, where they belong.
#define MESSAGE(at, m0, m1, m2, m3, m4, m5, m6, m7) \
	LOAD8(0, at, Y8); LOAD8(1, at, Y9); LOAD8(2, at, Y10); LOAD8(3, at, Y11); \
	LOAD8(4, at, Y12); LOAD8(5, at, Y13); LOAD8(6, at, Y14); LOAD8(7, at, Y15); \
	WORDS8(Y8, Y9); WORDS8(Y10, Y11); WORDS8(Y12, Y13); WORDS8(Y14, Y15); \
	PAIRS8(Y8, Y10); PAIRS8(Y9, Y11); PAIRS8(Y12, Y14); PAIRS8(Y13, Y15); \
	HALVES8(Y8, Y12); HALVES8(Y9, Y13); HALVES8(Y10, Y14); HALVES8(Y11, Y15); \
	VMOVDQU Y8, m0; VMOVDQU Y10, m1; VMOVDQU Y9, m2; VMOVDQU Y11, m3; \
	VMOVDQU Y12, m4; VMOVDQU Y14, m5; VMOVDQU Y13, m6; VMOVDQU Y15, m7

// TWIST rotates the words of b to the right; what is in t is lost.
#define TWIST(b, t, right, left) \
	VPSRLD right, b, t; \
	VPSLLD left, b, b; \
	VPOR t, b, b

// HALF8 is half of a round's mixing for four columns (or diagonals) side by side. The last d
// stands aside while its register is needed.
#define HALF8(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, m0, m1, m2, m3, bytes, right, left) \
	VPADDD m0, a0, a0; VPADDD m1, a1, a1; VPADDD m2, a2, a2; VPADDD m3, a3, a3; \
	VPADDD b0, a0, a0; VPADDD b1, a1, a1; VPADDD b2, a2, a2; VPADDD b3, a3, a3; \
	VPXOR a0, d0, d0; VPXOR a1, d1, d1; VPXOR a2, d2, d2; VPXOR a3, d3, d3; \
	VPSHUFB bytes, d0, d0; VPSHUFB bytes, d1, d1; VPSHUFB bytes, d2, d2; VPSHUFB bytes, d3, d3; \
	VPADDD d0, c0, c0; VPADDD d1, c1, c1; VPADDD d2, c2, c2; VPADDD d3, c3, c3; \
	VMOVDQU d3, SPARE; \
	VPXOR c0, b0, b0; VPXOR c1, b1, b1; VPXOR c2, b2, b2; VPXOR c3, b3, b3; \
	TWIST(b0, d3, right, left); TWIST(b1, d3, right, left); TWIST(b2, d3, right, left); TWIST(b3, d3, right, left); \
	VMOVDQU SPARE, d3

#define ROUND(m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15) \
	HALF8(Y0, Y1, Y2, Y3, Y4, Y5, Y6, Y7, Y8, Y9, Y10, Y11, Y12, Y13, Y14, Y15, m0, m2, m4, m6, right16<>(SB), $12, $20); \
	HALF8(Y0, Y1, Y2, Y3, Y4, Y5, Y6, Y7, Y8, Y9, Y10, Y11, Y12, Y13, Y14, Y15, m1, m3, m5, m7, right8<>(SB), $7, $25); \
	HALF8(Y0, Y1, Y2, Y3, Y5, Y6, Y7, Y4, Y10, Y11, Y8, Y9, Y15, Y12, Y13, Y14, m8, m10, m12, m14, right16<>(SB), $12, $20); \
	HALF8(Y0, Y1, Y2, Y3, Y5, Y6, Y7, Y4, Y10, Y11, Y8, Y9, Y15, Y12, Y13, Y14, m9, m11, m13, m15, right8<>(SB), $7, $25)

// The bytes of words that are rotated by 16 and by 8 bits to the right.
DATA right16<>+0(SB)/8, $0x0504070601000302
DATA right16<>+8(SB)/8, $0x0d0c0f0e09080b0a
DATA right16<>+16(SB)/8, $0x0504070601000302
DATA right16<>+24(SB)/8, $0x0d0c0f0e09080b0a
GLOBL right16<>(SB), RODATA|NOPTR, $32
DATA right8<>+0(SB)/8, $0x0407060500030201
DATA right8<>+8(SB)/8, $0x0c0f0e0d080b0a09
DATA right8<>+16(SB)/8, $0x0407060500030201
DATA right8<>+24(SB)/8, $0x0c0f0e0d080b0a09
GLOBL right8<>(SB), RODATA|NOPTR, $32

// The words that each message begins with: four of the specification's constants, and the length.
DATA begin<>+0(SB)/4, $0x6A09E667
DATA begin<>+4(SB)/4, $0xBB67AE85
DATA begin<>+8(SB)/4, $0x3C6EF372
DATA begin<>+12(SB)/4, $0xA54FF53A
DATA begin<>+16(SB)/4, $64
GLOBL begin<>(SB), RODATA|NOPTR, $20

// func compress8(in **byte, key *[8]uint32, counters *uint32, blocks int, flags, first, last uint32, out *uint32, scratch *[17][8]uint32)
TEXT ·compress8(SB), NOSPLIT, $0-64
	MOVQ in+0(FP), SI
	MOVQ key+8(FP), DI
	MOVQ counters+16(FP), R10
	MOVQ blocks+24(FP), CX
	MOVL flags+32(FP), AX
	MOVL first+36(FP), BX
	MOVL last+40(FP), DX
	MOVQ scratch+56(FP), R11
	XORQ R9, R9
	ORL  AX, BX                   // flags of the first message

	VPBROADCASTD 0(DI), Y0
	VPBROADCASTD 4(DI), Y1
	VPBROADCASTD 8(DI), Y2
	VPBROADCASTD 12(DI), Y3
	VPBROADCASTD 16(DI), Y4
	VPBROADCASTD 20(DI), Y5
	VPBROADCASTD 24(DI), Y6
	VPBROADCASTD 28(DI), Y7

next:
	CMPQ CX, $1
	JNE  more
	ORL  DX, BX                   // and of the last one, which may be the same

more:
	VMOVDQU Y0, SPARE
	MESSAGE(0, M0, M1, M2, M3, M4, M5, M6, M7)
	MESSAGE(32, M8, M9, M10, M11, M12, M13, M14, M15)
	VMOVDQU SPARE, Y0

	VPBROADCASTD begin<>+0(SB), Y8
	VPBROADCASTD begin<>+4(SB), Y9
	VPBROADCASTD begin<>+8(SB), Y10
	VPBROADCASTD begin<>+12(SB), Y11
	VMOVDQU (R10), Y12
	VPXOR Y13, Y13, Y13
	VPBROADCASTD begin<>+16(SB), Y14
	VMOVD BX, X15
	VPBROADCASTD X15, Y15

	ROUNDS

	VPXOR Y8, Y0, Y0
	VPXOR Y9, Y1, Y1
	VPXOR Y10, Y2, Y2
	VPXOR Y11, Y3, Y3
	VPXOR Y12, Y4, Y4
	VPXOR Y13, Y5, Y5
	VPXOR Y14, Y6, Y6
	VPXOR Y15, Y7, Y7

	ADDQ $64, R9
	MOVL AX, BX
	DECQ CX
	JNZ  next

	MOVQ out+48(FP), DI
	VMOVDQU Y0, 0(DI)
	VMOVDQU Y1, 64(DI)
	VMOVDQU Y2, 128(DI)
	VMOVDQU Y3, 192(DI)
	VMOVDQU Y4, 256(DI)
	VMOVDQU Y5, 320(DI)
	VMOVDQU Y6, 384(DI)
	VMOVDQU Y7, 448(DI)
	VZEROUPPER
	RET
