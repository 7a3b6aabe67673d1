package pdu

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strconv"
)

// Errors of text parsing.
var (
	// ErrText: a pair without NUL, without "=", with an empty or overlong key.
	ErrText = errors.New("malformed text")
	// ErrTooManyKeys: more pairs than the caller takes.
	ErrTooManyKeys = errors.New("too many text keys")
	// ErrValue: a number or binary value that does not read as one.
	ErrValue = errors.New("malformed text value")
)

// maxKeyLen is the longest key name (RFC 7143 section 6.1), bytes.
const maxKeyLen = 63

// Pair is one key=value of a text (RFC 7143 section 6.1).
type Pair struct {
	Key, Value string
}

// ParseText splits a text into its pairs, at most limit of them. Each pair ends
// with a NUL. Lengths of values are the caller's to check.
func ParseText(text []byte, limit int) ([]Pair, error) {
	var pairs []Pair
	for len(text) > 0 {
		end := bytes.IndexByte(text, 0)
		if end < 0 {
			return nil, ErrText
		}
		eq := bytes.IndexByte(text[:end], '=')
		if eq < 1 || eq > maxKeyLen || !validKey(text[:eq]) {
			return nil, ErrText
		}
		if len(pairs) >= limit {
			return nil, ErrTooManyKeys
		}
		pairs = append(pairs, Pair{string(text[:eq]), string(text[eq+1 : end])})
		text = text[end+1:]
	}
	return pairs, nil
}

// validKey tells whether a key has only the characters of a standard-label (RFC
// 7143 section 6.1) and the underscore that the CHAP keys use.
func validKey(key []byte) bool {
	for _, c := range key {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '.', c == '-', c == '+', c == '@', c == '_', c == '#':
		default:
			return false
		}
	}
	return true
}

// AppendText appends one pair with its NUL to dst.
func AppendText(dst []byte, key, value string) []byte {
	dst = append(dst, key...)
	dst = append(dst, '=')
	dst = append(dst, value...)
	return append(dst, 0)
}

// ParseNumber reads a numerical value, decimal or 0x hexadecimal.
func ParseNumber(value string) (uint64, error) {
	digits, base := value, 10
	if hasBasePrefix(value, 'x') {
		digits, base = value[2:], 16
	}
	if digits == "" || digits[0] == '+' || digits[0] == '-' {
		return 0, ErrValue
	}
	n, err := strconv.ParseUint(digits, base, 64)
	if err != nil {
		return 0, ErrValue
	}
	return n, nil
}

// ParseBinary decodes a large binary value, 0x hexadecimal or 0b base64, of at
// most limit bytes. An odd number of hexadecimal digits stands for a leading zero.
func ParseBinary(value string, limit int) ([]byte, error) {
	switch {
	case hasBasePrefix(value, 'x'):
		digits := value[2:]
		if len(digits) == 0 || (len(digits)+1)/2 > limit {
			return nil, ErrValue
		}
		if len(digits)%2 == 1 {
			digits = "0" + digits
		}
		b, err := hex.DecodeString(digits)
		if err != nil {
			return nil, ErrValue
		}
		return b, nil
	case hasBasePrefix(value, 'b'):
		digits := value[2:]
		if len(digits) == 0 || base64.StdEncoding.DecodedLen(len(digits)) > limit+2 {
			return nil, ErrValue
		}
		b, err := base64.StdEncoding.Strict().DecodeString(digits)
		if err != nil || len(b) > limit || len(b) == 0 {
			return nil, ErrValue
		}
		return b, nil
	}
	return nil, ErrValue
}

// hasBasePrefix reports whether value begins with 0 and this letter in either case.
func hasBasePrefix(value string, letter byte) bool {
	return len(value) >= 2 && value[0] == '0' && value[1]|0x20 == letter
}

// FormatBinary encodes a binary value in hexadecimal.
func FormatBinary(b []byte) string { return "0x" + hex.EncodeToString(b) }
