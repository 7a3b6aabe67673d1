package scsi_test

import (
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

// Any parameter list is answered, within the command's time; one that is refused
// as ILLEGAL REQUEST has touched nothing.
func FuzzThirdPartyCopy(f *testing.F) {
	r := newTokenRig(f, 64*mib, nil)
	fill(r.lu, 0, pattern(mib, 1))
	token := r.token(600, [2]uint64{3, 100}, [2]uint64{0, 2})
	f.Add(byte(cdb.ActionExtendedCopy), uint32(1), xcopyList(1, 0, bothUnits, blocks(0, 1, 5, 9, 100)))
	f.Add(byte(cdb.ActionExtendedCopy), uint32(1), xcopyList(1, 3, bothUnits, (&cdb.CopySegment{Type: cdb.SegmentBytes, Count: 1 << 20, DestLBA: 8}).Append(nil)))
	f.Add(byte(cdb.ActionPopulateToken), uint32(2), populateList(3, 60, cdb.RODPointInTime, [2]uint64{1, 9}, [2]uint64{20, 9}))
	f.Add(byte(cdb.ActionWriteUsingToken), uint32(3), writeList(1, 2, token, [2]uint64{0, 8}, [2]uint64{64, 1000}))
	f.Add(byte(cdb.ActionWriteUsingToken), uint32(3), writeList(3, 0, token, [2]uint64{0, 8}))
	changes := func() (n uint64) {
		for _, v := range []*memlu.LU{r.lu, r.other, r.hidden} {
			for _, op := range []scsi.RequestOp{scsi.OpClone, scsi.OpWrite, scsi.OpUnmap, scsi.OpState} {
				n += v.Count(op)
			}
		}
		return n
	}
	f.Fuzz(func(t *testing.T, action byte, id uint32, list []byte) {
		r.t = t
		if len(list) > 8192 {
			return
		}
		idle(t, r)
		before := changes()
		n := uint32(len(list))
		c := command{cdb: withID(thirdParty(cdb.ThirdPartyCopyOut, action&0x1f, n), 6, id), write: n > 0, expected: n, out: list}
		if action&0x1f == cdb.ActionExtendedCopy {
			withID(c.cdb, 6, 0)
		}
		res := r.on(r.n, lun1).run(c)
		if res.status == cdb.CheckCondition && res.sense.Key == cdb.IllegalRequest && changes() != before {
			t.Errorf("refused with %x, yet something was changed", res.code())
		}
		for _, a := range []byte{cdb.ActionCopyStatus1, cdb.ActionCopyStatus4, cdb.ActionTokenInformation, cdb.ActionCopyFailureDetails, cdb.ActionAllTokens} {
			r.on(r.n, lun1).run(command{cdb: withID(thirdParty(cdb.ThirdPartyCopyIn, a, 4096), 2, id), read: true, expected: 4096})
		}
		if r.hidden.Count(scsi.OpRead)+r.hidden.Count(scsi.OpWrite)+r.hidden.Count(scsi.OpClone)+r.hidden.Count(scsi.OpUnmap) != 0 {
			t.Fatal("a unit was touched that the initiator does not see")
		}
	})
}

// idle waits until no copy of an earlier input is under way in the background:
// all that are admitted are, so as many as are possible can be.
func idle(t testing.TB, r *tokenRig) {
	t.Helper()
	eventually(t, "the condition", func() bool { return r.s.CopiesUnderWay() == 0 })
}
