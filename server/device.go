package server

import (
	"encoding/hex"
	"os"
	"sync"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// deviceSet remembers the devices that the store opened, for reports. The store
// owns them; nothing here does I/O after they were opened.
type deviceSet struct {
	mu  sync.Mutex
	all []openDevice
}

type openDevice struct {
	device.Device
	uuid string
}

// open is the store's way to open a device.
func (s *deviceSet) open(path string) (device.Device, error) {
	d, err := device.Open(path, device.Options{})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, openDevice{d, deviceUUID(d)})
	return d, nil
}

// deviceUUID reads the device's own id; empty when its first superblock is bad,
// which the store finds out by itself.
func deviceUUID(d device.Device) string {
	page := device.AlignedBuffer(format.PageSize)
	defer device.FreeAligned(page)
	if d.ReadAt(page, format.SuperblockOffsets[0]) != nil {
		return ""
	}
	sb, err := format.ParseSuperblock(page)
	if err != nil || sb.Index >= len(sb.Members) {
		return ""
	}
	id, err := uuid.FromBytes(sb.Members[sb.Index].Device[:])
	if err != nil {
		return hex.EncodeToString(sb.Members[sb.Index].Device[:])
	}
	return id.String()
}

func (s *deviceSet) list() []openDevice {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]openDevice(nil), s.all...)
}

// onBlockDevices says whether all devices are block devices, which gain by being
// told of freed segments. A file would only get holes that the log has to fill again.
func onBlockDevices(paths []string) bool {
	for _, p := range paths {
		if info, err := os.Stat(p); err != nil || info.Mode().IsRegular() {
			return false
		}
	}
	return true
}
