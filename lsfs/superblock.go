package lsfs

import (
	"bytes"
	"fmt"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// healSuperblocks makes all copies on all devices equal before anything else is
// written. A crash while the second pair was written leaves it torn, and the next
// checkpoint begins with the first pair: one more crash then and no two copies would
// agree. It returns how many copies were written.
//
// Copies that agree with the device's best are not touched until the bad ones are
// good and flushed, so at every moment two of them agree.
func (s *Store) healSuperblocks() (healed int, err error) {
	want, page := make([]byte, format.PageSize), device.AlignedBuffer(format.PageSize)
	defer device.FreeAligned(page)
	present := make(map[DeviceID]*member)
	for _, m := range s.segs.layout.Load().members {
		present[m.id] = m
	}
	for i, member := range s.pool.Members {
		d := present[member.Device]
		if d == nil || d.lost() || member.State == format.MemberLost || holdsNothing(member.State) {
			continue
		}
		sb := s.pool
		sb.Index, sb.Device = i, member.Device
		sb.Put(want)
		n, err := healDevice(d, want, page)
		healed += n
		if err != nil {
			return healed, fmt.Errorf("heal superblocks of %s: %w", d.Path(), err)
		}
	}
	return healed, nil
}

// healDevice does it for one device.
func healDevice(d device.Device, want, page []byte) (healed int, err error) {
	have, err := readSuperblock(d)
	if err != nil {
		return 0, err
	}
	best := make([]byte, format.PageSize)
	have.Put(best)
	write := func(content []byte, copies []int64) error {
		n := 0
		for _, off := range copies {
			if err := d.ReadAt(page, off); err == nil {
				if bytes.Equal(page, content) {
					continue
				}
				if sb, err := format.ParseSuperblock(page); err == nil && sb.Sequence == have.Sequence && bytes.Equal(content, best) {
					continue // the same, as an older program wrote it
				}
			}
			copy(page, content)
			if err := d.WriteAt(page, off); err != nil {
				return err
			}
			n++
		}
		if healed += n; n == 0 {
			return nil
		}
		return d.Flush()
	}
	all := format.SuperblockOffsets[:]
	if err := write(best, all); err != nil {
		return healed, err
	}
	if have.Sequence == 0 || bytes.Equal(best, want) {
		return healed, nil
	}
	for _, pair := range [][]int64{all[:2], all[2:]} {
		if err := write(want, pair); err != nil {
			return healed, err
		}
	}
	return healed, nil
}
