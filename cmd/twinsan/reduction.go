package main

import (
	"fmt"
	"time"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

// reductionView is what a node reduces in the background; counts are since it started.
type reductionView struct {
	Merge         bool       `json:"merge"`
	Merging       bool       `json:"merging"`
	MergeDone     float64    `json:"merge_done"` // 0 to 1, of the pass that runs
	MergeFinished *time.Time `json:"merge_finished,omitempty"`
	MergeError    string     `json:"merge_error,omitempty"`
	MergedBlocks  uint64     `json:"merged_blocks"`
	MergedBytes   uint64     `json:"merged_bytes"`
	Catalogue     uint64     `json:"catalogue_bytes"`
	Recompressed  uint64     `json:"recompressed_blocks"`
	Won           uint64     `json:"recompressed_won_bytes"`
}

func viewReduction(r *v1.Reduction) reductionView {
	return reductionView{
		r.GetMerge(), r.GetMerging(), r.GetMergeDone(), moment(api.Time(r.GetMergeFinished())), r.GetMergeError(), r.GetMergedBlocks(), r.GetMergedBytes(),
		r.GetCatalogueBytes(), r.GetRecompressedBlocks(), r.GetRecompressedWonBytes(),
	}
}

// merges says in one line how the search for duplicates does.
func (r *reductionView) merges(p *printer) string {
	s := "found by the index alone"
	if r.Merge {
		s = fmt.Sprintf("%d blocks merged, %s", r.MergedBlocks, p.size(r.MergedBytes))
	}
	switch {
	case r.Merging:
		s += fmt.Sprintf("; looking, %.0f %% done", 100*r.MergeDone)
	case r.MergeError != "":
		s += "; the last pass stopped: " + r.MergeError
	case r.MergeFinished != nil:
		s += "; last looked " + since(r.MergeFinished)
	}
	return s
}

// recompressions says what recompression has won, nothing if it did not.
func (r *reductionView) recompressions(p *printer) string {
	if r.Recompressed == 0 {
		return ""
	}
	return fmt.Sprintf("%d cold blocks, %s won", r.Recompressed, p.size(r.Won))
}
