//go:build race

package replication

// slowdown is how much more time the protocol gets where its code runs slower: a node
// that takes a few hundred milliseconds for want of a processor is not to be taken over.
const slowdown = 4
