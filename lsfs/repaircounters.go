package lsfs

import "context"

// RepairCounters opens a pool that no process serves for writing, makes reference
// counts and live bytes what the maps say, and closes it again with a checkpoint. It
// returns how many were wrong. Where a map cannot be read nothing is changed: then no
// count can be trusted.
func RepairCounters(ctx context.Context, c Config) (corrected uint64, err error) {
	c.ScrubInterval, c.ScrubFrom = -1, ScrubState{}
	s, err := Open(ctx, c)
	if err != nil {
		return 0, err
	}
	defer func() {
		if e := s.Close(); err == nil {
			err = e
		}
	}()
	s.scrub.mu.Lock()
	s.scrub.full = true
	s.scrub.mu.Unlock()
	if err := s.scrubReferences(ctx); err != nil {
		return 0, err
	}
	return s.Scrub().Current.Counters, s.checkpoint()
}
