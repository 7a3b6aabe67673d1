#include "textflag.h"
#include "blake3_amd64.h"

// A message of 64 bytes for each of 16 lanes, as it is after TRANSPOSE: word i of all
// lanes. The numbers are out of order because each step of the transposition
// works in place.
#define M0 Z16
#define M1 Z18
#define M2 Z17
#define M3 Z19
#define M4 Z20
#define M5 Z22
#define M6 Z21
#define M7 Z23
#define M8 Z24
#define M9 Z26
#define M10 Z25
#define M11 Z27
#define M12 Z28
#define M13 Z30
#define M14 Z29
#define M15 Z31

// LOAD reads the next 64 bytes of one lane.
#define LOAD(lane, to) \
	MOVQ (8*lane)(SI), R8; \
	VMOVDQU32 (R8)(R9*1), to

// WORDS, PAIRS, LOW and HIGH interleave two vectors by 4, 8 and 16 bytes, in place.
#define WORDS(a, b) \
	VPUNPCKLDQ b, a, Z8; \
	VPUNPCKHDQ b, a, b; \
	VMOVDQA32 Z8, a

#define PAIRS(a, b) \
	VPUNPCKLQDQ b, a, Z8; \
	VPUNPCKHQDQ b, a, b; \
	VMOVDQA32 Z8, a

#define QUADS(a, b) \
	VSHUFI32X4 $0x88, b, a, Z8; \
	VSHUFI32X4 $0xdd, b, a, b; \
	VMOVDQA32 Z8, a

#define TRANSPOSE \
	WORDS(Z16, Z17); WORDS(Z18, Z19); WORDS(Z20, Z21); WORDS(Z22, Z23); \
	WORDS(Z24, Z25); WORDS(Z26, Z27); WORDS(Z28, Z29); WORDS(Z30, Z31); \
	PAIRS(Z16, Z18); PAIRS(Z17, Z19); PAIRS(Z20, Z22); PAIRS(Z21, Z23); \
	PAIRS(Z24, Z26); PAIRS(Z25, Z27); PAIRS(Z28, Z30); PAIRS(Z29, Z31); \
	QUADS(Z16, Z20); QUADS(Z18, Z22); QUADS(Z17, Z21); QUADS(Z19, Z23); \
	QUADS(Z24, Z28); QUADS(Z26, Z30); QUADS(Z25, Z29); QUADS(Z27, Z31); \
	QUADS(Z16, Z24); QUADS(Z18, Z26); QUADS(Z17, Z25); QUADS(Z19, Z27); \
	QUADS(Z20, Z28); QUADS(Z22, Z30); QUADS(Z21, Z29); QUADS(Z23, Z31)

// HALF is half of a round's mixing for four columns (or diagonals) side by side.
#define HALF(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, m0, m1, m2, m3, r, s) \
	VPADDD m0, a0, a0; VPADDD m1, a1, a1; VPADDD m2, a2, a2; VPADDD m3, a3, a3; \
	VPADDD b0, a0, a0; VPADDD b1, a1, a1; VPADDD b2, a2, a2; VPADDD b3, a3, a3; \
	VPXORD a0, d0, d0; VPXORD a1, d1, d1; VPXORD a2, d2, d2; VPXORD a3, d3, d3; \
	VPRORD r, d0, d0; VPRORD r, d1, d1; VPRORD r, d2, d2; VPRORD r, d3, d3; \
	VPADDD d0, c0, c0; VPADDD d1, c1, c1; VPADDD d2, c2, c2; VPADDD d3, c3, c3; \
	VPXORD c0, b0, b0; VPXORD c1, b1, b1; VPXORD c2, b2, b2; VPXORD c3, b3, b3; \
	VPRORD s, b0, b0; VPRORD s, b1, b1; VPRORD s, b2, b2; VPRORD s, b3, b3

#define ROUND(m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15) \
	HALF(Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z8, Z9, Z10, Z11, Z12, Z13, Z14, Z15, m0, m2, m4, m6, $16, $12); \
	HALF(Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z8, Z9, Z10, Z11, Z12, Z13, Z14, Z15, m1, m3, m5, m7, $8, $7); \
	HALF(Z0, Z1, Z2, Z3, Z5, Z6, Z7, Z4, Z10, Z11, Z8, Z9, Z15, Z12, Z13, Z14, m8, m10, m12, m14, $16, $12); \
	HALF(Z0, Z1, Z2, Z3, Z5, Z6, Z7, Z4, Z10, Z11, Z8, Z9, Z15, Z12, Z13, Z14, m9, m11, m13, m15, $8, $7)

// func compress16(in *[16]*byte, key *[8]uint32, counters *[16]uint32, blocks int, flags, first, last uint32, out *[8][16]uint32)
TEXT ·compress16(SB), NOSPLIT, $0-56
	MOVQ in+0(FP), SI
	MOVQ key+8(FP), DI
	MOVQ counters+16(FP), R10
	MOVQ blocks+24(FP), CX
	MOVL flags+32(FP), AX
	MOVL first+36(FP), BX
	MOVL last+40(FP), DX
	XORQ R9, R9
	ORL  AX, BX                    // flags of the first message

	VPBROADCASTD 0(DI), Z0
	VPBROADCASTD 4(DI), Z1
	VPBROADCASTD 8(DI), Z2
	VPBROADCASTD 12(DI), Z3
	VPBROADCASTD 16(DI), Z4
	VPBROADCASTD 20(DI), Z5
	VPBROADCASTD 24(DI), Z6
	VPBROADCASTD 28(DI), Z7

next:
	CMPQ CX, $1
	JNE  more
	ORL  DX, BX                    // and of the last one, which may be the same

more:
	LOAD(0, Z16); LOAD(1, Z17); LOAD(2, Z18); LOAD(3, Z19)
	LOAD(4, Z20); LOAD(5, Z21); LOAD(6, Z22); LOAD(7, Z23)
	LOAD(8, Z24); LOAD(9, Z25); LOAD(10, Z26); LOAD(11, Z27)
	LOAD(12, Z28); LOAD(13, Z29); LOAD(14, Z30); LOAD(15, Z31)
	TRANSPOSE

	MOVL $0x6A09E667, R8
	VPBROADCASTD R8, Z8
	MOVL $0xBB67AE85, R8
	VPBROADCASTD R8, Z9
	MOVL $0x3C6EF372, R8
	VPBROADCASTD R8, Z10
	MOVL $0xA54FF53A, R8
	VPBROADCASTD R8, Z11
	VMOVDQU32 (R10), Z12
	VPXORD Z13, Z13, Z13
	MOVL $64, R8
	VPBROADCASTD R8, Z14
	VPBROADCASTD BX, Z15

	ROUNDS

	VPXORD Z8, Z0, Z0
	VPXORD Z9, Z1, Z1
	VPXORD Z10, Z2, Z2
	VPXORD Z11, Z3, Z3
	VPXORD Z12, Z4, Z4
	VPXORD Z13, Z5, Z5
	VPXORD Z14, Z6, Z6
	VPXORD Z15, Z7, Z7

	ADDQ $64, R9
	MOVL AX, BX
	DECQ CX
	JNZ  next

	MOVQ out+48(FP), DI
	VMOVDQU32 Z0, 0(DI)
	VMOVDQU32 Z1, 64(DI)
	VMOVDQU32 Z2, 128(DI)
	VMOVDQU32 Z3, 192(DI)
	VMOVDQU32 Z4, 256(DI)
	VMOVDQU32 Z5, 320(DI)
	VMOVDQU32 Z6, 384(DI)
	VMOVDQU32 Z7, 448(DI)
	VZEROUPPER
	RET
