package scsi

import (
	"encoding/binary"
	"sync"
)

// echoBytes is the capacity of the echo buffer.
const echoBytes = 4096

// echoBuffer is a nexus's echo buffer (SPC-4 "READ BUFFER command", echo buffer
// mode): an initiator tests its path by what it wrote. There is one for all units
// of the nexus, so writing to one unit takes it from another.
type echoBuffer struct {
	mu   sync.Mutex
	lu   *logicalUnit // that it was written through; nil: nothing was
	data []byte       // up to echoBytes
}

// Modes of READ BUFFER and WRITE BUFFER. There is no buffer but the echo buffer,
// and no microcode to be loaded.
const (
	bufferData           = 0x02
	bufferDescriptor     = 0x03
	bufferEcho           = 0x0a
	bufferEchoDescriptor = 0x0b
)

// beginWriteBuffer is begin of WRITE BUFFER.
func beginWriteBuffer(_ *Server, t *Task) Verdict {
	const (
		modeField   = 1
		lengthField = 6
	)
	if t.CDB[modeField]&0x1f != bufferEcho {
		sense := invalidField(modeField)
		sense.Bit, sense.HasBit = 4, true
		return t.refuse(&sense)
	}
	want := allocField{at: lengthField, width: 3}.read(&t.CDB)
	switch {
	case want == 0:
		return Finished
	case want > echoBytes:
		sense := invalidField(lengthField)
		return t.refuse(&sense)
	case t.outExpected() < want:
		return t.refuse(&senseListLen)
	}
	t.Transfer, t.OutLen = want, want
	return WantData
}

func runWriteBuffer(s *Server, t *Task) {
	e := &t.Nexus.state.echo
	e.mu.Lock()
	e.lu = t.state.itl.lu
	e.data = append(e.data[:0], t.state.data...)
	e.mu.Unlock()
	s.conclude(t, nil)
}

// readBuffer is the reply of READ BUFFER.
func readBuffer(_ *Server, t *Task, b []byte) ([]byte, bool) {
	const (
		modeField   = 1
		idField     = 2
		offsetField = 3
	)
	switch t.CDB[modeField] & 0x1f {
	case bufferData:
		// One buffer, of no bytes.
		switch {
		case t.CDB[idField] != 0:
			return t.deny(invalidField(idField))
		case t.CDB[offsetField]|t.CDB[offsetField+1]|t.CDB[offsetField+2] != 0:
			return t.deny(invalidField(offsetField))
		}
		return b, true
	case bufferDescriptor:
		return append(b, 0, 0, 0, 0), true // no capacity, whatever the buffer
	case bufferEcho:
		e := &t.Nexus.state.echo
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.lu != t.state.itl.lu {
			return t.deny(senseSequence)
		}
		return append(b, e.data...), true
	case bufferEchoDescriptor:
		return binary.BigEndian.AppendUint16(append(b, 0, 0), echoBytes), true
	default:
		sense := invalidField(modeField)
		sense.Bit, sense.HasBit = 4, true
		return t.deny(sense)
	}
}
