package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Peer is a tgtd of our own with one file behind two LUs, for comparison: one
// goes through the page cache, one around it.
type Peer struct {
	URL       string
	DirectURL string
	PID       int
	Version   string

	cmd     *exec.Cmd
	ended   chan struct{}
	log     bytes.Buffer
	control string
	dir     string
}

const peerTarget = "iqn.2026-11.io.twinsan:peer"

// ErrNoPeer: tgt cannot run here. The text says why.
var ErrNoPeer = errors.New("no tgt to compare with")

// StartPeer starts a tgtd on a port of 127.0.0.1, with a file of size bytes below dir. It
// needs root: tgtd locks its memory and uses /var/run.
func StartPeer(ctx context.Context, dir string, port int, size int64) (*Peer, error) {
	tgtd, err := Tool("tgtd")
	if err != nil {
		return nil, fmt.Errorf("%w: tgtd is not installed (apt-get install tgt)", ErrNoPeer)
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w: tgtd needs root", ErrNoPeer)
	}
	file := filepath.Join(dir, "peer.img")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	err = errors.Join(f.Truncate(size), f.Close())
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll("/var/run", 0o755); err != nil {
		return nil, err
	}
	portal := fmt.Sprintf("127.0.0.1:%d", port)
	p := &Peer{control: strconv.Itoa(port), dir: dir, ended: make(chan struct{}),
		URL: fmt.Sprintf("iscsi://%s/%s/1", portal, peerTarget), DirectURL: fmt.Sprintf("iscsi://%s/%s/2", portal, peerTarget)}
	if out, err := Run(ctx, tgtd, "-V"); err == nil {
		p.Version = "tgt " + string(bytes.TrimSpace(out))
	}
	p.cmd = exec.Command(tgtd, "--foreground", "-C", p.control, "--iscsi", "portal="+portal)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	p.PID = p.cmd.Process.Pid
	go func() { defer close(p.ended); _ = p.cmd.Wait() }() // its end is its only result
	if err := p.setUp(ctx, file, portal); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *Peer) admin(ctx context.Context, args ...string) error {
	tgtadm, err := Tool("tgtadm")
	if err != nil {
		return err
	}
	_, err = Run(ctx, tgtadm, append([]string{"-C", p.control, "--lld", "iscsi"}, args...)...)
	return err
}

func (p *Peer) setUp(ctx context.Context, file, portal string) error {
	err := Until(ctx, 15*time.Second, func() error {
		select {
		case <-p.ended:
			return fmt.Errorf("%w: tgtd ended: %s", ErrNoPeer, &p.log)
		default:
		}
		c, err := net.DialTimeout("tcp", portal, time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	})
	if err != nil {
		return err
	}
	for _, args := range [][]string{
		{"--op", "new", "--mode", "target", "--tid", "1", "-T", peerTarget},
		{"--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", file},
		{"--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "2", "-b", file, "--bsoflags", "direct"},
		{"--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"},
	} {
		if err := p.admin(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// Close ends tgtd and removes its file.
func (p *Peer) Close() error {
	if p.cmd != nil && p.cmd.Process != nil {
		// SIGTERM leaves it running while sessions linger; it keeps nothing that we want.
		if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		<-p.ended
	}
	return errors.Join(os.Remove(filepath.Join(p.dir, "peer.img")), removeControl(p.control))
}

// removeControl removes the control socket that a killed tgtd leaves behind.
func removeControl(port string) error {
	for _, name := range []string{"/var/run/tgtd/socket." + port, "/var/run/tgtd/socket." + port + ".lock"} {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
