package scsi

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// MaxLUs bounds the logical units of one node.
const MaxLUs = 1024

// ErrInvalidLU is wrapped by the errors of SetLU.
var ErrInvalidLU = errors.New("logical unit cannot be configured so")

// LUConfig describes a logical unit. What identifies it (VolumeUUID, Serial,
// NAA, LogicalBlock) is the same on every node and never changes.
type LUConfig struct {
	LUN        uint16 // up to cdb.MaxLUN, the same on every node
	VolumeUUID [16]byte
	Name       string // for people: logs and statistics
	Serial     string // unit serial number, 1..32 printable ASCII characters
	// NAA is the designator that hosts know the disk by: 8 bytes, NAA 3h (locally
	// assigned), or 16 bytes, NAA 6h.
	NAA           []byte
	LogicalBlock  uint32 // bytes: 512 or 4096; 0 is 512
	PhysicalBlock uint32 // bytes: LogicalBlock..4096; 0 is 4096
	Thin          bool   // UNMAP and provisioning are offered
	ReadOnly      bool   // writes are refused
	VolatileCache bool   // acknowledged writes may be lost until flushed: WCE=1
	Volume        Volume
	// Paths returns the target port groups of all nodes. It must not block and is
	// not called on the path of a READ or WRITE. Nil: this node's port alone,
	// active/optimized.
	Paths func() []PortGroup
	// Optimize moves the volume to the node of a target port group, for SET TARGET
	// PORT GROUPS, and calls done once, on any goroutine, when Paths tells the outcome
	// or with the reason why it stays. It must not block. Nil: not offered.
	Optimize func(group uint16, done func(error))
	// Space tells the room of a thin unit. It must not block. Nil: thresholds and the
	// log page of logical block provisioning are not offered.
	Space func() Space
	// Thresholds are percentages of used space at which initiators are warned, 1 to
	// 99, at most 8. Nil: 70, 80 and 90.
	Thresholds []uint8
}

// Limits that VPD page B0 advertises and every buffer obeys, in bytes.
const (
	maxTransferBytes   = 8 << 20
	maxWriteSameBytes  = 16 << 20
	maxCompareBytes    = 4 << 20
	optimalBytes       = 1 << 20
	grainBytes         = 4096
	maxCompareBlocks   = 255
	maxUnmapBlocks     = 1 << 20
	maxUnmapDescriptor = 256
)

// unitConfig is a checked LUConfig with what follows from it. It is never modified.
type unitConfig struct {
	LUConfig
	shift       uint8 // log2 of LogicalBlock
	transferMax uint64
	sameMax     uint64
	compareMax  uint64
	atomicMax   uint64
}

// blocks is the current capacity in logical blocks.
func (u *unitConfig) blocks() uint64 { return u.Volume.SizeBytes() >> u.shift }

// physicalExponent is LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT.
func (u *unitConfig) physicalExponent() byte {
	return byte(bits.TrailingZeros32(u.PhysicalBlock / u.LogicalBlock))
}

// logicalUnit is the device server's side of one LU. It lives from SetLU to RemoveLU,
// and on as long as tasks of it are under way.
type logicalUnit struct {
	lun      uint16
	config   atomic.Pointer[unitConfig]
	path     atomic.Uint32 // PathState of this node's group
	asked    atomic.Uint64 // times that the paths were asked for
	moved    atomic.Uint32 // STATUS CODE of REPORT TARGET PORT GROUPS
	optimize atomic.Pointer[optimization]
	gone     atomic.Bool // the unit was removed
	flushing atomic.Bool // a SYNCHRONIZE CACHE with IMMED=1 is under way
	reported atomic.Bool // an unknown error was logged
	review   atomic.Bool // reviewReserve is at work
	state    atomic.Pointer[luState]
	changes  changeQueue
	tokens   tokenWatch
	refused  refusals

	size uint64 // bytes; under Server.mu: the capacity that initiators were told of

	mu       sync.Mutex
	itls     map[*itlNexus]struct{}
	former   [Classes]ClassStats // counters of I_T_L nexuses that are gone
	answered uint64              // the latest asking that path is the answer to
	crossed  uint16              // thresholds that were told of, a bit for each
	wiping   bool                // a goroutine sanitizes the unit
	waiting  []sanitizeWait      // SANITIZE commands that wait for the end
	logged   accesses            // what LOG SELECT set to zero
}

// Visibility says which initiators see a LUN. The zero value is nobody.
type Visibility struct {
	Any        bool     // every initiator
	Initiators []string // those listed
	ReadOnly   []string // those of them (or of any) whose writes are refused
}

// access is a Visibility for look-up: true for read-only.
type access struct {
	any        bool
	initiators map[string]bool
}

func (a access) allows(initiator string) (allowed, readOnly bool) {
	readOnly, ok := a.initiators[initiator]
	return ok || a.any, readOnly
}

// checked validates a configuration and fills in the defaults.
func (c LUConfig) checked() (*unitConfig, error) {
	if c.LogicalBlock == 0 {
		c.LogicalBlock = 512
	}
	if c.PhysicalBlock == 0 {
		c.PhysicalBlock = 4096
	}
	c.NAA = slices.Clone(c.NAA)
	c.Thresholds = slices.Clone(c.Thresholds)
	if c.Thresholds == nil {
		c.Thresholds = []uint8{70, 80, 90}
	}
	slices.Sort(c.Thresholds)
	c.Thresholds = slices.Compact(c.Thresholds)
	bad := func(format string, args ...any) (*unitConfig, error) {
		return nil, fmt.Errorf("LUN %d: %s: %w", c.LUN, fmt.Sprintf(format, args...), ErrInvalidLU)
	}
	switch {
	case c.LUN > cdb.MaxLUN:
		return bad("the number is above %d", cdb.MaxLUN)
	case c.LogicalBlock != 512 && c.LogicalBlock != 4096:
		return bad("logical blocks of %d bytes", c.LogicalBlock)
	case c.PhysicalBlock < c.LogicalBlock || c.PhysicalBlock > 4096 || bits.OnesCount32(c.PhysicalBlock) != 1:
		return bad("physical blocks of %d bytes", c.PhysicalBlock)
	case c.Volume == nil:
		return bad("no volume")
	case c.Volume.SizeBytes() < uint64(c.LogicalBlock):
		return bad("the volume has no blocks")
	case c.Serial == "" || len(c.Serial) > 32:
		return bad("serial number %q is not 1 to 32 characters", c.Serial)
	case len(c.NAA) == 8 && c.NAA[0]>>4 == 3, len(c.NAA) == 16 && c.NAA[0]>>4 == 6:
	default:
		return bad("NAA designator %x", c.NAA)
	}
	if n := len(c.Thresholds); n > maxThresholds || n > 0 && (c.Thresholds[0] < 1 || c.Thresholds[n-1] > 99) {
		return bad("thresholds %v", c.Thresholds)
	}
	for i := range len(c.Serial) {
		if c.Serial[i] <= ' ' || c.Serial[i] > '~' {
			return bad("serial number %q is not printable", c.Serial)
		}
	}
	shift := uint8(bits.TrailingZeros32(c.LogicalBlock))
	return &unitConfig{
		LUConfig:    c,
		shift:       shift,
		transferMax: maxTransferBytes >> shift,
		sameMax:     maxWriteSameBytes >> shift,
		compareMax:  min(maxCompareBlocks, uint64(maxCompareBytes)>>shift),
		atomicMax:   replication.AtomicBytesMax >> shift,
	}, nil
}

// SetLU makes a logical unit, or changes the one at this LUN. Initiators that
// may see it are told by unit attentions what changed. Another volume at a LUN
// is another logical unit. Nobody sees a LUN before SetAccess.
func (s *Server) SetLU(c LUConfig) error {
	next, err := c.checked()
	if err != nil {
		return err
	}
	path := s.pathState(next)
	lu, watched, err := s.setUnit(next, path)
	if err != nil {
		return err
	}
	if watched != next.Volume {
		if watched != nil {
			watched.Watch(nil)
		}
		next.Volume.Watch(func(id StateID, value []byte, live bool) { s.publish(lu, id, value, live) })
	}
	if held := lu.state.Load().legacy; watched == nil && held != nil && held.port.target == s.nodePort {
		s.dropReserve(lu, held, nil) // left by an earlier life of this node
	}
	s.askPaths(lu, false)
	return nil
}

// setUnit returns the unit with its new configuration and the volume that was
// watched for its LUN before; a new unit has path.
func (s *Server) setUnit(next *unitConfig, path PathState) (lu *logicalUnit, watched Volume, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lu = s.units[next.LUN]
	if lu != nil {
		watched = lu.config.Load().Volume
	}
	if lu != nil && lu.config.Load().VolumeUUID == next.VolumeUUID {
		return lu, watched, lu.changeLocked(next)
	}
	if lu == nil && len(s.units) >= MaxLUs {
		return nil, nil, fmt.Errorf("LUN %d: there are %d logical units already: %w", next.LUN, MaxLUs, ErrInvalidLU)
	}
	if lu != nil {
		lu.gone.Store(true)
	}
	lu = &logicalUnit{lun: next.LUN, size: next.Volume.SizeBytes(), itls: make(map[*itlNexus]struct{})}
	lu.config.Store(next)
	lu.state.Store(&luState{})
	lu.path.Store(uint32(path))
	s.units[next.LUN] = lu
	for n := range s.nexuses {
		s.rebuildLocked(n)
	}
	return lu, watched, nil
}

// changeLocked puts a new configuration on a living unit. It needs Server.mu.
func (lu *logicalUnit) changeLocked(next *unitConfig) error {
	old := lu.config.Load()
	if old.LogicalBlock != next.LogicalBlock {
		return fmt.Errorf("LUN %d: the logical block size never changes: %w", lu.lun, ErrInvalidLU)
	}
	lu.config.Store(next)
	if old.Serial != next.Serial || !slices.Equal(old.NAA, next.NAA) ||
		old.PhysicalBlock != next.PhysicalBlock || old.Thin != next.Thin {
		lu.raise(attentionInquiry)
	}
	if old.ReadOnly != next.ReadOnly || old.VolatileCache != next.VolatileCache ||
		old.warns() != next.warns() || !slices.Equal(old.Thresholds, next.Thresholds) {
		lu.raise(attentionMode)
	}
	lu.resizedLocked()
	return nil
}

// RemoveLU takes a logical unit and its access list away. Commands under way
// end as their volume ends them.
func (s *Server) RemoveLU(lun uint16) {
	s.mu.Lock()
	delete(s.access, lun)
	lu := s.units[lun]
	delete(s.units, lun)
	if lu != nil {
		lu.gone.Store(true)
		for n := range s.nexuses {
			s.rebuildLocked(n)
		}
	}
	s.mu.Unlock()
	if lu != nil {
		lu.config.Load().Volume.Watch(nil)
	}
}

// SetAccess says which initiators see a LUN. It may be called before SetLU.
func (s *Server) SetAccess(lun uint16, v Visibility) {
	a := access{any: v.Any, initiators: make(map[string]bool, len(v.Initiators)+len(v.ReadOnly))}
	for _, name := range v.Initiators {
		a.initiators[name] = false
	}
	for _, name := range v.ReadOnly {
		a.initiators[name] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.units[lun] == nil && len(s.access) >= 2*MaxLUs {
		return // BOUNDED: lists for LUNs that never came; SetLU refuses at MaxLUs anyway
	}
	s.access[lun] = a
	for n := range s.nexuses {
		s.rebuildLocked(n)
	}
}

// unit returns the logical unit at a LUN, or nil.
func (s *Server) unit(lun uint16) *logicalUnit {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.units[lun]
}

// CapacityChanged tells every nexus of a LUN that its volume has another size.
// It does nothing while the size is the one that was told last.
func (s *Server) CapacityChanged(lun uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if lu := s.units[lun]; lu != nil {
		lu.resizedLocked()
	}
}

// resizedLocked needs Server.mu.
func (lu *logicalUnit) resizedLocked() {
	if size := lu.config.Load().Volume.SizeBytes(); size != lu.size {
		lu.size = size
		lu.raise(attentionCapacity)
	}
}

// ContentChanged tells every nexus of a LUN that its content is another one than
// the initiators know: they look at the capacity, and with it at the partitions, again.
func (s *Server) ContentChanged(lun uint16) {
	if lu := s.unit(lun); lu != nil {
		lu.raise(attentionMedium)
		lu.raise(attentionCapacity)
	}
}

// PathsChanged reads the paths of a LUN again and tells every nexus of it.
func (s *Server) PathsChanged(lun uint16) {
	if lu := s.unit(lun); lu != nil {
		s.askPaths(lu, true)
	}
}

// askPaths asks for the paths of a unit and sets the state of this node's. With
// always the initiators are told even when that is the same, for another
// node's has changed. Of answers that arrive out of order the one that was
// asked for last stays.
func (s *Server) askPaths(lu *logicalUnit, always bool) {
	asked := lu.asked.Add(1)
	path := s.pathState(lu.config.Load())
	changed := always
	lu.mu.Lock()
	if asked > lu.answered {
		lu.answered = asked
		changed = PathState(lu.path.Swap(uint32(path))) != path || always
	}
	lu.mu.Unlock()
	if changed {
		s.pathsMoved(lu)
	}
	s.reviewReserve(lu)
	s.tendSanitize(lu)
}

// join and leave keep the list of a unit's I_T_L nexuses.
func (lu *logicalUnit) join(i *itlNexus) {
	lu.mu.Lock()
	defer lu.mu.Unlock()
	lu.itls[i] = struct{}{}
	i.grant.Store(lu.state.Load().grantTo(i.nexus.id()))
}

func (lu *logicalUnit) leave(i *itlNexus) {
	lu.mu.Lock()
	defer lu.mu.Unlock()
	if _, ok := lu.itls[i]; ok {
		delete(lu.itls, i)
		i.addTo(&lu.former)
	}
}

// members returns the unit's I_T_L nexuses.
func (lu *logicalUnit) members() []*itlNexus {
	lu.mu.Lock()
	defer lu.mu.Unlock()
	all := make([]*itlNexus, 0, len(lu.itls))
	for i := range lu.itls {
		all = append(all, i)
	}
	return all
}
