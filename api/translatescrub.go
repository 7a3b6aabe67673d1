package api

import (
	"time"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

func scrubMessage(s *server.Scrub) *v1.Scrub {
	if s == nil {
		return nil
	}
	result := func(r *server.ScrubResult) *v1.ScrubResult {
		return &v1.ScrubResult{Started: stamp(r.Started), Finished: stamp(r.Finished), Blocks: r.Blocks, Pages: r.Pages, Bytes: r.Bytes,
			Damaged: r.Damaged, Repaired: r.Repaired, Lost: r.Lost, Counters: r.Counters}
	}
	return &v1.Scrub{Node: s.Node, Running: s.Running, Stopped: s.Stopped, FullSpeed: s.FullSpeed, Phase: s.Phase, Done: s.Done, LeftSeconds: int64(s.Left / time.Second),
		NextPass: stamp(s.NextPass), Reclaim: s.Reclaim, Current: result(&s.Current), Last: result(&s.Last), Lost: s.Lost}
}

func scrubOf(m *v1.Scrub) *server.Scrub {
	if m == nil {
		return nil
	}
	result := func(r *v1.ScrubResult) server.ScrubResult {
		return server.ScrubResult{Started: Time(r.GetStarted()), Finished: Time(r.GetFinished()), Blocks: r.GetBlocks(), Pages: r.GetPages(), Bytes: r.GetBytes(),
			Damaged: r.GetDamaged(), Repaired: r.GetRepaired(), Lost: r.GetLost(), Counters: r.GetCounters()}
	}
	return &server.Scrub{Node: m.Node, Running: m.Running, Stopped: m.Stopped, FullSpeed: m.FullSpeed, Phase: m.Phase, Done: m.Done, Left: time.Duration(m.LeftSeconds) * time.Second,
		NextPass: Time(m.NextPass), Reclaim: m.Reclaim, Current: result(m.Current), Last: result(m.Last), Lost: m.Lost}
}
