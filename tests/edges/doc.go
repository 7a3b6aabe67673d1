// Package edges holds the test of the house: which package of the project may
// import which. It has no code of its own.
package edges
