//go:build !race

package lsfs

const raceEnabled = false
