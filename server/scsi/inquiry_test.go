package scsi_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

func inq(evpd, page byte, alloc int) []byte {
	return []byte{cdb.Inquiry, evpd, page, byte(alloc >> 8), byte(alloc), 0}
}

func modeSense6(flags, page, subpage byte) []byte {
	return []byte{cdb.ModeSense6, flags, page, subpage, 255, 0}
}

func modeSense10(flags, page, subpage byte) []byte {
	return []byte{cdb.ModeSense10, flags, page, subpage, 0, 0, 0, 4, 0, 0}
}

func readCapacity16(alloc uint32) []byte {
	return rw16(cdb.ServiceActionIn16, cdb.ActionReadCapacity16, 0, alloc)
}

func maintenanceIn(action, option byte, op byte, sa uint16, alloc uint32) []byte {
	c := []byte{cdb.MaintenanceIn, action, option, op, byte(sa >> 8), byte(sa), 0, 0, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(c[6:], alloc)
	return c
}

func logSense(page, subpage byte, alloc byte) []byte {
	return []byte{cdb.LogSense, 0, 0x40 | page, subpage, 0, 0, 0, 0, alloc, 0}
}

func lbaStatus(lba uint64, alloc uint32) []byte {
	return rw16(cdb.ServiceActionIn16, cdb.ActionGetLBAStatus, lba, alloc)
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func wide(c *scsi.LUConfig) {
	c.NAA = unhex0("6001405aabbccddeeff0011223344556")
}

func unhex0(s string) []byte {
	b, _ := hex.DecodeString(s)
	return b
}

func twoNodes() []scsi.PortGroup {
	return []scsi.PortGroup{
		{ID: 2, Ports: []uint16{0x80}, State: scsi.ActiveNonOptimized},
		{ID: 1, Ports: []uint16{2}, State: scsi.ActiveOptimized, Preferred: true},
	}
}

// Whole replies, byte by byte.
func TestReplies(t *testing.T) {
	iqnHex := hex.EncodeToString([]byte(target))
	name := iqnHex + "00 00000000"[:2+2*((4-(len(target)+1)%4)%4)]
	name = strings.ReplaceAll(name, " ", "")
	portName := func(group string) string {
		s := target + ",t,0x" + group + "\x00"
		for len(s)%4 != 0 {
			s += "\x00"
		}
		return hex.EncodeToString([]byte(s))
	}
	length := func(h string) string { return hex.EncodeToString([]byte{byte(len(h) / 2)}) }
	serial := hex.EncodeToString([]byte("TS0123456789ABCDEF"))
	t10 := hex.EncodeToString([]byte("TWINSAN VIRTUAL DISK    ")) + serial
	ids := func(naa, uuid string) string {
		d := "0103 00" + length(naa) + naa + "0201 00" + length(t10) + t10 + uuid +
			"5194 0004 00000002" + "5195 0004 00000001" +
			"5398 00" + length(portName("0001")) + portName("0001") + "53a8 00" + length(name) + name
		d = strings.ReplaceAll(d, " ", "")
		return "0083 00" + length(d) + d
	}
	port := func(id, group string) string {
		n := portName(group)
		return "0000" + id + "0000 0000 0000" + hex.EncodeToString([]byte{0, byte(len(n)/2 + 4)}) + "5398 00" + length(n) + n
	}
	zero := func(n int) string { return strings.Repeat("00", n) }

	thin512 := func(*scsi.LUConfig) {}
	thin4k := func(c *scsi.LUConfig) { c.LogicalBlock = 4096 }
	native := func(c *scsi.LUConfig) { c.PhysicalBlock = 512; c.Thin = false }
	volatile := func(c *scsi.LUConfig) { c.VolatileCache = true; c.ReadOnly = true }
	paths := func(c *scsi.LUConfig) { c.Paths = twoNodes }
	room := func(c *scsi.LUConfig) {
		c.Space = func() scsi.Space {
			return scsi.Space{Total: 1000 * mib, Free: 600 * mib, Used: 12 * mib, Shared: 3 * mib}
		}
	}
	room4k := func(c *scsi.LUConfig) { thin4k(c); room(c) }
	moving := func(c *scsi.LUConfig) { c.Optimize = func(uint16, func(error)) {} }
	thresholds := func(size string) string {
		return "5c02" + size + zero(12) + "80010000 0000012c 80010000 000000c8 80010000 00000064"
	}

	for _, c := range []struct {
		name   string
		change func(*scsi.LUConfig)
		cdb    []byte
		want   string
	}{
		{"standard", thin512, inq(0, 0, 255), "00 00 06 12 5b 18 10 02" + hex.EncodeToString([]byte("TWINSAN VIRTUAL DISK    0001")) +
			zero(22) + "00a0 0960 0460 04c0" + zero(30)},
		{"standard, explicit paths", moving, inq(0, 0, 255), "00 00 06 12 5b 38 10 02" + hex.EncodeToString([]byte("TWINSAN VIRTUAL DISK    0001")) +
			zero(22) + "00a0 0960 0460 04c0" + zero(30)},
		{"page B2, thresholds", room, inq(1, 0xb2, 255), "00 b2 0004 0b e4 02 00"},
		{"page B2, thresholds, 4Kn", room4k, inq(1, 0xb2, 255), "00 b2 0004 08 e4 02 00"},
		{"MODE SENSE 01, thresholds", room, modeSense6(8, 1, 0), "0f 00 10 00 010a c0" + zero(4) + "80" + zero(4)},
		{"MODE SENSE 1C/FF, thresholds", room, modeSense6(8, 0x1c, 0xff), "37 00 10 00 1c0a 00 06" + zero(8) + thresholds("0024")},
		{"MODE SENSE 1C/02 changeable", room, modeSense6(8, 0x5c, 2), "2b 00 10 00 5c02 0024" + zero(12) + strings.Repeat("80000000 ffffffff", 3)},
		{"MODE SENSE 1C/02 default", room, modeSense10(8, 0x9c, 2), "002e 00 10 00 00 0000" + thresholds("0024")},

		{"LOG SENSE 00", thin512, logSense(0, 0, 255), "00 00 0003 00 19 2f"},
		{"LOG SENSE 00, thresholds", room, logSense(0, 0, 255), "00 00 0004 00 0c 19 2f"},
		{"LOG SENSE 00/FF", room, logSense(0, 0xff, 255), "40 ff 000a 0000 00ff 0c00 1900 2f00"},
		{"LOG SENSE 0C", room, logSense(0x0c, 0, 255), "8c 00 0024 0001 03 08 00000258 02 000000 0002 03 08 0000000c 01 000000 0100 03 08 00000003 01 000000"},
		{"LOG SENSE 19", thin512, logSense(0x19, 0, 255), "99 00 0050 0001 03 40" + zero(64) + "0003 03 08 00000006 00000001"},
		{"LOG SENSE 19 from 2", thin512, []byte{cdb.LogSense, 0, 0x59, 0, 0, 0, 2, 0, 255, 0}, "99 00 000c 0003 03 08 00000006 00000001"},
		{"LOG SENSE 2F", thin512, logSense(0x2f, 0, 255), "af 00 0008 0000 03 04 0000 ff 00"},

		{"READ BUFFER, data", thin512, []byte{cdb.ReadBuffer, 2, 0, 0, 0, 0, 0, 0, 255, 0}, ""},
		{"READ BUFFER, descriptor", thin512, []byte{cdb.ReadBuffer, 3, 7, 0, 0, 0, 0, 0, 255, 0}, "00000000"},
		{"READ BUFFER, echo descriptor", thin512, []byte{cdb.ReadBuffer, 0x0b, 0, 0, 0, 0, 0, 0, 255, 0}, "0000 1000"},
		{"GET LBA STATUS", thin512, lbaStatus(5, 255), "00000014 00000000 0000000000000005 00007ffb 01 000000"},
		{"GET LBA STATUS, 4Kn", thin4k, lbaStatus(0, 255), "00000014 00000000 0000000000000000 00001000 01 000000"},
		{"GET LBA STATUS, thick", native, lbaStatus(0, 255), "00000014 00000000 0000000000000000 00008000 00 000000"},

		{"page 00", thin512, inq(1, 0, 255), "00 00 000a 00 80 83 86 87 88 8f b0 b1 b2"},
		{"page 80", thin512, inq(1, 0x80, 255), "00 80 0012" + serial},
		{"page 83, NAA 3h", thin512, inq(1, 0x83, 1000), ids("3001020304050600", "010a 0012 1000 01020300"+zero(12))},
		{"page 83, NAA 6h", wide, inq(1, 0x83, 1000), ids("6001405aabbccddeeff0011223344556", "")},
		{"page 86", thin512, inq(1, 0x86, 255), "00 86 003c 00 07 00 01" + zero(56)},
		{"page 86 volatile", volatile, inq(1, 0x86, 255), "00 86 003c 00 07 01 01" + zero(56)},
		{"page 87", thin512, inq(1, 0x87, 255), "00 87 0004 3f ff 00 00"},
		{"page 88", paths, inq(1, 0x88, 1000), "00 88 00" + hex.EncodeToString([]byte{byte(2 * (16 + len(portName("0001"))/2))}) +
			port("0002", "0001") + port("0080", "0002")},
		{"page B0", thin512, inq(1, 0xb0, 255), "00 b0 003c 00 ff 0008 00004000 00000800 00004000 00100000 00000100 00000008 80000000 0000000000008000 00000800" + zero(16)},
		{"page B0, 4Kn", thin4k, inq(1, 0xb0, 255), "00 b0 003c 00 ff 0001 00000800 00000100 00000800 00100000 00000100 00000001 80000000 0000000000001000 00000100" + zero(16)},
		{"page B0, thick", native, inq(1, 0xb0, 255), "00 b0 003c 00 ff 0008 00004000 00000800 00004000" + zero(16) + "0000000000008000 00000800" + zero(16)},
		{"page B1", thin512, inq(1, 0xb1, 255), "00 b1 003c 0001 00 40" + zero(56)},
		{"page B1, thick", native, inq(1, 0xb1, 255), "00 b1 003c 0001" + zero(58)},
		{"page B2", thin512, inq(1, 0xb2, 255), "00 b2 0004 00 e4 02 00"},
		{"page B2, thick", native, inq(1, 0xb2, 255), "00 b2 0004 00000000"},

		{"READ CAPACITY(10)", thin512, []byte{cdb.ReadCapacity10, 0, 0, 0, 0, 0, 0, 0, 0, 0}, "00007fff 00000200"},
		{"READ CAPACITY(16)", thin512, readCapacity16(255), "0000000000007fff 00000200 00 03 c000" + zero(16)},
		{"READ CAPACITY(16), 4Kn", thin4k, readCapacity16(255), "0000000000000fff 00001000 00 00 c000" + zero(16)},
		{"READ CAPACITY(16), thick native", native, readCapacity16(32), "0000000000007fff 00000200 00 00 0000" + zero(16)},

		{"MODE SENSE(6) 01", thin512, modeSense6(0, 1, 0), "17 00 10 08 00008000 00000200 010a c0" + zero(9)},
		{"MODE SENSE(6) 08 DBD", thin512, modeSense6(8, 8, 0), "17 00 10 00 0812 00" + zero(17)},
		{"MODE SENSE(6) 08 WCE WP", volatile, modeSense6(8, 8, 0), "17 00 90 00 0812 04" + zero(17)},
		{"MODE SENSE(10) 0A", thin512, modeSense10(8, 0x0a, 0), "0012 00 10 00 00 0000 0a0a 02 10 00 40 0000 012c 0000"},
		{"MODE SENSE(10) 0A/01", thin512, modeSense10(8, 0x0a, 1), "0026 00 10 00 00 0000 4a01 001c 01" + zero(27)},
		{"MODE SENSE(10) 0A/FF", thin512, modeSense10(8, 0x0a, 0xff), "0032 00 10 00 00 0000 0a0a 02 10 00 40 0000 012c 0000 4a01 001c 01" + zero(27)},
		{"MODE SENSE(6) 1C", thin512, modeSense6(8, 0x1c, 0), "0f 00 10 00 1c0a 08 06" + zero(8)},
		{"MODE SENSE(10) 08 LLBAA", thin512, modeSense10(0x10, 8, 0), "002a 00 10 01 00 0010 0000000000008000 00000000 00000200 0812" + zero(18)},
		{"MODE SENSE(6) 3F", thin512, modeSense6(8, 0x3f, 0), "3b 00 10 00 010a c0" + zero(9) + "0812" + zero(18) + "0a0a 02 10 00 40 0000 012c 0000 1c0a 08 06" + zero(8)},
		{"MODE SENSE(6) 3F/FF default", thin512, modeSense6(8, 0xbf, 0xff), "5b 00 10 00 010a c0" + zero(9) + "0812" + zero(18) + "0a0a 02 10 00 40 0000 012c 0000 4a01 001c 01" + zero(27) + "1c0a 08 06" + zero(8)},
		{"MODE SENSE(6) 0A changeable", thin512, modeSense6(8, 0x4a, 0), "0f 00 10 00 0a0a 0000 08" + zero(7)},

		{"RTPG", paths, maintenanceIn(cdb.ActionReportTargetPorts, 0, 0, 0, 255), "00000018 80 8f 0001 00 00 00 01 0000 0002 01 8f 0002 00 00 00 01 0000 0080"},
		{"RTPG extended", paths, maintenanceIn(cdb.ActionReportTargetPorts|0x20, 0, 0, 0, 255), "0000001c 10 1e 0000 80 8f 0001 00 00 00 01 0000 0002 01 8f 0002 00 00 00 01 0000 0080"},
		{"RTPG of one", thin512, maintenanceIn(cdb.ActionReportTargetPorts, 0, 0, 0, 255), "0000000c 00 8f 0001 00 00 00 01 0000 0002"},
		{"RSTMF", thin512, maintenanceIn(cdb.ActionReportTaskManagement, 0, 0, 0, 4), "da000000"},
		{"RSTMF extended", thin512, maintenanceIn(cdb.ActionReportTaskManagement, 0x80, 0, 0, 255), "da00000c" + zero(12)},
		{"READ DEFECT DATA(10)", thin512, []byte{cdb.ReadDefectData10, 0, 0x1d, 0, 0, 0, 0, 0, 255, 0}, "001d0000"},
		{"READ DEFECT DATA(12)", thin512, []byte{cdb.ReadDefectData12, 0x1d, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0}, "001d0000 00000000"},
		{"RECEIVE DIAGNOSTIC", thin512, []byte{cdb.ReceiveDiagnosticResults, 1, 0, 0, 255, 0}, "00000001 00"},
		{"REQUEST SENSE", thin512, []byte{cdb.RequestSense, 0, 0, 0, 255, 0}, "70 00 00 00000000 0a 00000000 00 00 00 000000"},
		{"REQUEST SENSE, descriptor", thin512, []byte{cdb.RequestSense, 1, 0, 0, 255, 0}, "72 00 00 00 00 00 00 00"},
		{"REPORT LUNS", thin512, []byte{cdb.ReportLUNs, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, "00000008 00000000 0000000000000000"},
		{"REPORT LUNS, well known", thin512, []byte{cdb.ReportLUNs, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0}, "00000008 00000000 c101000000000000"},
		{"REPORT LUNS, all", thin512, []byte{cdb.ReportLUNs, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0}, "00000010 00000000 0000000000000000 c101000000000000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, 16*mib, c.change)
			want := unhex(t, c.want)
			res := r.good(r.read(c.cdb, 4096))
			if !bytes.Equal(res.in, want) || int(res.transfer) != len(want) {
				t.Fatalf("transfer %d\n got %x\nwant %x", res.transfer, res.in, want)
			}
			// Every expected length and, where there is one, every allocation length
			// cuts the same reply.
			for e := 0; e <= len(want)+1; e++ {
				res := r.good(r.read(c.cdb, e))
				if !bytes.Equal(res.in, want[:min(e, len(want))]) || int(res.transfer) != len(want) {
					t.Fatalf("E=%d: transfer %d, %x", e, res.transfer, res.in)
				}
			}
			at, width := allocAt(c.cdb)
			for a := 0; width > 0 && a <= min(len(want)+1, 255); a++ {
				cut := bytes.Clone(c.cdb)
				for i := range width {
					cut[at+i] = 0
				}
				cut[at+width-1] = byte(a)
				res := r.read(cut, 4096)
				if cut[0] == cdb.ReportLUNs && a < 16 || cut[1] == cdb.ActionReportTaskManagement && a < 4 {
					r.refused(res, badField)
					continue
				}
				if r.good(res); !bytes.Equal(res.in, want[:min(a, len(want))]) || int(res.transfer) != min(a, len(want)) {
					t.Fatalf("allocation length %d: transfer %d, %x", a, res.transfer, res.in)
				}
			}
		})
	}
}

func allocAt(c []byte) (at, width int) {
	switch c[0] {
	case cdb.Inquiry, cdb.ReceiveDiagnosticResults:
		return 3, 2
	case cdb.ModeSense6, cdb.RequestSense:
		return 4, 1
	case cdb.ModeSense10, cdb.ReadDefectData10, cdb.LogSense:
		return 7, 2
	case cdb.ReadBuffer:
		return 6, 3
	case cdb.ServiceActionIn16:
		return 10, 4
	case cdb.ReadCapacity10:
		return 0, 0
	default:
		return 6, 4
	}
}

func TestReplyRefusals(t *testing.T) {
	r := newRig(t, mib, nil)
	for _, c := range []struct {
		name  string
		cdb   []byte
		want  code
		field uint16
	}{
		{"INQUIRY, page without EVPD", inq(0, 0x80, 255), badField, 2},
		{"INQUIRY, unknown page", inq(1, 0x8e, 255), badField, 2},
		{"INQUIRY, CMDDT", inq(2, 0, 255), badField, 1},
		{"MODE SENSE, unknown page", modeSense6(0, 0x02, 0), badField, 2},
		{"MODE SENSE, unknown subpage", modeSense10(0, 0x0a, 7), badField, 2},
		{"MODE SENSE, saved", modeSense6(0, 0xff, 0), code{5, 0x39, 0}, 0},
		{"REPORT LUNS, selection", []byte{cdb.ReportLUNs, 0, 3, 0, 0, 0, 0, 0, 1, 0, 0, 0}, badField, 2},
		{"RTPG, format", maintenanceIn(cdb.ActionReportTargetPorts|0x40, 0, 0, 0, 255), badField, 1},
		{"RSOC, option", maintenanceIn(cdb.ActionReportOpcodes, 4, 0, 0, 255), badField, 2},
		{"unknown service action", maintenanceIn(0x1f, 0, 0, 0, 255), badField, 1},
		{"service action in", rw16(cdb.ServiceActionIn16, 0x13, 0, 255), badField, 1},
		{"READ CAPACITY(10), PMI", []byte{cdb.ReadCapacity10, 8: 1, 9: 0}, badField, 8},
		{"READ CAPACITY(16), PMI", []byte{cdb.ServiceActionIn16, cdb.ActionReadCapacity16, 13: 32, 14: 1, 15: 0}, badField, 14},
		{"GET LBA STATUS, report type", []byte{cdb.ServiceActionIn16, cdb.ActionGetLBAStatus, 13: 32, 14: 1, 15: 0}, badField, 14},
		{"GET LBA STATUS at the end", lbaStatus(mib/512, 255), badLBA, 0},
		{"GET LBA STATUS beyond", lbaStatus(1<<64-1, 255), badLBA, 0},
		{"LOG SENSE, unknown page", logSense(0x18, 0, 255), badField, 2},
		{"LOG SENSE, page that is not offered", logSense(0x0c, 0, 255), badField, 2},
		{"LOG SENSE, unknown subpage", logSense(0x19, 1, 255), badField, 3},
		{"LOG SENSE, SP", []byte{cdb.LogSense, 1, 0x59, 0, 0, 0, 0, 0, 255, 0}, badField, 1},
		{"LOG SENSE, parameter pointer", []byte{cdb.LogSense, 0, 0x59, 0, 0, 0, 4, 0, 255, 0}, badField, 5},
		{"LOG SENSE 00, parameter pointer", []byte{cdb.LogSense, 0, 0, 0, 0, 0, 4, 0, 255, 0}, badField, 5},
		{"LOG SELECT, SP", []byte{cdb.LogSelect, 1, 0, 0, 0, 0, 0, 0, 0, 0}, badField, 1},
		{"LOG SELECT, list", []byte{cdb.LogSelect, 2, 0, 0, 0, 0, 0, 0, 4, 0}, badField, 7},
		{"LOG SELECT, page", []byte{cdb.LogSelect, 2, 0x55, 0, 0, 0, 0, 0, 0, 0}, badField, 2},
		{"LOG SELECT, subpage", []byte{cdb.LogSelect, 2, 0x59, 3, 0, 0, 0, 0, 0, 0}, badField, 3},
		{"MODE SENSE 1C/02 without thresholds", modeSense6(0, 0x1c, 2), badField, 2},
		{"READ BUFFER, mode", []byte{cdb.ReadBuffer, 0, 0, 0, 0, 0, 0, 0, 255, 0}, badField, 1},
		{"READ BUFFER, mode specific", []byte{cdb.ReadBuffer, 0x2a, 0, 0, 0, 0, 0, 0, 255, 0}, badField, 1},
		{"READ BUFFER, another buffer", []byte{cdb.ReadBuffer, 2, 1, 0, 0, 0, 0, 0, 255, 0}, badField, 2},
		{"READ BUFFER, offset", []byte{cdb.ReadBuffer, 2, 0, 0, 0, 1, 0, 0, 255, 0}, badField, 3},
		{"READ BUFFER, nothing echoed", []byte{cdb.ReadBuffer, 0x0a, 0, 0, 0, 0, 0, 0, 255, 0}, code{5, 0x2c, 0}, 0},
		{"WRITE BUFFER, microcode", []byte{cdb.WriteBuffer, 5, 0, 0, 0, 0, 0, 0, 4, 0}, badField, 1},
		{"WRITE BUFFER, too much", []byte{cdb.WriteBuffer, 0x0a, 0, 0, 0, 0, 0, 0x10, 1, 0}, badField, 6},
		{"WRITE BUFFER, no data", []byte{cdb.WriteBuffer, 0x0a, 0, 0, 0, 0, 0, 0, 4, 0}, badListLen, 0},
		{"SET TARGET PORT GROUPS", []byte{cdb.MaintenanceOut, cdb.ActionSetTargetPorts, 11: 0}, badField, 1},
		{"RECEIVE DIAGNOSTIC, page", []byte{cdb.ReceiveDiagnosticResults, 1, 4, 0, 255, 0}, badField, 2},
		{"PERSISTENT RESERVE IN", []byte{cdb.PersistentReserveIn, 4, 0, 0, 0, 0, 0, 0, 255, 0}, badField, 1},
		{"NACA", []byte{cdb.TestUnitReady, 0, 0, 0, 0, 4}, badField, 5},
		{"START STOP, LOEJ", []byte{cdb.StartStopUnit, 0, 0, 0, 2, 0}, badField, 4},
	} {
		res := r.refused(r.read(c.cdb, 255), c.want)
		if c.want == badField && (res.sense.Field != c.field || res.sense.InData) {
			t.Errorf("%s: field pointer %d, want %d", c.name, res.sense.Field, c.field)
		}
	}
}

func TestCommandsWithoutEffect(t *testing.T) {
	r := newRig(t, mib, nil)
	for _, c := range [][]byte{
		{cdb.TestUnitReady, 0, 0, 0, 0, 0}, {cdb.TestUnitReady, 0xe0, 0, 0, 0, 0xc0},
		{cdb.StartStopUnit, 0, 0, 0, 0, 0}, {cdb.StartStopUnit, 1, 0, 0, 1, 0}, {cdb.StartStopUnit, 0, 0, 0, 0x30, 0},
		{cdb.PreventAllow, 0, 0, 0, 1, 0}, {cdb.SendDiagnostic, 4, 0, 0, 0, 0},
	} {
		r.good(r.none(c...))
	}
	// A stop from one initiator takes nothing from anyone.
	r.good(r.read(rw10(cdb.Read10, 0, 0, 1), 512))
	diag := []byte{cdb.SendDiagnostic, 0x10, 0, 0, 4, 0}
	r.good(r.write(diag, make([]byte, 4)))
	r.refused(r.write(diag, []byte{1, 0, 0, 0}), badParam)
	r.refused(r.write(diag, make([]byte, 3)), badListLen)
	r.refused(r.write([]byte{cdb.SendDiagnostic, 0x14, 0, 0, 4, 0}, make([]byte, 4)), badField)
}

func TestLargeCapacity(t *testing.T) {
	r := newRig(t, 4<<40, nil)
	if got := r.read([]byte{cdb.ReadCapacity10, 9: 0}, 8).in; !bytes.Equal(got[:4], []byte{255, 255, 255, 255}) {
		t.Errorf("READ CAPACITY(10) %x", got)
	}
	if got := r.read(readCapacity16(32), 32).in; be64(got) != 4<<40/512-1 {
		t.Errorf("READ CAPACITY(16) %x", got)
	}
	if got := r.read(modeSense6(0, 8, 0), 255).in; !bytes.Equal(got[4:8], []byte{255, 255, 255, 255}) {
		t.Errorf("block descriptor %x", got[4:12])
	}
	last := uint64(4<<40/512 - 1)
	r.good(r.write(rw16(cdb.Write16, 0, last, 1), pattern(512, 1)))
	r.refused(r.write(rw16(cdb.Write16, 0, last, 2), pattern(1024, 1)), badLBA)
}

// The report, dispatch and the CDB checks come from one table: what is listed
// works, what is not is refused, and every bit outside of the usage data that
// is refused is refused with a pointer at it.
func TestReportSupportedOperationCodes(t *testing.T) {
	for _, isThin := range []bool{true, false} {
		r := newRig(t, 64*mib, func(c *scsi.LUConfig) { c.Thin = isThin })
		type key struct {
			op byte
			sa uint16
		}
		listed := make(map[key]bool)
		hasActions := make(map[byte]bool)
		for _, timeouts := range []byte{0, 0x80} {
			all := r.good(r.read(maintenanceIn(cdb.ActionReportOpcodes, timeouts, 0, 0, 1<<16), 1<<16)).in
			if int(binary.BigEndian.Uint32(all)) != len(all)-4 {
				t.Fatal("command data length")
			}
			previous := -1
			for d := all[4:]; len(d) > 0; {
				k := key{d[0], binary.BigEndian.Uint16(d[2:])}
				order := int(k.op)<<16 | int(k.sa)
				if order <= previous {
					t.Errorf("%02x/%02x out of order", k.op, k.sa)
				}
				previous = order
				listed[k] = true
				hasActions[k.op] = d[5]&1 != 0
				if int(binary.BigEndian.Uint16(d[6:])) != cdb.Size(k.op) {
					t.Errorf("%02x: CDB length %d", k.op, d[7])
				}
				if (d[5]&2 != 0) != (timeouts != 0) {
					t.Errorf("%02x: CTDP", k.op)
				}
				d = d[8:]
				if timeouts != 0 {
					if d[1] != 0x0a || binary.BigEndian.Uint32(d[8:]) == 0 {
						t.Errorf("%02x: timeouts descriptor %x", k.op, d[:12])
					}
					d = d[12:]
				}
			}
		}
		if listed[key{cdb.Unmap, 0}] != isThin {
			t.Error("UNMAP is listed against the profile of the unit")
		}
		for op := range 256 {
			for sa := range uint16(33) {
				k := key{byte(op), sa}
				if !hasActions[k.op] && sa > 0 {
					break
				}
				one := r.good(r.read(maintenanceIn(cdb.ActionReportOpcodes, 3, k.op, k.sa, 255), 255)).in
				if listed[k] != (one[1]&7 == 3) || !listed[k] && one[1]&7 != 1 {
					t.Errorf("%02x/%02x: option 3 says %d, listed %v", op, sa, one[1], listed[k])
				}
				option := byte(1)
				if hasActions[k.op] {
					option = 2
				}
				if again := r.good(r.read(maintenanceIn(cdb.ActionReportOpcodes, option, k.op, k.sa, 255), 255)).in; !bytes.Equal(one, again) {
					t.Errorf("%02x/%02x: options 3 and %d differ", op, sa, option)
				}
				if listed[k] {
					r.refused(r.read(maintenanceIn(cdb.ActionReportOpcodes, 3-option, k.op, k.sa, 255), 255), badField)
					if size := cdb.Size(k.op); len(one) != 4+size || one[4] != k.op {
						t.Errorf("%02x/%02x: usage data %x", op, sa, one)
					}
					withTimeouts := r.good(r.read(maintenanceIn(cdb.ActionReportOpcodes, 0x83, k.op, k.sa, 255), 255)).in
					if withTimeouts[1] != 0x83 || len(withTimeouts) != len(one)+12 {
						t.Errorf("%02x/%02x: with timeouts %x", op, sa, withTimeouts)
					}
				}
				if sa > 31 {
					continue
				}
				c := make([]byte, 16)
				c[0], c[1] = k.op, byte(sa)
				res := r.none(c...)
				switch {
				case listed[k] && res.status == cdb.CheckCondition && res.code() == badOpcode:
					t.Errorf("%02x/%02x is listed and refused", op, sa)
				case !listed[k] && hasActions[k.op] && res.code() != badField:
					t.Errorf("%02x/%02x: %x for an unknown service action", op, sa, res.code())
				case !listed[k] && !hasActions[k.op] && res.code() != badOpcode:
					t.Errorf("%02x: %x for an unknown operation code", op, res.code())
				}
			}
		}
	}
}

func TestLUNsWithoutUnit(t *testing.T) {
	r := newRig(t, mib, nil)
	for _, lun := range []uint64{1 << 48, 0x4005 << 48, 0x0100 << 48, 7, cdb.WellKnownReportLUNs} {
		p := r.on(r.n, lun)
		in := func(c []byte) result { return p.run(command{cdb: c, read: true, expected: 255}) }
		wellKnown := lun == cdb.WellKnownReportLUNs
		want := byte(0x7f)
		if wellKnown {
			want = 0x1e
		}
		if res := r.good(in(inq(0, 0, 255))); res.in[0] != want || len(res.in) != 96 {
			t.Errorf("LUN %x: INQUIRY %x", lun, res.in)
		}
		if res := r.good(in(inq(1, 0, 255))); !bytes.Equal(res.in, []byte{want, 0, 0, 1, 0}) {
			t.Errorf("LUN %x: page 00 %x", lun, res.in)
		}
		r.refused(in(inq(1, 0x83, 255)), badField)
		sense, _, _ := cdb.ParseSense(r.good(in([]byte{cdb.RequestSense, 0, 0, 0, 255, 0})).in)
		luns := in([]byte{cdb.ReportLUNs, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0})
		ready := in([]byte{cdb.TestUnitReady, 0, 0, 0, 0, 0})
		if wellKnown {
			r.good(luns)
			r.good(ready)
			r.refused(in(rw10(cdb.Read10, 0, 0, 1)), badOpcode)
			if sense.Key != 0 {
				t.Errorf("sense %+v", sense)
			}
			continue
		}
		r.refused(luns, badLUN)
		r.refused(ready, badLUN)
		r.refused(in(rw10(cdb.Read10, 0, 0, 1)), badLUN)
		r.refused(in([]byte{0xff}), badLUN)
		if (code{sense.Key, sense.ASC, sense.ASCQ}) != badLUN {
			t.Errorf("LUN %x: REQUEST SENSE %+v", lun, sense)
		}
	}
	// LUN 0 answers with nothing mapped.
	r.s.RemoveLU(0)
	if res := r.good(r.read(inq(0, 0, 255), 255)); res.in[0] != 0x7f {
		t.Errorf("INQUIRY at an empty LUN 0: %02x", res.in[0])
	}
	if got := r.luns(r.n); len(got) != 0 {
		t.Errorf("REPORT LUNS %x", got)
	}
	r.refused(r.none(cdb.TestUnitReady, 0, 0, 0, 0, 0), badLUN)
}
