package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/device"
)

// Salvage is what SalvageStore kept, or with dryRun would look at.
type Salvage struct {
	Missing  []string // uuids of the devices that are lost
	Devices  []string // those that are left, by path
	Segments int      // that may hold blocks
	LetGo    int      // of them, given up for want of room or unreadable
	Blocks   uint64   // kept
	Bytes    uint64   // kept, as stored
	Damaged  uint64
	Rate     float64 // bytes read a second
}

// errSalvaging is what a start answers after a salvage that was interrupted.
var errSalvaging = errors.New("a salvage of this node's pool was interrupted\n  run it again: twinsan store salvage; or make the pool anew: twinsan store rebuild")

// SalvageStore begins this node's pool anew on the devices that are left, after one was lost that it
// cannot do without, and keeps their blocks: when the node runs, the others fill its replicas by
// fingerprint, so only what is missing moves. It must not be running. When it was interrupted it is repeated; until
// then the node does not start. With dryRun nothing changes. A pool that opens is left
// alone (ErrRefused). progress may be nil.
func SalvageStore(ctx context.Context, c *Config, dryRun bool, progress func(done, total, kept int64)) (*Salvage, error) {
	record, err := readPool(c.DataDir)
	if err != nil {
		return nil, err
	}
	for _, known := range record.Devices {
		if !headOf(known.Path, record.Pool) {
			continue
		}
		d, err := device.Open(known.Path, device.Options{ReadOnly: dryRun})
		if err != nil {
			return nil, fmt.Errorf("%w: %w\n  does the node run? stop it first: systemctl stop twinsan", ErrRefused, err)
		}
		_ = d.Close()
	}
	interrupted := record.Salvaging
	record.Salvaging = false
	config, err := c.storeOf(record)
	if err != nil {
		return nil, err
	}
	config.Forget = nil // what is not there is given up
	report, err := lsfs.Salvage(ctx, config, true, nil)
	switch {
	case errors.Is(err, lsfs.ErrWhole) && interrupted:
		// It was through but for the record.
		if dryRun {
			return &Salvage{}, nil
		}
		return &Salvage{}, record.write(c.DataDir)
	case errors.Is(err, lsfs.ErrWhole):
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	case err != nil:
		return nil, err
	}
	start := time.Now()
	if !dryRun {
		begun := *record
		begun.Salvaging = true
		if err := begun.write(c.DataDir); err != nil {
			return nil, err
		}
		record.Forget = nil
		if config, err = c.storeOf(record); err != nil {
			return nil, err
		}
		report, err = lsfs.Salvage(ctx, config, false, func(p lsfs.SalvageProgress) {
			if progress != nil {
				progress(p.Done, p.Total, p.Kept)
			}
		})
		if err != nil {
			return nil, err
		}
		// It names places in the old pool.
		if err := os.RemoveAll(filepath.Join(c.DataDir, catalogueDir)); err != nil {
			return nil, err
		}
	}
	s := &Salvage{Devices: report.Devices, Segments: report.Segments, LetGo: report.LetGo, Blocks: uint64(report.Blocks), Bytes: bytesOf(report.Bytes), Damaged: uint64(report.Damaged)}
	for _, id := range report.Missing {
		s.Missing = append(s.Missing, uuid.UUID(id).String())
	}
	if took := time.Since(start).Seconds(); took > 0 {
		s.Rate = float64(report.Read) / took
	}
	return s, nil
}

// EndSalvage gives up what a salvage kept and no volume has again. The node must not be running.
func EndSalvage(ctx context.Context, c *Config) error {
	config, err := c.store()
	if err != nil {
		return err
	}
	s, err := lsfs.Open(ctx, config)
	if err != nil {
		return err
	}
	return errors.Join(s.EndSalvage(ctx), s.Close())
}

// endSalvage ends the hold on salvaged blocks when every replica of this node is filled.
func (n *Node) endSalvage(ctx context.Context) {
	blocks, held := n.store.Salvaged()
	if !held || !n.ready.Load() || n.serving.Load() == nil {
		return
	}
	state, err := n.cluster.Sync(ctx)
	if err != nil {
		return
	}
	self := n.cluster.Self()
	for _, v := range state.Volumes {
		for _, r := range v.Record.Replicas {
			if r.Node != self || v.Record.Deleted {
				continue
			}
			// A record of before may still count on the copy that was lost.
			copied := n.store.Volume(v.ID)
			if copied == nil || !slices.Contains(v.Record.InSync, self) {
				return
			}
			if m := copied.Meta(); m.Replica != r.ID || m.Inconsistent {
				return
			}
		}
	}
	if err := n.store.EndSalvage(ctx); err != nil {
		n.log.Warn("salvaged blocks are held on", "err", err)
		return
	}
	n.journal.report(levelInfo, "store-salvage-done", fmt.Sprintf("the replicas of this node are filled: what is left of %d salvaged blocks is given up", blocks))
}
