package api

import (
	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

func reductionMessage(r *server.Reduction) *v1.Reduction {
	return &v1.Reduction{
		Merge: r.Merge, Merging: r.Merging, MergeDone: r.MergeDone, MergeFinished: stamp(r.MergeFinished), MergeError: r.MergeError,
		MergedBlocks: r.MergedBlocks, MergedBytes: r.MergedBytes, CatalogueBytes: r.CatalogueBytes,
		RecompressedBlocks: r.RecompressedBlocks, RecompressedWonBytes: r.RecompressedWon,
	}
}

// reductionOf reads the answer of a node, which is nil from one that does not know the message.
func reductionOf(m *v1.Reduction) server.Reduction {
	return server.Reduction{
		Merge: m.GetMerge(), Merging: m.GetMerging(), MergeDone: m.GetMergeDone(), MergeFinished: Time(m.GetMergeFinished()), MergeError: m.GetMergeError(),
		MergedBlocks: m.GetMergedBlocks(), MergedBytes: m.GetMergedBytes(), CatalogueBytes: m.GetCatalogueBytes(),
		RecompressedBlocks: m.GetRecompressedBlocks(), RecompressedWon: m.GetRecompressedWonBytes(),
	}
}
