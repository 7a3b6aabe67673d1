package scsi

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

const (
	// maxTokens bounds the tokens of one unit that are valid. Beyond it the oldest
	// that was used to its end makes room, or POPULATE TOKEN is refused.
	maxTokens = 64
	// maxTokenRecords bounds all, those being removed too.
	maxTokenRecords = 96
	// maxTokenBytes bounds what they take of the ordered state.
	maxTokenBytes = 16 << 10
	// maxAnnexBytes bounds the annex of one unit.
	maxAnnexBytes = 64 << 30
	// maxTokenRanges is MAXIMUM RANGE DESCRIPTORS.
	maxTokenRanges = 64
)

// tokenStatus is where a token is in its life. Part of the wire and disk formats,
// do not change.
//
//	filling -> ready -> spent -> expired, deleted or evicted -> removed
type tokenStatus uint8

const (
	tokenFilling tokenStatus = 1 // POPULATE TOKEN is at work
	tokenReady   tokenStatus = 2
	tokenSpent   tokenStatus = 3 // ready, and was used to its end: may make room
	tokenExpired tokenStatus = 4 // from here on the annex is being emptied
	tokenDeleted tokenStatus = 5
	tokenEvicted tokenStatus = 6
)

func (st tokenStatus) usable() bool { return st == tokenReady || st == tokenSpent }
func (st tokenStatus) ending() bool { return st >= tokenExpired }

// tokenRange is a run of a token's data in the annex.
type tokenRange struct {
	off   uint64 // bytes from the beginning of the annex, a multiple of 512
	bytes uint64 // a multiple of 512
}

// cover is the range in whole blocks.
func (r tokenRange) cover() (start, end uint64) {
	return r.off &^ (grainBytes - 1), (r.off + r.bytes + grainBytes - 1) &^ (grainBytes - 1)
}

// tokenRecord is a ROD token in the ordered state of the unit whose data it
// represents: a copy of its ranges at one point in time, kept in the annex of the
// volume. A record of a published state is never modified.
type tokenRecord struct {
	id      uint64
	secret  [sha256.Size]byte // the hash of the token's secret
	status  tokenStatus
	shift   uint8  // log2 of the logical block
	timeout uint16 // seconds without use
	uses    uint32 // counts renewals: every node measures the inactivity by itself
	ranges  []tokenRange
}

func (r *tokenRecord) bytes() (n uint64) {
	for _, x := range r.ranges {
		n += x.bytes
	}
	return n
}

// The section of the tokens: for each
//
//	0 id 8  8 SHA-256 of the secret 32  40 status  41 log2 of the block  42 timeout 2
//	44 uses 4  48 number of ranges  49 ranges of 9 bytes: annex offset 5, length 4, in sectors
//
// all big-endian. Part of the wire and disk formats, do not change.
const (
	tokenRecordBytes = 49
	tokenRangeBytes  = 9
	sectorShift      = 9
)

func (st *luState) putTokens(b []byte) []byte {
	for _, r := range st.tokens {
		b = binary.BigEndian.AppendUint64(b, r.id)
		b = append(b, r.secret[:]...)
		b = append(b, byte(r.status), r.shift)
		b = binary.BigEndian.AppendUint16(b, r.timeout)
		b = binary.BigEndian.AppendUint32(b, r.uses)
		b = append(b, byte(len(r.ranges)))
		for _, x := range r.ranges {
			off := x.off >> sectorShift
			b = append(b, byte(off>>32))
			b = binary.BigEndian.AppendUint32(b, uint32(off))
			b = binary.BigEndian.AppendUint32(b, uint32(x.bytes>>sectorShift))
		}
	}
	return b
}

func (st *luState) getTokens(b []byte) error {
	st.tokens = nil
	for len(b) > 0 {
		if len(b) < tokenRecordBytes || len(b) < tokenRecordBytes+tokenRangeBytes*int(b[48]) || len(st.tokens) == maxTokenRecords {
			return fmt.Errorf("%w: token %d", errState, len(st.tokens))
		}
		r := &tokenRecord{
			id: binary.BigEndian.Uint64(b), status: tokenStatus(b[40]), shift: b[41],
			timeout: binary.BigEndian.Uint16(b[42:]), uses: binary.BigEndian.Uint32(b[44:]),
		}
		copy(r.secret[:], b[8:])
		n := int(b[48])
		if n == 0 || n > maxTokenRanges || r.shift < sectorShift || r.shift > 12 || r.status < tokenFilling || r.status > tokenEvicted {
			return fmt.Errorf("%w: token %d", errState, len(st.tokens))
		}
		b = b[tokenRecordBytes:]
		for range n {
			x := tokenRange{
				off:   (uint64(b[0])<<32 | uint64(binary.BigEndian.Uint32(b[1:]))) << sectorShift,
				bytes: uint64(binary.BigEndian.Uint32(b[5:])) << sectorShift,
			}
			if _, end := x.cover(); x.bytes == 0 || end > replication.AnnexBytes {
				return fmt.Errorf("%w: token %d lies outside of the annex", errState, len(st.tokens))
			}
			r.ranges = append(r.ranges, x)
			b = b[tokenRangeBytes:]
		}
		st.tokens = append(st.tokens, r)
	}
	return nil
}

// token returns a record, or nil.
func (st *luState) token(id uint64) *tokenRecord {
	for _, r := range st.tokens {
		if r.id == id {
			return r
		}
	}
	return nil
}

// withToken returns the tokens with one replaced, or without it for nil.
func (st *luState) withToken(id uint64, next *tokenRecord) []*tokenRecord {
	all := make([]*tokenRecord, 0, len(st.tokens))
	for _, r := range st.tokens {
		switch {
		case r.id != id:
			all = append(all, r)
		case next != nil:
			all = append(all, next)
		}
	}
	return all
}

// setToken is an edit: the state with a token changed as change says.
func (st *luState) setToken(r *tokenRecord, change func(*tokenRecord)) *luState {
	next := st.edited(eventOther, portID{})
	changed := *r
	change(&changed)
	next.tokens = st.withToken(r.id, &changed)
	return next
}

// reserveToken is an edit: the state with a new token of these ranges, each of
// which gets a place in the annex that lies to the pages of the map as the range
// itself does (sources, in bytes of the volume), so that clones share pages. When
// there are too many tokens, the oldest that was used to its end is evicted.
func (st *luState) reserveToken(r *tokenRecord, sources []tokenRange) (*luState, error) {
	next := st.edited(eventOther, portID{})
	next.tokens = slices.Clone(st.tokens)
	live := 0
	for _, x := range next.tokens {
		if !x.status.ending() {
			live++
		}
	}
	if live >= maxTokens {
		i := slices.IndexFunc(next.tokens, func(x *tokenRecord) bool { return x.status == tokenSpent })
		if i < 0 {
			return nil, &refusal{senseNoToken}
		}
		gone := *next.tokens[i]
		gone.status = tokenEvicted
		next.tokens[i] = &gone
	}
	if len(next.tokens) >= maxTokenRecords {
		return nil, &refusal{senseNoToken}
	}
	type span struct{ start, end uint64 }
	var taken []span
	used := r.bytes()
	for _, x := range next.tokens {
		for _, y := range x.ranges {
			start, end := y.cover()
			taken = append(taken, span{start, end})
			used += end - start
		}
	}
	if used > maxAnnexBytes {
		return nil, &refusal{senseNoROD}
	}
	slices.SortFunc(taken, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	placed := *r
	placed.ranges = nil
	from := 0 // the gap before taken[from] is the first that may have room
	at := uint64(0)
	for _, src := range sources {
		start, end := src.cover()
		size, lie := end-start, start%clonePageBytes
		for {
			place := at&^(clonePageBytes-1) + lie
			if place < at {
				place += clonePageBytes
			}
			if from < len(taken) && place+size > taken[from].start {
				at = max(at, taken[from].end)
				from++
				continue
			}
			if place+size > replication.AnnexBytes {
				return nil, &refusal{senseNoROD}
			}
			placed.ranges = append(placed.ranges, tokenRange{off: place + src.off - start, bytes: src.bytes})
			at = place + size
			break
		}
	}
	next.tokens = append(next.tokens, &placed)
	if len(next.putTokens(nil)) > maxTokenBytes {
		return nil, &refusal{senseNoToken}
	}
	return next, nil
}

// rodToken is the token of a record, as POPULATE TOKEN returns it.
func (s *Server) rodToken(u *unitConfig, r *tokenRecord, secret [cdb.TokenSecretBytes]byte) *[cdb.TokenBytes]byte {
	t := cdb.Token{
		Type: cdb.RODPointInTime, ID: r.id, NAA: u.NAA, Bytes: r.bytes(),
		BlockBytes: u.LogicalBlock, Target: []byte(s.target), Secret: secret,
	}
	b := new([cdb.TokenBytes]byte)
	t.Encode(b)
	return b
}
