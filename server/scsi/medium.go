package scsi

import "github.com/twinsan/twinsan/server/scsi/cdb"

// mediumCommands are the rows of commands on the medium beyond reading and
// writing, of its logs and of its paths.
func mediumCommands() []*command {
	return []*command{
		{name: "WRITE BUFFER", op: cdb.WriteBuffer, access: AccessWrite, worksIn: inStandby | inUnavailable,
			usage:  cdb.Mask{1: 0x1f, 6: all, 7: all, 8: all},
			ignore: cdb.Mask{2: all, 3: all, 4: all, 5: all, 9: control}, begin: beginWriteBuffer, run: runWriteBuffer},
		{name: "READ BUFFER", op: cdb.ReadBuffer, access: AccessRead, worksIn: inStandby | inUnavailable,
			usage:  cdb.Mask{1: 0x1f, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all},
			ignore: cdb.Mask{9: control}, begin: beginReply, reply: readBuffer, alloc: allocField{at: 6, width: 3}},
		{name: "SANITIZE, OVERWRITE", op: cdb.Sanitize, actions: true, action: cdb.ActionSanitizeOverwrite,
			class: ClassSanitize, access: AccessWrite, writes: true, seconds: 65535,
			usage:  cdb.Mask{1: sanitizeImmediate | sanitizeUnrestricted, 7: all, 8: all},
			ignore: cdb.Mask{9: control}, begin: beginSanitize, run: runSanitize},
		{name: "SANITIZE, BLOCK ERASE", op: cdb.Sanitize, actions: true, action: cdb.ActionSanitizeBlockErase,
			class: ClassSanitize, access: AccessWrite, writes: true, seconds: 65535, offered: thin,
			usage:  cdb.Mask{1: sanitizeImmediate | sanitizeUnrestricted, 7: all, 8: all},
			ignore: cdb.Mask{9: control}, begin: beginSanitize, run: runSanitize},
		{name: "SANITIZE, EXIT FAILURE MODE", op: cdb.Sanitize, actions: true, action: cdb.ActionSanitizeExit,
			class: ClassSanitize, access: AccessWrite, writes: true,
			usage:  cdb.Mask{1: sanitizeImmediate | sanitizeUnrestricted, 7: all, 8: all},
			ignore: cdb.Mask{9: control}, begin: beginSanitize, run: runSanitize},
		{name: "LOG SELECT", op: cdb.LogSelect, class: ClassLog, access: AccessWrite, worksIn: inStandby,
			usage: cdb.Mask{1: 0x02, 2: all, 3: all, 7: all, 8: all}, ignore: cdb.Mask{9: control}, begin: beginLogSelect},
		{name: "LOG SENSE", op: cdb.LogSense, class: ClassLog, worksIn: inStandby,
			usage:  cdb.Mask{2: all, 3: all, 5: all, 6: all, 7: all, 8: all},
			ignore: cdb.Mask{9: control}, begin: beginReply, reply: logSense, alloc: allocField{at: 7, width: 2}},
		{name: "ORWRITE(16)", op: cdb.OrWrite16, class: ClassOrWrite, access: AccessWrite, writes: true,
			usage: cdb.Mask{1: dpoFUA, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all,
				10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{1: hint, 14: group, 15: control}, begin: beginWrite, run: runOrWrite},
		{name: "WRITE ATOMIC(16)", op: cdb.WriteAtomic16, class: ClassWriteAtomic, access: AccessWrite, writes: true, atomic: true,
			usage: cdb.Mask{1: dpoFUA, 2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all,
				10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{14: group, 15: control}, begin: beginWriteAtomic, run: runWriteAtomic},
		{name: "GET LBA STATUS", op: cdb.ServiceActionIn16, actions: true, action: cdb.ActionGetLBAStatus,
			class: ClassLBAStatus, access: AccessRead,
			usage: cdb.Mask{2: all, 3: all, 4: all, 5: all, 6: all, 7: all, 8: all, 9: all,
				10: all, 11: all, 12: all, 13: all},
			ignore: cdb.Mask{15: control}, begin: beginLBAStatus, run: runLBAStatus},
		{name: "SET TARGET PORT GROUPS", op: cdb.MaintenanceOut, actions: true, action: cdb.ActionSetTargetPorts,
			class: ClassPaths, access: AccessWrite, worksIn: inStandby | inUnavailable, seconds: 60, offered: explicit,
			usage:  cdb.Mask{6: all, 7: all, 8: all, 9: all},
			ignore: cdb.Mask{11: control}, begin: beginSetTargetPortGroups, run: runSetTargetPortGroups},
	}
}
