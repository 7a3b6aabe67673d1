package api

import (
	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

func mergeMessage(m *server.Merge) *v1.Merge {
	result := func(r *server.MergeResult) *v1.MergeResult {
		return &v1.MergeResult{Started: stamp(r.Started), Finished: stamp(r.Finished), Looked: r.Looked, Found: r.Found, Blocks: r.Blocks, Bytes: r.Bytes, Error: r.Error}
	}
	return &v1.Merge{Node: m.Node, On: m.On, Running: m.Running, Done: m.Done, CatalogueBytes: m.CatalogueBytes, Blocks: m.Blocks, Bytes: m.Bytes,
		Current: result(&m.Current), Last: result(&m.Last)}
}

func mergeOf(m *v1.Merge) *server.Merge {
	result := func(r *v1.MergeResult) server.MergeResult {
		return server.MergeResult{Started: Time(r.GetStarted()), Finished: Time(r.GetFinished()), Looked: r.GetLooked(), Found: r.GetFound(),
			Blocks: r.GetBlocks(), Bytes: r.GetBytes(), Error: r.GetError()}
	}
	return &server.Merge{Node: m.Node, On: m.On, Running: m.Running, Done: m.Done, CatalogueBytes: m.CatalogueBytes, Blocks: m.Blocks, Bytes: m.Bytes,
		Current: result(m.GetCurrent()), Last: result(m.GetLast())}
}
