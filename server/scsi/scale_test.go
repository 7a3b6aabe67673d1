package scsi_test

import (
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

// BenchmarkScale reads and writes 4 KiB on one unit, alone on its node and beside
// 255 others, each with a reservation and 40 registered nexuses: an I/O costs
// the same (BOUNDED by what it looks at: one grant).
func BenchmarkScale(b *testing.B) {
	for _, units := range []int{1, 256} {
		s := scsi.New(scsi.Config{Backend: memlu.New(mib), NodePort: 2, PortGroup: 1, TargetName: target})
		defer s.Close()
		registrations := 0
		for lun := range uint16(units) {
			lu := memlu.New(mib)
			if err := s.SetLU(unitConfig(lun, lu)); err != nil {
				b.Fatal(err)
			}
			s.SetAccess(lun, scsi.Visibility{Any: true})
			if units > 1 {
				lu.SetState(manyRegistrations(40))
				registrations += 40
			}
		}
		r := &rig{t: b, s: s}
		r.n = r.attach("iqn.2026-11.test:host-0", 0)
		at := r.on(r.n, uint64(units-1)<<48)
		for name, cmd := range map[string]command{
			"read":  {cdb: rw16(cdb.Read16, 0, 0, 8), read: true, expected: 4096},
			"write": {cdb: rw16(cdb.Write16, 0, 0, 8), write: true, expected: 4096, out: pattern(4096, 1)},
		} {
			b.Run(fmt.Sprintf("%s/units=%d/registrations=%d", name, units, registrations), func(b *testing.B) {
				at.t = b
				for b.Loop() {
					at.good(at.run(cmd))
				}
			})
		}
	}
}

// manyRegistrations is an encoded state in which n hosts are registered and the
// first of them holds a write exclusive reservation for registrants.
func manyRegistrations(n uint16) []byte {
	body := []byte{0, 0, 0, 9, 1, 5, 0, 0}
	body = binary.BigEndian.AppendUint16(body, n)
	body = binary.BigEndian.AppendUint16(body, n)
	for i := range n {
		name := fmt.Sprintf("iqn.2026-11.test:host-%d", i)
		body = append(append(body, byte(len(name))), name...)
	}
	for i := range n {
		body = binary.BigEndian.AppendUint64(body, uint64(i)+1)
		body = append(body, 0, 0, 0, 0, 0, byte(0))
		body = binary.BigEndian.AppendUint16(body, 2)
		body = binary.BigEndian.AppendUint16(body, i)
		body = append(body, 0)
	}
	state := []byte{1, 2, byte(len(body) >> 8), byte(len(body))}
	return append(state, body...)
}
