//go:build e2e

package e2e

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// TestBadInput throws what a broken or hostile network can throw at every port,
// while verified I/O goes on: no session of others may suffer, no process die,
// no memory grow without bound.
func TestBadInput(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:512M"}})
	v := r.volume("demo")
	load := r.verify(r.both(v.LUN), 0, 64*mib)
	pids := r.pids()
	memory := r.memory()

	t.Run("garbage to every port", func(t *testing.T) { r.garbage(t, load) })
	t.Run("half-open connections", func(t *testing.T) { r.halfOpen(t, load, v.LUN) })
	t.Run("logins with wrong names", func(t *testing.T) { r.wrongNames(t, load) })
	t.Run("oversized and malformed PDUs", func(t *testing.T) { r.badPDUs(t, load) })
	t.Run("wrong secrets", func(t *testing.T) { r.wrongSecrets(t, load) })

	load.progress(500, 30*time.Second)
	res := load.stop()
	if res.Failover.Losses != 0 || res.Errors.SCSI != 0 {
		t.Errorf("the session of an innocent initiator suffered: %+v, %+v", res.Failover, res.Errors)
	}
	load.check(r.c.URL("b", v.LUN))
	r.must(r.c.WaitHealthy(r.ctx, 30*time.Second), "health afterwards")
	if now := r.pids(); now != pids {
		t.Errorf("processes before %s, after %s", pids, now)
	}
	if grown := r.memory() - memory; grown > 512 {
		t.Errorf("the nodes grew by %d MiB", grown)
	}
}

func (r *rig) pids() string {
	r.Helper()
	r.must(r.c.Reload(), "demo.json")
	return fmt.Sprint(r.c.Nodes[0].PID, r.c.Nodes[1].PID, r.c.Witness.PID)
}

// memory is the resident memory of both nodes in MiB.
func (r *rig) memory() int64 {
	r.Helper()
	total := int64(0)
	for _, n := range r.c.Nodes {
		m, err := rssMiB(n.PID)
		r.must(err, "memory of node %s", n.Name)
		total += m
	}
	return total
}

// ports are all TCP ports of the cluster: portals, node to node, metrics, API.
func (r *rig) ports() []string {
	var all []string
	for _, n := range []int{0, 1, 100, 101, 102, 200, 201, 202, 300, 301, 302} {
		address := fmt.Sprintf("127.0.0.1:%d", r.c.BasePort+n)
		if c, err := net.DialTimeout("tcp", address, time.Second); err == nil {
			c.Close()
			all = append(all, address)
		}
	}
	return all
}

// send writes bytes and waits until the other side has answered or hung up.
func send(address string, bytes []byte) error {
	c, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return fmt.Errorf("%s accepts nobody any more: %w", address, err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	// What the other side makes of it shows in the load that goes on.
	_, _ = c.Write(bytes)
	_, _ = io.CopyN(io.Discard, c, 256)
	return nil
}

func (r *rig) garbage(t *testing.T, load *verified) {
	ports := r.ports()
	if len(ports) < 6 {
		t.Fatalf("only %v listen", ports)
	}
	random := make([]byte, 64<<10)
	for i := range random {
		random[i] = byte(r.rand.Uint32())
	}
	huge := make([]byte, 48)
	huge[0] = 0x43
	putLength(huge, 1<<24-1)
	allOnes := make([]byte, 4096)
	for i := range allOnes {
		allOnes[i] = 0xff
	}
	inputs := [][]byte{
		random[:1], random[:47], random, make([]byte, 1<<20), huge, allOnes, append(huge, allOnes...),
		[]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), []byte("GET " + strings.Repeat("A", 1<<20)),
		[]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\xff\xff\x04\x00\x00\x00\x00\x00"),
		{0x16, 0x03, 0x01, 0xff, 0xff}, append([]byte("1NWT"), random[:44]...), append([]byte("TWN1"), random...),
	}
	var group sync.WaitGroup
	for _, port := range ports {
		group.Go(func() {
			for _, in := range inputs {
				if err := send(port, in); err != nil {
					t.Error(err)
				}
			}
			// A stranger without our certificate, and one who trusts anything.
			for _, protocol := range []string{"twinsan-raft/1", "twinsan-rpc/1", "twinsan-data/1", "twinsan-join/1", "h2", "nonsense"} {
				stranger(port, protocol, random)
			}
		})
	}
	group.Wait()
	load.progress(300, 30*time.Second)
}

// stranger speaks TLS without a certificate; whatever it achieves must do no harm.
func stranger(address, protocol string, junk []byte) {
	d := &net.Dialer{Timeout: 5 * time.Second}
	c, err := tls.DialWithDialer(d, "tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{protocol}}) // #nosec: an attacker checks nothing
	if err != nil {
		return
	}
	defer c.Close()
	if c.SetDeadline(time.Now().Add(2*time.Second)) != nil {
		return
	}
	_, _ = c.Write(junk)
	_, _ = io.CopyN(io.Discard, c, 256)
}

// halfOpen opens connections that say nothing or stop in the middle, and
// measures how long an honest login takes meanwhile.
func (r *rig) halfOpen(t *testing.T, load *verified, lun int) {
	portal := r.c.Node("a").Portal
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	part := make([]byte, 40)
	part[0] = 0x43
	for i := range 300 {
		c, err := net.DialTimeout("tcp", portal, 5*time.Second)
		if err != nil {
			break // refused at its limit: that is an answer
		}
		open = append(open, c)
		if i%2 == 0 {
			_, _ = c.Write(part)
		}
	}
	t.Logf("%d connections stand half open", len(open))
	load.progress(300, 30*time.Second)
	// An administrator's and an old session's life goes on; a new login from the
	// flooding address may be refused, and must work once the flood is over.
	for _, c := range open {
		c.Close()
	}
	open = nil
	start := time.Now()
	inq, err := lab.Tool("iscsi-inq")
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Until(r.ctx, 20*time.Second, func() error {
		_, err := lab.Run(r.ctx, inq, r.c.URL("a", lun))
		return err
	}); err != nil {
		t.Errorf("no login after the flood: %v", err)
	}
	t.Logf("a login %.1f s after the flood", time.Since(start).Seconds())
}

func (r *rig) wrongNames(t *testing.T, load *verified) {
	for i, names := range [][2]string{
		{"iqn.2026-11.test:x", "iqn.2026-11.io.twinsan:nobody"},
		{"", r.c.Target},
		{"iqn.2026-11.test:" + strings.Repeat("x", 4000), r.c.Target},
		{"not a name at all\x01", r.c.Target},
		{"iqn.2026-11.test:x", strings.Repeat("y", 8000)},
	} {
		for range 4 {
			c, err := rawLogin(r.c.Nodes[i%2].Portal, names[0], names[1])
			if err == nil {
				t.Errorf("a login with names %.40q, %.40q succeeded", names[0], names[1])
				c.Close()
			}
		}
	}
	load.progress(300, 30*time.Second)
}

// badPDUs logs in properly and then misbehaves: the connection must end, or the
// PDU be rejected, and nothing else happen.
func (r *rig) badPDUs(t *testing.T, load *verified) {
	bad := map[string]func() []byte{
		"data segment of 16 MiB": func() []byte { p := scsiCommand(); putLength(p, 1<<24-1); return append(p, make([]byte, 1<<16)...) },
		"additional header of 1020 bytes": func() []byte {
			p := scsiCommand()
			p[4] = 255
			return append(p, make([]byte, 1020)...)
		},
		"unknown opcode":              func() []byte { p := make([]byte, 48); p[0] = 0x1e; return p },
		"target's opcode":             func() []byte { p := make([]byte, 48); p[0] = 0x21; return p },
		"login in full feature phase": func() []byte { p := make([]byte, 48); p[0] = 0x43; return p },
		"data out without a command":  func() []byte { p := make([]byte, 48); p[0] = 0x05; p[1] = 0x80; p[23] = 9; return p },
		"snack":                       func() []byte { p := make([]byte, 48); p[0] = 0x10; p[1] = 0x80; return p },
		"immediate data beyond the expected length": func() []byte {
			p := scsiCommand()
			p[1] |= 0x20
			p[32] = 0x2a // WRITE(10) of no blocks
			putLength(p, 65536)
			return append(p, make([]byte, 65536)...)
		},
		"half a header, then the end": func() []byte { return make([]byte, 20) },
	}
	for name, build := range bad {
		c, err := rawLogin(r.c.Nodes[0].Portal, "iqn.2026-11.test:bad", r.c.Target)
		if err != nil {
			t.Fatalf("%s: login: %v", name, err)
		}
		_, _ = c.Write(build())
		if half, ok := c.(*net.TCPConn); ok {
			_ = half.CloseWrite()
		}
		// Either an answer or the end, but in time.
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				t.Errorf("%s: neither an answer nor the end of the connection within 10 s", name)
			}
		}
		c.Close()
	}
	load.progress(300, 30*time.Second)
}

// scsiCommand is a SCSI Command PDU with TEST UNIT READY.
func scsiCommand() []byte {
	p := make([]byte, 48)
	p[0], p[1] = 0x01, 0x80
	p[19] = 7 // task tag
	p[27] = 1 // CmdSN
	return p
}

// wrongSecrets gives a volume to one host with CHAP and tries to get at it.
func (r *rig) wrongSecrets(t *testing.T, load *verified) {
	const initiator = "iqn.2026-11.test:vault"
	var page struct {
		Secret string `json:"chap_secret"`
		Host   struct {
			User string `json:"chap_user"`
		} `json:"host"`
	}
	if err := r.c.JSON(r.ctx, &page, "host", "add", "vault", initiator, "--chap"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.c.CLI(r.ctx, "volume", "create", "secret", "64M", "--host", "vault"); err != nil {
		t.Fatal(err)
	}
	var v *lab.Volume
	if err := lab.Until(r.ctx, 30*time.Second, func() (err error) {
		if v, err = r.c.Volume(r.ctx, "secret"); err == nil && len(v.ServedBy) < 2 {
			err = fmt.Errorf("served by %v", v.ServedBy)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	try := func(chap, name string, ok bool) {
		t.Helper()
		url := r.c.URL("b", v.LUN)
		if chap != "" {
			url = strings.Replace(url, "://", "://"+chap+"@", 1)
		}
		_, err := lab.RunLoad(r.ctx, r.iscsiload, "--initiator", name, "--rw", "read", "--ops", "1", url)
		if (err == nil) != ok {
			t.Errorf("initiator %s with %q: %v, want access %t", name, strings.ReplaceAll(chap, page.Secret, "SECRET"), err, ok)
		}
	}
	try(page.Host.User+"%"+page.Secret, initiator, true)
	for range 3 {
		try(page.Host.User+"%wrong-secret-000", initiator, false)
	}
	try("", initiator, false)
	try("", "iqn.2026-11.test:stranger", false)
	try(page.Host.User+"%"+page.Secret, "iqn.2026-11.test:stranger", false)
	// What is secret stays out of the logs and of what the API tells.
	for _, n := range r.c.Nodes {
		log, err := os.ReadFile(filepath.Join(n.Dir, "node.log"))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(log), page.Secret) {
			t.Errorf("the log of node %s holds a CHAP secret", n.Name)
		}
	}
	for _, args := range [][]string{{"host", "list"}, {"status"}, {"events"}, {"session", "list"}} {
		out, _ := r.c.CLI(r.ctx, append(args, "-o", "json")...)
		if strings.Contains(string(out), page.Secret) {
			t.Errorf("twinsan %v tells a CHAP secret", args)
		}
	}
	load.progress(300, 30*time.Second)
	if _, err := r.c.CLI(r.ctx, "volume", "delete", "secret", "--yes", "--in-use"); err != nil {
		t.Error(err)
	}
	if _, err := r.c.CLI(r.ctx, "host", "remove", "vault", "--yes", "--in-use"); err != nil {
		t.Error(err)
	}
}

// TestBadFiles gives a node a file of its own that is wrong: the node says what
// is wrong and where, and the other one serves on.
func TestBadFiles(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "1G", Volumes: []string{"demo:256M"}})
	v := r.volume("demo")
	load := r.verify(r.both(v.LUN), 0, 32*mib, "--failover", "--io-timeout", "20")
	b := *r.c.Node("b")

	t.Run("unknown key in the configuration", func(t *testing.T) {
		text, err := os.ReadFile(filepath.Join(b.Dir, "twinsan.toml"))
		if err != nil {
			t.Fatal(err)
		}
		wrong := filepath.Join(r.dir, "wrong.toml")
		line := strings.Count(string(text), "\n") + 2
		if err := os.WriteFile(wrong, append(text, "\ncolour = \"red\"\n"...), 0o600); err != nil {
			t.Fatal(err)
		}
		r.refuses(t, lab.ExitUsage, []string{"serve", "--config", wrong}, "colour", fmt.Sprintf("wrong.toml:%d", line))
	})
	r.demo("stop", "b")
	device := b.Devices[0]
	const area = 1 << 20 // the superblocks stand in the first MiB
	good := make([]byte, area)
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	r.must(err, "open the device")
	defer f.Close()
	_, err = f.ReadAt(good, 0)
	r.must(err, "read the superblocks")
	serve := []string{"serve", "--config", filepath.Join(b.Dir, "twinsan.toml")}

	t.Run("device gone", func(t *testing.T) {
		defer takeAway(t, device)()
		r.refuses(t, lab.ExitFailed, serve, filepath.Base(device))
	})
	t.Run("all superblocks garbled", func(t *testing.T) {
		bad := make([]byte, area)
		for i := range bad {
			bad[i] = byte(r.rand.Uint32())
		}
		if _, err := f.WriteAt(bad, 0); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if _, err := f.WriteAt(good, 0); err != nil {
				t.Error(err)
			}
		}()
		r.refuses(t, lab.ExitFailed, serve, filepath.Base(device))
	})
	t.Run("the other node's device", func(t *testing.T) {
		defer takeAway(t, device)()
		if err := copyFile(device, r.c.Node("a").Devices[0]); err != nil {
			t.Fatal(err)
		}
		r.refuses(t, lab.ExitFailed, serve, filepath.Base(device))
	})
	load.progress(300, 30*time.Second)
	// One damaged copy of four is no reason to stay down.
	_, err = f.WriteAt(make([]byte, 4096), 0)
	r.must(err, "damage one superblock")
	r.demo("start", "b")
	r.must(r.c.WaitHealthy(r.ctx, time.Minute), "recovery with one damaged superblock")
	load.stop()
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
	load.check(r.c.URL("b", v.LUN))
}

// takeAway renames a device; the function that it returns puts it back.
func takeAway(t *testing.T, device string) func() {
	t.Helper()
	// Out of its directory: beside the others a node finds it by what it holds.
	away := filepath.Join(filepath.Dir(filepath.Dir(device)), "away")
	if err := os.Rename(device, away); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Rename(away, device); err != nil {
			t.Error(err)
		}
	}
}

// refuses runs a command that must end by itself with the code, and say the words.
func (r *rig) refuses(t *testing.T, code int, args []string, words ...string) {
	t.Helper()
	c, err := lab.Start(r.ctx, *program, args...)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Ended():
	case <-time.After(30 * time.Second):
		c.Kill()
		t.Fatalf("twinsan %v runs instead of refusing", args)
	}
	c.Kill()
	said, got := c.Said()
	if got != code {
		t.Errorf("twinsan %v: exit code %d, want %d\n%s", args, got, code, said)
	}
	for _, w := range words {
		if !strings.Contains(said, w) {
			t.Errorf("twinsan %v does not name %q:\n%s", args, w, said)
		}
	}
}

// TestCommandLine holds the promises to scripts: exit codes, and JSON with a version.
func TestCommandLine(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "1G", Volumes: []string{"demo:64M"}})
	for _, c := range []struct {
		code int
		args []string
	}{
		{0, []string{"status"}}, {0, []string{"node", "list"}}, {0, []string{"device", "list"}}, {0, []string{"volume", "list"}},
		{0, []string{"volume", "show", "demo"}}, {0, []string{"host", "list"}}, {0, []string{"session", "list"}},
		{0, []string{"volume", "resize", "demo", "128M"}}, {0, []string{"volume", "check", "demo"}},
		{lab.ExitFailed, []string{"volume", "show", "nothing"}},
		{lab.ExitUsage, []string{"volume", "create", "x"}}, {lab.ExitUsage, []string{"volume", "create", "x", "12parsecs"}}, {lab.ExitUsage, []string{"frobnicate"}},
		{lab.ExitUsage, []string{"status", "-o", "xml"}},
		{lab.ExitRefused, []string{"volume", "delete", "demo"}}, // nobody is there to confirm
	} {
		for _, format := range []string{"table", "json"} {
			args := c.args
			if format == "json" && c.args[len(c.args)-1] != "xml" {
				args = append(args, "-o", "json")
			}
			out, err := r.c.CLI(r.ctx, args...)
			code := 0
			var exit *lab.ExitError
			if errors.As(err, &exit) {
				code = exit.Code
			} else if err != nil {
				t.Fatal(err)
			}
			if code != c.code {
				t.Errorf("twinsan %v: exit code %d, want %d: %v", args, code, c.code, err)
			}
			if code == 0 && format == "json" {
				var page struct {
					Version int `json:"version"`
				}
				if err := json.Unmarshal(out, &page); err != nil || page.Version != 1 {
					t.Errorf("twinsan %v: version %d, %v\n%s", args, page.Version, err, out)
				}
			}
		}
	}
	if v := r.volume("demo"); v.Size != 128*mib {
		t.Errorf("after a resize to 128M the volume has %d bytes", v.Size)
	}
	r.demo("kill", "b")
	_, err := r.c.CLI(r.ctx, "status", "--wait", "degraded")
	var exit *lab.ExitError
	if !errors.As(err, &exit) || exit.Code != lab.ExitDegraded {
		t.Errorf("status while a node is down: %v, want exit code %d", err, lab.ExitDegraded)
	} else if !strings.Contains(exit.Stdout, "risk:") || !strings.Contains(exit.Stdout, "do:") {
		t.Errorf("status names neither risk nor remedy:\n%s", exit.Stdout)
	}
}
