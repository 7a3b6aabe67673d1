package scsi

// Access is the class of a command for reservations (SPC-4 "Commands allowed in
// the presence of various reservations"). It goes by the command, never by the
// direction of its data: UNMAP may carry none and still writes.
type Access uint8

const (
	// AccessAny is allowed whatever is reserved.
	AccessAny Access = iota
	// AccessRead conflicts with exclusive access.
	AccessRead
	// AccessWrite conflicts with write exclusive and exclusive access.
	AccessWrite
)

// Reservations knows who has reserved a logical unit.
type Reservations interface {
	// Conflicts says whether a command of this class from this nexus is to be
	// refused with RESERVATION CONFLICT. It is called for every command after unit
	// attentions and asymmetric access, concurrently; it must not block or allocate.
	Conflicts(n *Nexus, a Access) bool
}
