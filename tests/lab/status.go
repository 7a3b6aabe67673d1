package lab

import (
	"context"
	"fmt"
	"time"
)

// Status is "twinsan status -o json", as far as tests read it.
type Status struct {
	Version  int          `json:"version"`
	Health   string       `json:"health"` // healthy, degraded, unavailable
	Quorum   bool         `json:"quorum"`
	Leader   string       `json:"leader"`
	Problems []Problem    `json:"problems"`
	Nodes    []NodeStatus `json:"nodes"`
	Volumes  []Volume     `json:"volumes"`
}

// Problem is what status says is wrong.
type Problem struct {
	Code  string `json:"code"`
	Cause string `json:"cause"`
	Risk  string `json:"risk"`
	Do    string `json:"do"`
}

// NodeStatus is a node in the status.
type NodeStatus struct {
	Name        string `json:"name"`
	State       string `json:"state"`
	Incarnation uint64 `json:"incarnation"`
	Pool        *Pool  `json:"pool"`
}

// Pool is the fill of a node's store, in bytes.
type Pool struct {
	Size    int64 `json:"size_bytes"`
	Live    int64 `json:"live_bytes"`
	Garbage int64 `json:"garbage_bytes"`
	Free    int64 `json:"free_bytes"`
	Usable  int64 `json:"usable_bytes"`
	Mapped  int64 `json:"mapped_bytes"`
	Stored  int64 `json:"stored_bytes"`
}

// Volume is a volume as the command line shows it.
type Volume struct {
	Name     string    `json:"name"`
	UUID     string    `json:"uuid"`
	LUN      int       `json:"lun"`
	Size     int64     `json:"size_bytes"`
	State    string    `json:"state"`
	Epoch    uint64    `json:"epoch"`
	Owner    string    `json:"owner"`
	Replicas []Replica `json:"replicas"`
	ServedBy []string  `json:"served_by"`
	Mapped   int64     `json:"mapped_bytes"`
	Written  int64     `json:"written_bytes"`
	Stored   int64     `json:"stored_bytes"`
}

// Replica is one copy of a volume.
type Replica struct {
	Node  string `json:"node"`
	State string `json:"state"`
	Done  int64  `json:"resync_done_bytes"`
	Total int64  `json:"resync_total_bytes"`
}

// Other is the replica that does not own the volume.
func (v *Volume) Other() string {
	for _, r := range v.Replicas {
		if r.Node != v.Owner {
			return r.Node
		}
	}
	return ""
}

// Status asks for the status of the cluster.
func (c *Cluster) Status(ctx context.Context) (*Status, error) {
	s := &Status{}
	return s, c.JSON(ctx, s, "status")
}

// Volume asks for one volume.
func (c *Cluster) Volume(ctx context.Context, name string) (*Volume, error) {
	var page struct {
		Volume Volume `json:"volume"`
	}
	err := c.JSON(ctx, &page, "volume", "show", name)
	return &page.Volume, err
}

// CreateVolume makes a volume that any initiator sees, and waits until both nodes serve it.
func (c *Cluster) CreateVolume(ctx context.Context, name, size string, flags ...string) (*Volume, error) {
	if _, err := c.CLI(ctx, append([]string{"volume", "create", name, size, "--any-host"}, flags...)...); err != nil {
		return nil, err
	}
	var v *Volume
	err := Until(ctx, time.Minute, func() error {
		var err error
		if v, err = c.Volume(ctx, name); err != nil {
			return err
		}
		if v.State != "online" || len(v.ServedBy) < max(len(v.Replicas), min(2, len(c.Nodes))) {
			return fmt.Errorf("volume %s is %s, served by %v", name, v.State, v.ServedBy)
		}
		return nil
	})
	return v, err
}

// DeleteVolume destroys a volume.
func (c *Cluster) DeleteVolume(ctx context.Context, name string) error {
	_, err := c.CLI(ctx, "volume", "delete", name, "--yes", "--in-use")
	return err
}

// WaitHealthy returns when every node is up and every replica in sync.
func (c *Cluster) WaitHealthy(ctx context.Context, limit time.Duration) error {
	return Until(ctx, limit, func() error {
		s, err := c.Status(ctx)
		if err != nil {
			return err
		}
		if s.Health != "healthy" {
			return fmt.Errorf("the cluster is %s: %+v", s.Health, s.Problems)
		}
		return c.served(s)
	})
}

// WaitServed returns when every node serves every volume and every replica is
// in sync, whatever else may be wrong.
func (c *Cluster) WaitServed(ctx context.Context, limit time.Duration) error {
	return Until(ctx, limit, func() error {
		s, err := c.Status(ctx)
		if err != nil {
			return err
		}
		return c.served(s)
	})
}

func (c *Cluster) served(s *Status) error {
	// A node that has just started may not know yet what exists.
	if !s.Quorum || len(s.Volumes) < min(1, len(c.File.Volumes)) {
		return fmt.Errorf("quorum %t, %d volumes are known", s.Quorum, len(s.Volumes))
	}
	for _, v := range s.Volumes {
		if v.State != "online" || len(v.ServedBy) < max(len(v.Replicas), min(2, len(c.Nodes))) {
			return fmt.Errorf("volume %s is %s, served by %v", v.Name, v.State, v.ServedBy)
		}
	}
	return nil
}

// CheckEqual compares the replicas of a volume by digest.
func (c *Cluster) CheckEqual(ctx context.Context, name string) error {
	var page struct {
		Equal   bool `json:"equal"`
		Digests []struct {
			Node, Digest, Error string
		} `json:"digests"`
	}
	if err := c.JSON(ctx, &page, "volume", "check", name); err != nil {
		return err
	}
	if !page.Equal || len(page.Digests) < min(2, len(c.Nodes)) {
		return fmt.Errorf("the replicas of volume %s are not proved equal: %+v", name, page.Digests)
	}
	return nil
}

// Until calls f until it returns nil, at most for limit, and returns its last error.
func Until(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", limit, err)
		}
	}
}
