package scsi

import (
	"fmt"
	"testing"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// The class of every command for reservations. A row of the command table that
// is missing here fails the test: a new command must be put into its class
// deliberately, by what it does and not by the direction of its data.
var classOf = map[string]Access{
	"TEST UNIT READY":                    AccessAny,
	"READ CAPACITY(10)":                  AccessAny,
	"READ CAPACITY(16)":                  AccessAny,
	"REPORT TARGET PORT GROUPS":          AccessAny,
	"REPORT IDENTIFYING INFORMATION":     AccessAny,
	"REPORT TIMESTAMP":                   AccessAny,
	"LOG SENSE":                          AccessAny,
	"RECEIVE COPY STATUS(LID1)":          AccessAny,
	"RECEIVE COPY STATUS(LID4)":          AccessAny,
	"RECEIVE COPY FAILURE DETAILS(LID1)": AccessAny,
	"RECEIVE COPY OPERATING PARAMETERS":  AccessAny,
	"EXTENDED COPY(LID1)":                AccessAny, // it decides itself, for source and destination
	"COPY OPERATION ABORT":               AccessAny, // of the nexus's own
	"RECEIVE ROD TOKEN INFORMATION":      AccessAny,
	"REPORT ALL ROD TOKENS":              AccessAny,
	"RESERVE(6)":                         AccessAny, // it decides itself
	"RESERVE(10)":                        AccessAny,
	"INQUIRY":                            AccessAlways,
	"REPORT LUNS":                        AccessAlways,
	"REQUEST SENSE":                      AccessAlways,
	"RELEASE(6)":                         AccessAlways,
	"RELEASE(10)":                        AccessAlways,
	"READ(6)":                            AccessRead,
	"READ(10)":                           AccessRead,
	"READ(12)":                           AccessRead,
	"READ(16)":                           AccessRead,
	"VERIFY(10)":                         AccessRead,
	"VERIFY(12)":                         AccessRead,
	"VERIFY(16)":                         AccessRead,
	"PRE-FETCH(10)":                      AccessRead,
	"PRE-FETCH(16)":                      AccessRead,
	"GET LBA STATUS":                     AccessRead,
	"MODE SENSE(6)":                      AccessRead,
	"MODE SENSE(10)":                     AccessRead,
	"READ BUFFER":                        AccessRead,
	"READ BUFFER(10)":                    AccessRead,
	"READ DEFECT DATA(10)":               AccessRead,
	"READ DEFECT DATA(12)":               AccessRead,
	"RECEIVE DIAGNOSTIC RESULTS":         AccessRead,
	"POPULATE TOKEN":                     AccessRead,
	"WRITE(6)":                           AccessWrite,
	"WRITE(10)":                          AccessWrite,
	"WRITE(12)":                          AccessWrite,
	"WRITE(16)":                          AccessWrite,
	"WRITE AND VERIFY(10)":               AccessWrite,
	"WRITE AND VERIFY(12)":               AccessWrite,
	"WRITE AND VERIFY(16)":               AccessWrite,
	"WRITE SAME(10)":                     AccessWrite,
	"WRITE SAME(16)":                     AccessWrite,
	"WRITE ATOMIC(16)":                   AccessWrite,
	"ORWRITE(16)":                        AccessWrite,
	"UNMAP":                              AccessWrite,
	"COMPARE AND WRITE":                  AccessWrite,
	"SYNCHRONIZE CACHE(10)":              AccessWrite,
	"SYNCHRONIZE CACHE(16)":              AccessWrite,
	"MODE SELECT(6)":                     AccessWrite,
	"MODE SELECT(10)":                    AccessWrite,
	"LOG SELECT":                         AccessWrite,
	"SEND DIAGNOSTIC":                    AccessWrite,
	"WRITE BUFFER":                       AccessWrite,
	"SET IDENTIFYING INFORMATION":        AccessWrite,
	"SET TARGET PORT GROUPS":             AccessWrite,
	"SET TIMESTAMP":                      AccessWrite,
	"START STOP UNIT":                    AccessWrite, // unless harmless
	"PREVENT ALLOW MEDIUM REMOVAL":       AccessWrite, // unless harmless
	"WRITE USING TOKEN":                  AccessWrite,
	"REPORT SUPPORTED OPERATION CODES":   AccessRead,
	"REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS": AccessRead,
}

func TestAccessClasses(t *testing.T) {
	for _, c := range commands {
		want, ok := classOf[c.name]
		switch c.op {
		case cdb.PersistentReserveIn, cdb.PersistentReserveOut:
			want, ok = AccessAny, true // OUT decides itself
		case 0x48: // SANITIZE
			want, ok = AccessWrite, true
		}
		if !ok {
			t.Errorf("%02x/%02x %s: in no class", c.op, c.action, c.name)
		} else if c.access != want {
			t.Errorf("%02x/%02x %s: class %d, want %d", c.op, c.action, c.name, c.access, want)
		}
		if c.harmless != nil && c.op != cdb.StartStopUnit && c.op != cdb.PreventAllow {
			t.Errorf("%s is harmless for some CDBs?", c.name)
		}
	}
	for _, c := range []struct {
		op, byte4 byte
		want      Access
	}{
		{cdb.StartStopUnit, 1, AccessAny}, {cdb.StartStopUnit, 5, AccessAny}, {cdb.StartStopUnit, 0, AccessWrite},
		{cdb.StartStopUnit, 3, AccessWrite}, {cdb.StartStopUnit, 0x31, AccessWrite},
		{cdb.PreventAllow, 0, AccessAny}, {cdb.PreventAllow, 1, AccessWrite}, {cdb.PreventAllow, 2, AccessWrite},
	} {
		b := [16]byte{c.op, 0, 0, 0, c.byte4}
		cmd, _ := findCommand(&b)
		if got := cmd.accessOf(&b); got != c.want {
			t.Errorf("%s: class %d, want %d", fmt.Sprintf("%x", b[:6]), got, c.want)
		}
	}
}
