//go:build !race

package replication

const slowdown = 1
