package iscsi

import "time"

// Limits bound what initiators can make the target hold or wait for (BOUNDED).
// A zero field takes the default that DefaultLimits gives.
type Limits struct {
	// LoginTime is the time for a whole login; then the connection is closed.
	LoginTime time.Duration
	// HalfOpen bounds connections in login phase, HalfOpenPerAddress those of one
	// source address. At a bound the oldest one gives way to the newcomer, so that
	// idle connections keep nobody out.
	HalfOpen           int
	HalfOpenPerAddress int
	// ConnectionsPerAddress bounds logged-in connections of one source address,
	// SessionsPerInitiator the sessions of one initiator name, Sessions those of
	// the target. Above, logins fail with "out of resources".
	ConnectionsPerAddress int
	SessionsPerInitiator  int
	Sessions              int
	// LoginSegment is the longest data segment in login phase, LoginText the sum
	// before authentication, both bytes. Above, the login fails.
	LoginSegment int
	LoginText    int
	// NegotiationText is the longest text put together with C bits, bytes.
	NegotiationText int
	// LoginRounds bounds the exchanges of a login, AuthRounds those before it is
	// authenticated.
	LoginRounds int
	AuthRounds  int
	// FailedLogins is how many failed authentications per minute, address and name
	// are answered at once; further answers wait for FailedLoginDelay.
	FailedLogins     int
	FailedLoginDelay time.Duration
	// Window is the number of commands that a session may have outstanding.
	// Immediate bounds immediate commands beside it, TaskManagement outstanding
	// task management functions; above these two: Reject 06h.
	Window         int
	Immediate      int
	TaskManagement int
	// Buffers bounds the memory for data in transfer, bytes; one session gets at
	// most a quarter. R2Ts and reads wait for memory; writes that send data unasked
	// end with BUSY or TASK SET FULL.
	Buffers int64
	// Unsent bounds the bytes of replies that the initiator does not take; at the
	// bound no more of its PDUs are read. After WriteTime the connection is closed,
	// also that of an initiator which takes so long to send one PDU.
	Unsent    int
	WriteTime time.Duration
	// PingAfter is the silence after which the initiator is pinged, PingTime the
	// time it has to say something; then the connection is closed.
	PingAfter time.Duration
	PingTime  time.Duration
	// GapTime is how long a missing command number is waited for.
	GapTime time.Duration
	// LogoutTime is how long a logout waits for the session's tasks.
	LogoutTime time.Duration
}

// DefaultLimits returns the limits that a zero Limits stands for.
func DefaultLimits() Limits {
	return Limits{
		LoginTime:             15 * time.Second,
		HalfOpen:              128,
		HalfOpenPerAddress:    64,
		ConnectionsPerAddress: 16,
		SessionsPerInitiator:  8,
		Sessions:              256,
		LoginSegment:          8 << 10,
		LoginText:             64 << 10,
		NegotiationText:       16 << 10,
		LoginRounds:           32,
		AuthRounds:            10,
		FailedLogins:          5,
		FailedLoginDelay:      3 * time.Second,
		Window:                128,
		Immediate:             4,
		TaskManagement:        8,
		Buffers:               256 << 20,
		Unsent:                4 << 20,
		WriteTime:             30 * time.Second,
		PingAfter:             15 * time.Second,
		PingTime:              15 * time.Second,
		GapTime:               30 * time.Second,
		LogoutTime:            10 * time.Second,
	}
}

// withDefaults replaces every field that is not positive by its default.
func (l Limits) withDefaults() Limits {
	d := DefaultLimits()
	or(&l.LoginTime, d.LoginTime)
	or(&l.HalfOpen, d.HalfOpen)
	or(&l.HalfOpenPerAddress, d.HalfOpenPerAddress)
	or(&l.ConnectionsPerAddress, d.ConnectionsPerAddress)
	or(&l.SessionsPerInitiator, d.SessionsPerInitiator)
	or(&l.Sessions, d.Sessions)
	or(&l.LoginSegment, d.LoginSegment)
	or(&l.LoginText, d.LoginText)
	or(&l.NegotiationText, d.NegotiationText)
	or(&l.LoginRounds, d.LoginRounds)
	or(&l.AuthRounds, d.AuthRounds)
	or(&l.FailedLogins, d.FailedLogins)
	or(&l.FailedLoginDelay, d.FailedLoginDelay)
	or(&l.Window, d.Window)
	or(&l.Immediate, d.Immediate)
	or(&l.TaskManagement, d.TaskManagement)
	or(&l.Buffers, d.Buffers)
	or(&l.Unsent, d.Unsent)
	or(&l.WriteTime, d.WriteTime)
	or(&l.PingAfter, d.PingAfter)
	or(&l.PingTime, d.PingTime)
	or(&l.GapTime, d.GapTime)
	or(&l.LogoutTime, d.LogoutTime)
	return l
}

func or[T int | int64 | time.Duration](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}
