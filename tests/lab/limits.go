package lab

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Rate is how fast bytes were moved, and the processor time that this process took for it.
type Rate struct {
	MiBps      float64 // MiB a second
	CPUSeconds float64 // for each GiB
}

func (r Rate) String() string {
	return fmt.Sprintf("%.0f MiB/s with %.2f processor seconds for each GiB", r.MiBps, r.CPUSeconds)
}

const limitPiece = 1 << 20

// DiskLimit is what the disk below dir gives a resync of which it holds both ends: so many
// bytes are read from one file and written to another at the same time, past the page
// cache where the file system can do that, in pieces of 1 MiB, and flushed.
func DiskLimit(dir string, size int64) (Rate, error) {
	var files [2]int
	for i, name := range []string{"limit-read", "limit-written"} {
		fd, err := openDirect(filepath.Join(dir, name), size)
		if err != nil {
			return Rate{}, err
		}
		defer os.Remove(filepath.Join(dir, name))
		defer unix.Close(fd)
		files[i] = fd
	}
	var pieces [2][]byte
	for i := range pieces {
		p, err := unix.Mmap(-1, 0, limitPiece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
		if err != nil {
			return Rate{}, err
		}
		defer unix.Munmap(p)
		rand.Read(p)
		pieces[i] = p
	}
	write := func(fd int) error {
		for off := int64(0); off < size; off += limitPiece {
			if _, err := unix.Pwrite(fd, pieces[1], off); err != nil {
				return err
			}
		}
		return unix.Fdatasync(fd)
	}
	if err := write(files[0]); err != nil {
		return Rate{}, err
	}
	return measure(size, func() error {
		var g errgroup.Group
		g.Go(func() error {
			for off := int64(0); off < size; off += limitPiece {
				if _, err := unix.Pread(files[0], pieces[0], off); err != nil {
					return err
				}
			}
			return nil
		})
		g.Go(func() error { return write(files[1]) })
		return g.Wait()
	})
}

func openDirect(path string, size int64) (fd int, err error) {
	const flags = unix.O_RDWR | unix.O_CREAT | unix.O_CLOEXEC
	fd, err = unix.Open(path, flags|unix.O_DIRECT, 0o600)
	if errors.Is(err, unix.EINVAL) { // no such thing on this file system
		fd, err = unix.Open(path, flags, 0o600)
	}
	if err != nil {
		return fd, err
	}
	return fd, unix.Fallocate(fd, 0, 0, size)
}

// LinkLimit is what a TLS connection over loopback gives, or over a line if there is one,
// both ends in this process: so many bytes are sent in pieces of 1 MiB, and thrown away.
// socket makes of a socket what TLS is put on, as nodes do it.
func LinkLimit(size int64, line *Line, socket func(net.Conn) net.Conn) (Rate, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return Rate{}, err
	}
	defer ln.Close()
	return StreamLimit(size, ln, func() (net.Conn, error) {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err == nil && line != nil {
			c = line.Put(c)
		}
		return c, err
	}, socket)
}

// StreamLimit is LinkLimit between a listener and what dials it.
func StreamLimit(size int64, ln net.Listener, dial func() (net.Conn, error), socket func(net.Conn) net.Conn) (Rate, error) {
	conf, err := mutualTLS()
	if err != nil {
		return Rate{}, err
	}
	return measure(size, func() error {
		var g errgroup.Group
		g.Go(func() error {
			c, err := ln.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			t := tls.Server(socket(c), conf)
			buf := make([]byte, limitPiece)
			for left := size; left > 0; {
				n, err := t.Read(buf)
				if left -= int64(n); err != nil && left > 0 {
					return err
				}
			}
			return nil
		})
		g.Go(func() error {
			c, err := dial()
			if err != nil {
				ln.Close()
				return err
			}
			defer c.Close()
			t := tls.Client(socket(c), conf)
			piece := make([]byte, limitPiece)
			rand.Read(piece)
			for off := int64(0); off < size; off += limitPiece {
				if _, err := t.Write(piece); err != nil {
					return err
				}
			}
			_, err = t.Read(piece[:1]) // until the other end has all of it
			if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
				err = nil
			}
			return err
		})
		return g.Wait()
	})
}

// mutualTLS is one configuration for both ends, as between nodes.
func mutualTLS() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"node"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(c)
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: "node", RootCAs: pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, SessionTicketsDisabled: true,
	}, nil
}

func measure(size int64, move func() error) (Rate, error) {
	cpu, start := OwnCPU(), time.Now()
	if err := move(); err != nil {
		return Rate{}, err
	}
	took := time.Since(start)
	return Rate{float64(size) / (1 << 20) / took.Seconds(), (OwnCPU() - cpu).Seconds() / (float64(size) / (1 << 30))}, nil
}

// OwnCPU is the processor time that this process has used.
func OwnCPU() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// CPU is the processor time that another process has used, in steps of 10 ms; 0 when
// there is none.
func CPU(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	return parseStat(text)
}

// parseStat finds the processor time in /proc/PID/stat, whose second field, a name in
// brackets, may hold anything.
func parseStat(text []byte) time.Duration {
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	var ticks int64
	for _, i := range []int{11, 12} { // utime, stime
		if i >= len(fields) {
			return 0
		}
		n, err := strconv.ParseInt(string(fields[i]), 10, 64)
		if err != nil {
			return 0
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}
