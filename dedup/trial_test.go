package dedup

import (
	"strings"
	"testing"
)

// TestTrial: which of the blocks of a write are tried. c stands for a block that compresses, r for
// one that does not; capitals are those that were tried.
func TestTrial(t *testing.T) {
	for _, blocks := range []string{
		"CCCCCCCCCCCC",
		"RRRRRRRCRRRRRRRCRRRRRRRR",
		"RRRRRRRRrrrrrrrRrrrrrrrRrrr",
		"RRRRRRRRrrrccccCCC", // found again at the eighth
		"RRRRRRRRrrrrrrrCCRRRRRRRRrrrrrrrR",
	} {
		var trial Trial
		var got strings.Builder
		for _, b := range strings.ToLower(blocks) {
			enc := Raw
			if b == 'c' {
				enc = S2
			}
			if trial.Due() {
				trial.Tried(enc)
				b -= 'a' - 'A'
			}
			got.WriteRune(b)
		}
		if got.String() != blocks {
			t.Errorf("%s was tried as %s", blocks, &got)
		}
	}
}
