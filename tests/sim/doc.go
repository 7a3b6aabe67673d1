// Package sim runs a whole cluster in one process, in virtual time, from a seed.
//
// What is real: package replication, unchanged, with its goroutines. What is a
// model, with faults: the pool of each node (store), the network (network), raft
// with the rules of its state machine (court), the clock and the process (process),
// the device server's door with its sessions (door), and hosts (client).
//
// A run (world) lives in a bubble of testing/synctest: time stands still while any
// goroutine can run and then jumps to the next timer. Every choice is drawn from the
// seed. Which of several runnable goroutines goes first is drawn too when the binary
// is built with the runtime of ./overlay (make sim does so): then two runs of a seed
// are the same to the last event, which their trace hashes prove.
//
// A run has a phase with faults (a random subset of kinds, faults.go), then all of them
// heal, and everything must work again within a bounded time (LIVE). The checks:
//
//	history     each 4 KiB block is a register with one writer: a read returns a version
//	            that is not older than the newest acknowledged or ever returned when the
//	            read began, and a version that its writer gave up never comes back (I1,
//	            I2, I9, I13, register.go)
//	copies      when a write is acknowledged, every recorded in-sync replica has it on its
//	            disk (I5, I6); at the end all are equal, ordered state too (I7)
//	owners      at no inspected instant two nodes serve (I3); promises never go back (I4)
//	locks       COMPARE AND WRITE never grants a lock twice (I2)
//	fencing     nothing of a fenced host lands after the change of the ordered state was
//	            acknowledged, or follows it in the stream (I12, order.go)
//	snapshots   one holds what a read could have returned that lasted as long as taking it,
//	            and is the same on every node (ORDERED, I7, snapshot.go); each copy has those
//	            that are recorded; a rollback is whole (C6, C7, rollback.go); those of a group
//	            are of one moment (group.go)
//	births      a volume that begins as a snapshot holds what that held (C8, birth.go)
//	copies      that come and go are filled, and freed (M8, placing.go)
//	power       what is only written may go with it, from the end, and nothing else (W6,
//	            unflushed.go)
//	names       the number of an operation names one operation, on every disk, for ever
//	            (ORDERED, order.go)
//
// A scenario (scenario*_test.go) is a short story of faults that is told exactly, without
// a seed's choices. Rules can be switched off one at a time (build tag mutants), and
// testdata/mutants.txt says which scenario notices.
package sim
