package api

import (
	"context"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server"
)

type deviceService struct {
	v1.UnimplementedDevicesServer
	backend NodeBackend
}

func (s *deviceService) ListDevices(ctx context.Context, r *v1.ListDevicesRequest) (*v1.ListDevicesResponse, error) {
	devices, unreachable, err := s.backend.Devices(ctx, r.GetNode())
	if err != nil {
		return nil, err
	}
	return &v1.ListDevicesResponse{Devices: each(devices, deviceMessage), Unreachable: each(unreachable, unreachableMessage)}, nil
}

func (s *deviceService) change(ctx context.Context, c server.DeviceChange, nodeOnly bool) (*v1.Device, error) {
	d, err := s.backend.ChangeDevice(ctx, c, nodeOnly)
	if err != nil {
		return nil, err
	}
	return deviceMessage(d), nil
}

// added is the change that a request to add a device asks for.
func added(action server.DeviceAction, device string, r *v1.AddDeviceRequest) server.DeviceChange {
	return server.DeviceChange{
		Action: action, Node: r.GetNode(), Device: device, Path: r.GetPath(), Class: r.GetClass(), Size: r.GetSizeBytes(), Wipe: r.GetWipe(),
	}
}

func (s *deviceService) AddDevice(ctx context.Context, r *v1.AddDeviceRequest) (*v1.Device, error) {
	return s.change(ctx, added(server.DeviceAdd, "", r), r.GetNodeOnly())
}

func (s *deviceService) ReplaceDevice(ctx context.Context, r *v1.ReplaceDeviceRequest) (*v1.Device, error) {
	return s.change(ctx, added(server.DeviceReplace, r.GetDevice(), r.GetWith()), r.GetWith().GetNodeOnly())
}

func (s *deviceService) DrainDevice(ctx context.Context, r *v1.DrainDeviceRequest) (*v1.Device, error) {
	action := server.DeviceDrain
	if r.GetKeep() {
		action = server.DeviceKeep
	}
	return s.change(ctx, server.DeviceChange{Action: action, Node: r.GetNode(), Device: r.GetDevice()}, r.GetNodeOnly())
}

func (s *deviceService) RemoveDevice(ctx context.Context, r *v1.RemoveDeviceRequest) (*v1.Device, error) {
	return s.change(ctx, server.DeviceChange{Action: server.DeviceRemove, Node: r.GetNode(), Device: r.GetDevice()}, r.GetNodeOnly())
}

// ChangeDevice asks a node to change its devices.
func (p *Peers) ChangeDevice(ctx context.Context, node replication.NodeID, address string, c server.DeviceChange) (*server.Device, error) {
	conn, err := p.conn(peerKey{node, address})
	if err != nil {
		return nil, err
	}
	client := v1.NewDevicesClient(conn)
	add := &v1.AddDeviceRequest{Node: c.Node, Path: c.Path, Class: c.Class, SizeBytes: c.Size, Wipe: c.Wipe, NodeOnly: true}
	var d *v1.Device
	switch c.Action {
	case server.DeviceAdd:
		d, err = client.AddDevice(ctx, add)
	case server.DeviceReplace:
		d, err = client.ReplaceDevice(ctx, &v1.ReplaceDeviceRequest{Device: c.Device, With: add})
	case server.DeviceRemove:
		d, err = client.RemoveDevice(ctx, &v1.RemoveDeviceRequest{Node: c.Node, Device: c.Device, NodeOnly: true})
	default:
		d, err = client.DrainDevice(ctx, &v1.DrainDeviceRequest{Node: c.Node, Device: c.Device, Keep: c.Action == server.DeviceKeep, NodeOnly: true})
	}
	if err != nil {
		return nil, err
	}
	out := deviceOf(&d)
	return &out, nil
}
