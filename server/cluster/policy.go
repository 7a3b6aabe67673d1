package cluster

import (
	"context"

	"github.com/twinsan/twinsan/lsfs"
)

// cmdWritePolicy says when a write to a volume may be acknowledged.
type cmdWritePolicy struct {
	Volume      lsfs.VolumeID
	MirroredRAM bool // see replication.Record
}

func (*cmdWritePolicy) kind() kind { return kindWritePolicy }
func (x *cmdWritePolicy) walk(c *codec) {
	u64(c, &x.Volume)
	c.flag(&x.MirroredRAM)
}

func (x *cmdWritePolicy) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	if v.Record.MirroredRAM == x.MirroredRAM {
		return result{ID: uint64(v.ID)}
	}
	w := *v
	w.Record.MirroredRAM = x.MirroredRAM
	e.setVolume(&w)
	if x.MirroredRAM {
		e.event(Warning, "write-policy", "volume %s acknowledges writes before they are flushed: if all its nodes lose power at once, hosts lose what they did not flush themselves", v.Name)
	} else {
		e.event(Info, "write-policy", "volume %s acknowledges writes when they are on stable storage", v.Name)
	}
	return result{ID: uint64(v.ID)}
}

// SetWritePolicy changes when writes to a volume are acknowledged: with mirroredRAM
// when they are written on all copies in sync, before they are flushed there.
func (c *Cluster) SetWritePolicy(ctx context.Context, id lsfs.VolumeID, mirroredRAM bool) (*Volume, error) {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	if _, err := c.proposeSync(ctx, &cmdWritePolicy{id, mirroredRAM}); err != nil {
		return nil, err
	}
	return c.volume(id)
}
