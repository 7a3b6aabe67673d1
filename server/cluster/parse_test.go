package cluster

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

func FuzzMessage(f *testing.F) {
	join := joinRequest{Name: "b", Role: RoleData, Addresses: Addresses{Sync: "h:1", Portals: []string{"h:2"}}, CSR: []byte("csr")}
	answer := joinAnswer{Node: 2, Cert: []byte("cert"), Cluster: initCommand().Cluster, SealKey: []byte("key")}
	res := result{Code: codeConflict, Text: "no", Index: 7}
	pong := Pong{Node: 1, Applied: 9, Ready: true}
	for _, v := range []walker{&join, &answer, &res, &pong} {
		var b bytes.Buffer
		if err := writeFrame(&b, 1, must(encode(v))(f)); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		kind, body, err := readFrame(bytes.NewReader(data))
		if err != nil {
			return
		}
		var b bytes.Buffer
		if err := writeFrame(&b, kind, body); err != nil || !bytes.Equal(b.Bytes(), data[:b.Len()]) {
			t.Fatalf("frame changed: %v", err)
		}
		for _, v := range []walker{new(joinRequest), new(joinAnswer), new(result), new(Pong)} {
			if decode(body, v) != nil {
				continue
			}
			if again, err := encode(v); err != nil || !bytes.Equal(again, body) {
				t.Fatalf("%T: encoding is not canonical: %v", v, err)
			}
		}
	})
}

// A length in the input never makes the decoder allocate more than the input.
func TestDecodeBounds(t *testing.T) {
	huge := binary.BigEndian.AppendUint32(nil, 0xfffffff0)
	var blobValue []byte
	var textValue string
	var listValue []token
	for what, walk := range map[string]func(*codec){
		"blob": func(c *codec) { blob(c, &blobValue) },
		"text": func(c *codec) { text(c, &textValue) },
		"list": func(c *codec) { list(c, &listValue, func(c *codec, t *token) { t.walk(c) }) },
	} {
		c := codec{buf: huge, decoding: true}
		if walk(&c); c.err == nil {
			t.Errorf("%s: a length beyond the input is taken", what)
		}
	}
	long := strings.Repeat("x", maxText+1)
	c := codec{}
	if text(&c, &long); c.err == nil {
		t.Error("a text beyond its limit is written")
	}
	if _, err := encodeCommand(envelope{}, &cmdAddEvent{Info, "x", long}); err == nil {
		t.Error("a command beyond its limits is written")
	}
}

func FuzzToken(f *testing.F) {
	f.Add(newTokenParts([]byte("ca")).String())
	f.Add("tw1-")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parseToken(s)
		if err == nil && p.String() != strings.ToLower(strings.TrimSpace(s)) {
			t.Fatalf("%q is taken as %s", s, p)
		}
		if err != nil && !errors.Is(err, ErrToken) {
			t.Fatal(err)
		}
	})
}

func testIdentity() *Identity {
	return &Identity{Cluster: "lab", UUID: uuid.UUID{1}, Created: day, Target: "iqn.x", Node: 2, Name: "b", Role: RoleData, Addresses: Addresses{Sync: "h:1"}, CAKey: Sealed("s"), Fingerprint: Sealed("f")}
}

func FuzzIdentity(f *testing.F) {
	f.Add(must(marshalIdentity(testIdentity()))(f))
	f.Add([]byte(`{"version":1,"crc32c":"00000000","identity":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := unmarshalIdentity(b)
		if err != nil {
			return
		}
		again := must(marshalIdentity(id))(t)
		if _, err := unmarshalIdentity(again); err != nil {
			t.Fatal(err)
		}
	})
}

// Every wrong byte of the identity is noticed, or changes nothing.
func TestIdentityDamage(t *testing.T) {
	dir := t.TempDir()
	good := must(marshalIdentity(testIdentity()))(t)
	path := filepath.Join(dir, fileIdentity)
	if _, err := ReadIdentity(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("empty directory: %v", err)
	}
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 0x10
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		id, err := ReadIdentity(dir)
		if err == nil && !bytes.Equal(must(marshalIdentity(id))(t), good) {
			t.Fatalf("wrong byte %d is taken: %s", i, bad)
		}
		if err != nil && !strings.Contains(err.Error(), path) {
			t.Fatalf("error does not name the file: %v", err)
		}
	}
}

func TestSeal(t *testing.T) {
	k := newSealKey()
	s := k.seal("p", []byte("secret"))
	if b := must(k.open("p", s))(t); string(b) != "secret" {
		t.Errorf("%q", b)
	}
	if bytes.Equal(s, k.seal("p", []byte("secret"))) {
		t.Error("two seals are equal")
	}
	other := newSealKey()
	for i := range s {
		bad := slices.Clone(s)
		bad[i] ^= 1
		if _, err := k.open("p", bad); !errors.Is(err, errSeal) {
			t.Errorf("wrong byte %d opens", i)
		}
	}
	for _, f := range []func() ([]byte, error){
		func() ([]byte, error) { return k.open("q", s) },
		func() ([]byte, error) { return other.open("p", s) },
		func() ([]byte, error) { return k.open("p", s[:5]) },
		func() ([]byte, error) { return k.open("p", nil) },
	} {
		if _, err := f(); !errors.Is(err, errSeal) {
			t.Errorf("opens: %v", err)
		}
	}
}

// The first error of the store latches and is told once.
func TestStoreLatch(t *testing.T) {
	var fatal []error
	s, _, err := openRaftStore(t.TempDir(), newRaftLog(slog.New(slog.DiscardHandler)), func(err error) { fatal = append(fatal, err) })
	if err != nil {
		t.Fatal(err)
	}
	if err := s.StoreLog(&raft.Log{Index: 1, Term: 1}); err != nil {
		t.Fatal(err)
	}
	if err := s.GetLog(7, new(raft.Log)); !errors.Is(err, raft.ErrLogNotFound) || len(fatal) != 0 {
		t.Errorf("missing entry: %v, fatal %v", err, fatal)
	}
	// A gap in the log is an error of the store like any other.
	if err := s.StoreLog(&raft.Log{Index: 9, Term: 1}); err == nil || len(fatal) != 1 {
		t.Fatalf("%v, fatal %v", err, fatal)
	}
	for what, f := range map[string]func() error{
		"StoreLog":    func() error { return s.StoreLog(&raft.Log{Index: 2, Term: 1}) },
		"GetLog":      func() error { return s.GetLog(1, new(raft.Log)) },
		"SetUint64":   func() error { return s.SetUint64([]byte("k"), 1) },
		"Set":         func() error { return s.Set([]byte("k"), nil) },
		"GetUint64":   func() error { _, err := s.GetUint64([]byte("k")); return err },
		"Get":         func() error { _, err := s.Get([]byte("k")); return err },
		"LastIndex":   func() error { _, err := s.LastIndex(); return err },
		"FirstIndex":  func() error { _, err := s.FirstIndex(); return err },
		"DeleteRange": func() error { return s.DeleteRange(1, 1) },
	} {
		if f() == nil {
			t.Errorf("%s works on a failed store", what)
		}
	}
	if len(fatal) != 1 {
		t.Errorf("told %d times", len(fatal))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestJoinGate(t *testing.T) {
	var g joinGate
	for i := range joinBurst {
		if !g.enter(day) {
			t.Fatalf("attempt %d", i)
		}
		g.leave()
	}
	if g.enter(day.Add(joinEvery - 1)) {
		t.Error("beyond the burst")
	}
	if !g.enter(day.Add(joinEvery)) || g.enter(day.Add(joinEvery)) {
		t.Error("one more in each period")
	}
	g.leave()
	for range joinBurst {
		if !g.enter(day.Add(time.Hour)) {
			t.Error("the burst comes back")
		}
	}
	if g.enter(day.Add(2 * time.Hour)) {
		t.Error("too many at once")
	}
}

func TestRaftLog(t *testing.T) {
	var b bytes.Buffer
	l := newRaftLog(slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug})))
	l.Named("net").With("peer", 2).Error("failed", "error", errors.New("down"), "servers", hclog.Fmt("%d of %d", 1, 3))
	l.Debug("noise")
	l.Warn("again")
	l.Warn("again")
	out := b.String()
	for _, want := range []string{"level=WARN msg=failed peer=2 part=raft.net err=down servers=\"1 of 3\"", "level=INFO msg=again"} {
		if !strings.Contains(out, want) {
			t.Errorf("log has no %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "noise") || strings.Count(out, "again") != 1 {
		t.Errorf("too much:\n%s", out)
	}
}
