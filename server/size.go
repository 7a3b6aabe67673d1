package server

import (
	"fmt"
	"math/big"
	"strings"
)

// Size is a number of bytes that people write and read in powers of 1024:
// "2T", "2TiB" and "2tb" are all 2 x 2^40 bytes, "1.5G" is exact, "4096" is
// bytes. It is a flag value and a value of the configuration file.
type Size uint64

var sizeUnits = []struct {
	letter string
	shift  uint
}{{"P", 50}, {"T", 40}, {"G", 30}, {"M", 20}, {"K", 10}}

// ParseSize reads a size. It refuses what is not a whole number of bytes, is
// negative or does not fit 63 bits.
func ParseSize(s string) (Size, error) {
	text := strings.ToUpper(strings.TrimSpace(s))
	number, shift := text, uint(0)
	switch {
	case strings.HasSuffix(text, "IB"):
		number = strings.TrimSuffix(text, "IB")
	case strings.HasSuffix(text, "B"):
		number = strings.TrimSuffix(text, "B")
	}
	unit := false
	for _, u := range sizeUnits {
		if n, ok := strings.CutSuffix(number, u.letter); ok {
			number, shift, unit = n, u.shift, true
			break
		}
	}
	number = strings.TrimSpace(number)
	if number == "" || len(number) > 24 || strings.Trim(number, "0123456789.") != "" || (strings.HasSuffix(text, "IB") && !unit) {
		return 0, fmt.Errorf("%q is not a size: write a number and K, M, G, T or P (powers of 1024), like 2T", s)
	}
	r, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, fmt.Errorf("%q is not a size: write a number and K, M, G, T or P (powers of 1024), like 2T", s)
	}
	r.Mul(r, new(big.Rat).SetInt(new(big.Int).Lsh(big.NewInt(1), shift)))
	if !r.IsInt() {
		return 0, fmt.Errorf("size %q is not a whole number of bytes", s)
	}
	if !r.Num().IsInt64() {
		return 0, fmt.Errorf("size %q is too large", s)
	}
	return Size(r.Num().Int64()), nil
}

// String writes the size with a unit, rounded to a tenth above 1 KiB: "4 GiB", "1.5 TiB", "512 B".
func (s Size) String() string {
	for _, u := range sizeUnits {
		unit := uint64(1) << u.shift
		if uint64(s) < unit {
			continue
		}
		whole, rest := uint64(s)/unit, uint64(s)%unit
		tenth := (rest>>(u.shift-10)*10 + 512) >> 10
		if tenth == 10 {
			whole, tenth = whole+1, 0
		}
		if tenth == 0 {
			return fmt.Sprintf("%d %siB", whole, u.letter)
		}
		return fmt.Sprintf("%d.%d %siB", whole, tenth, u.letter)
	}
	return fmt.Sprintf("%d B", uint64(s))
}

// UnmarshalText reads a size from the configuration file.
func (s *Size) UnmarshalText(text []byte) error {
	v, err := ParseSize(string(text))
	if err == nil {
		*s = v
	}
	return err
}

// MarshalText writes the size exactly, for the configuration file.
func (s Size) MarshalText() ([]byte, error) {
	for _, u := range sizeUnits {
		if unit := uint64(1) << u.shift; s != 0 && uint64(s)%unit == 0 {
			return fmt.Appendf(nil, "%d%siB", uint64(s)/unit, u.letter), nil
		}
	}
	return fmt.Appendf(nil, "%d", uint64(s)), nil
}

// Set reads a size from the command line.
func (s *Size) Set(text string) error { return s.UnmarshalText([]byte(text)) }

// Type names the value in usage texts.
func (s *Size) Type() string { return "size" }
