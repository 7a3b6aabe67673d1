package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Config is the file of one node: only what must be known before the node can
// speak to its cluster. Everything else is state of the cluster, behind the
// API. packaging/twinsan.toml is the same with comments.
type Config struct {
	// Name of the node in its cluster: a DNS label.
	Name string `toml:"name"`
	// DataDir holds certificates, raft log and snapshots; mode 0700.
	DataDir string `toml:"data-dir"`

	Store      StoreConfig      `toml:"store"`
	Sync       SyncConfig       `toml:"sync"`
	Management ManagementConfig `toml:"management"`
	ISCSI      ISCSIConfig      `toml:"iscsi"`
	API        APIConfig        `toml:"api"`
	Metrics    MetricsConfig    `toml:"metrics"`
	Log        LogConfig        `toml:"log"`
}

// StoreConfig describes the pool of a data node. A witness has none.
type StoreConfig struct {
	// Devices are block devices or files that "init" and "join" format. Later devices
	// come and go by "twinsan device"; here they are only where they are looked for.
	Devices []string `toml:"devices"`
	// CapacityDevices are more of them, of class capacity: cold data goes there. Of the
	// others those that rotate are of class capacity too. Both lists: 1 to 64 paths.
	CapacityDevices []string `toml:"capacity-devices"`
	// DeviceSize is the size of a device that is a file and does not exist when
	// the pool is formatted, 64 MiB to 64 TiB. 0: devices must exist.
	DeviceSize Size `toml:"device-size"`
	// Cache is the RAM for data that was read or written lately, 16 MiB to 4 TiB.
	Cache Size `toml:"cache"`
	// L2 is a flash device or file for the second level of the cache; empty: none.
	L2 string `toml:"l2"`
	// L2Size is the size of the file that is made when there is nothing at L2, 16 MiB
	// to 64 TiB. 0: it must exist.
	L2Size Size `toml:"l2-size"`
	// MetadataRAM is the RAM for all metadata, 16 MiB to 4 TiB: Metadata, Index, and what
	// the page directory of the pool needs. 0: none, which is 1 GiB unless both are set.
	MetadataRAM Size `toml:"metadata-ram"`
	// Metadata is the RAM for map pages, 16 MiB to 4 TiB. 0: what MetadataRAM leaves.
	Metadata Size `toml:"metadata"`
	// Index is the RAM for the index of fingerprints, 4 MiB to 1 TiB. 0: a quarter of MetadataRAM.
	Index Size `toml:"index"`
	// MergeMinutes is how often duplicates that the index forgot are looked for in the
	// background, if anything was stored, 1 to 10080; 0: never.
	MergeMinutes int `toml:"merge-minutes"`
	// ColdMinutes is how long a part of the pool is neither written nor much read until its blocks
	// are compressed anew in quiet hours, 1 to 43200; 0: only when they move anyhow.
	ColdMinutes int `toml:"cold-minutes"`
	// ScrubDays is how many days a scrub of the whole pool may take, and how often
	// one begins, 1 to 365; 0: none begins by itself.
	ScrubDays int `toml:"scrub-days"`
	// FlushMilliseconds is how long a write of a volume with the policy mirrored-ram may
	// wait for its flush, 1 to 10000.
	FlushMilliseconds int `toml:"flush-milliseconds"`
}

// paths are all devices.
func (s *StoreConfig) paths() []string { return slices.Concat(s.Devices, s.CapacityDevices) }

// SyncConfig is the data path: replication, and the leases under which volumes are
// served. What else the nodes have to say takes it too when there is no other way.
type SyncConfig struct {
	// Address is host:port that the other nodes reach; port 7400 when left out.
	Address string `toml:"address"`
}

// ManagementConfig is where the nodes agree on who owns what (raft), and ask each other.
type ManagementConfig struct {
	// Address is host:port that the other nodes reach, port 7400 when left out; empty:
	// the sync address.
	Address string `toml:"address"`
}

// ISCSIConfig is where initiators log in.
type ISCSIConfig struct {
	// Portals are ip:port, told to initiators as they stand here; port 3260 when left out.
	Portals []string `toml:"portals"`
}

// APIConfig is where administrators and the other nodes ask.
type APIConfig struct {
	// Socket is the path of a unix socket for root and the user of the node.
	Socket string `toml:"socket"`
	// Address is host:port for mutual TLS; the management host with port 7443 when left out.
	Address string `toml:"address"`
}

// MetricsConfig is where Prometheus scrapes.
type MetricsConfig struct {
	// Address is host:port for /metrics, plain HTTP; empty: none.
	Address string `toml:"address"`
}

// LogConfig is what the node writes to standard error.
type LogConfig struct {
	// Level is debug, info, warn or error.
	Level string `toml:"level"`
}

// The paths of an installed node.
const (
	DefaultConfigPath = "/etc/twinsan/twinsan.toml"
	DefaultDataDir    = "/var/lib/twinsan"
	DefaultSocket     = "/run/twinsan/api.sock"
)

// The default ports.
const (
	SyncPort    = 7400
	APIPort     = 7443
	MetricsPort = 9260
	PortalPort  = 3260
)

// DefaultConfig has every default; name, sync address, devices and portals
// have none.
func DefaultConfig() *Config {
	return &Config{
		DataDir: DefaultDataDir,
		Store:   StoreConfig{Cache: 1 << 30, MergeMinutes: 60, ColdMinutes: 1440, ScrubDays: 14, FlushMilliseconds: 200},
		API:     APIConfig{Socket: DefaultSocket},
		Log:     LogConfig{Level: "info"},
	}
}

// ConfigError is what is wrong with a configuration file.
type ConfigError struct {
	Path string
	Line int    // 1 and up; 0: the file as a whole
	Key  string // "store.cache"; may be empty
	Text string
}

// Error names file, line and key.
func (e *ConfigError) Error() string {
	var b strings.Builder
	b.WriteString(e.Path)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d", e.Line)
	}
	b.WriteString(": ")
	if e.Key != "" {
		b.WriteString(e.Key + ": ")
	}
	b.WriteString(e.Text)
	return b.String()
}

// maxConfigBytes bounds the file, so that a wrong path is not read into memory.
const maxConfigBytes = 1 << 20

// LoadConfig reads and validates the file of a node. Every mistake is a
// *ConfigError; several are joined.
func LoadConfig(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxConfigBytes {
		return nil, &ConfigError{Path: path, Text: "larger than 1 MiB, so this is no configuration file"}
	}
	return ParseConfig(path, text)
}

// ParseConfig reads a configuration that came from path.
func ParseConfig(path string, text []byte) (*Config, error) {
	c := DefaultConfig()
	decoder := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := decoder.Decode(c); err != nil {
		return nil, decodeError(path, err)
	}
	if err := c.complete(path, text); err != nil {
		return nil, err
	}
	return c, nil
}

func decodeError(path string, err error) error {
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) {
		var all []error
		for _, e := range missing.Errors {
			line, _ := e.Position()
			all = append(all, &ConfigError{Path: path, Line: line, Key: strings.Join(e.Key(), "."), Text: "unknown key"})
		}
		return errors.Join(all...)
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		line, _ := decode.Position()
		return &ConfigError{Path: path, Line: line, Key: strings.Join(decode.Key(), "."), Text: strings.TrimPrefix(decode.Error(), "toml: ")}
	}
	return &ConfigError{Path: path, Text: err.Error()}
}

var nameRule = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidName says whether s may name a node, a volume, a host or a cluster: a
// DNS label in lower case.
func ValidName(s string) bool { return nameRule.MatchString(s) }

// complete fills what follows from other values and checks the rest.
func (c *Config) complete(path string, text []byte) error {
	var all []error
	wrong := func(key, format string, args ...any) {
		all = append(all, &ConfigError{Path: path, Line: lineOf(text, key), Key: key, Text: fmt.Sprintf(format, args...)})
	}
	if !ValidName(c.Name) {
		wrong("name", "%q: want 1 to 63 lower case letters, digits and hyphens", c.Name)
	}
	if !filepath.IsAbs(c.DataDir) {
		wrong("data-dir", "%q is not an absolute path", c.DataDir)
	}
	if n := len(c.Store.paths()); n > 64 {
		wrong("store.devices", "%d devices, at most 64", n)
	}
	if len(c.Store.CapacityDevices) == 0 {
		c.Store.CapacityDevices = nil // an empty list in the file is none
	}
	seen := map[string]bool{}
	for _, d := range c.Store.paths() {
		if !filepath.IsAbs(d) {
			wrong("store.devices", "%q is not an absolute path", d)
		}
		if seen[filepath.Clean(d)] {
			wrong("store.devices", "%q is named twice", d)
		}
		seen[filepath.Clean(d)] = true
	}
	between := func(key string, v, low, high Size) {
		if v < low || v > high {
			wrong(key, "%s, want %s to %s", v, low, high)
		}
	}
	if c.Store.DeviceSize != 0 {
		between("store.device-size", c.Store.DeviceSize, 64<<20, 64<<40)
	}
	between("store.cache", c.Store.Cache, 16<<20, 4<<40)
	if c.Store.L2 != "" {
		switch {
		case !filepath.IsAbs(c.Store.L2):
			wrong("store.l2", "%q is not an absolute path", c.Store.L2)
		case seen[filepath.Clean(c.Store.L2)]:
			wrong("store.l2", "%q is a device of the pool", c.Store.L2)
		}
	}
	if c.Store.L2Size != 0 {
		between("store.l2-size", c.Store.L2Size, 16<<20, 64<<40)
	}
	if c.Store.FlushMilliseconds < 1 || 10_000 < c.Store.FlushMilliseconds {
		wrong("store.flush-milliseconds", "%d, want 1 to 10000", c.Store.FlushMilliseconds)
	}
	if c.Store.MergeMinutes < 0 || 10080 < c.Store.MergeMinutes {
		wrong("store.merge-minutes", "%d, want 0 to 10080", c.Store.MergeMinutes)
	}
	if c.Store.ColdMinutes < 0 || 43200 < c.Store.ColdMinutes {
		wrong("store.cold-minutes", "%d, want 0 to 43200", c.Store.ColdMinutes)
	}
	if c.Store.Metadata != 0 {
		between("store.metadata", c.Store.Metadata, 16<<20, 4<<40)
	}
	if c.Store.Index != 0 {
		between("store.index", c.Store.Index, 4<<20, 1<<40)
	}
	parts := c.Store.Metadata + c.Store.Index
	switch both := c.Store.Metadata != 0 && c.Store.Index != 0; {
	case c.Store.MetadataRAM == 0 && !both:
		c.Store.MetadataRAM = 1<<30 + parts
	case c.Store.MetadataRAM == 0:
	default:
		between("store.metadata-ram", c.Store.MetadataRAM, 16<<20, 4<<40)
		if least := parts + 12<<20; both && c.Store.MetadataRAM < parts || !both && parts > 0 && c.Store.MetadataRAM < least {
			wrong("store.metadata-ram", "%s, of which metadata and index take %s: raise it, or leave them out and they are divided from it", c.Store.MetadataRAM, parts)
		}
	}
	if c.Store.ScrubDays < 0 || 365 < c.Store.ScrubDays {
		wrong("store.scrub-days", "%d, want 0 to 365", c.Store.ScrubDays)
	}

	address := func(key, s string, port int, literal bool) string {
		full, err := CompleteAddress(s, port, literal)
		if err != nil {
			wrong(key, "%v", err)
		}
		return full
	}
	c.Sync.Address = address("sync.address", c.Sync.Address, SyncPort, false)
	if c.Management.Address != "" {
		c.Management.Address = address("management.address", c.Management.Address, SyncPort, false)
	}
	if len(c.ISCSI.Portals) > 16 {
		wrong("iscsi.portals", "%d portals, at most 16", len(c.ISCSI.Portals))
	}
	for i, p := range c.ISCSI.Portals {
		c.ISCSI.Portals[i] = address("iscsi.portals", p, PortalPort, true)
	}
	if c.API.Socket == "" || !filepath.IsAbs(c.API.Socket) {
		wrong("api.socket", "%q is not an absolute path", c.API.Socket)
	} else if len(c.API.Socket) > 100 {
		wrong("api.socket", "longer than 100 bytes, which no unix socket can be")
	}
	if c.API.Address == "" && c.Sync.Address != "" {
		host, _, _ := net.SplitHostPort(c.control())
		c.API.Address = net.JoinHostPort(host, strconv.Itoa(APIPort))
	} else if c.API.Address != "" {
		c.API.Address = address("api.address", c.API.Address, APIPort, false)
	}
	if c.Metrics.Address != "" {
		if host, _, err := net.SplitHostPort(c.Metrics.Address); err == nil && (host == "" || host == "0.0.0.0" || host == "::") {
			// Metrics may listen everywhere: nobody is told this address.
		} else {
			c.Metrics.Address = address("metrics.address", c.Metrics.Address, MetricsPort, false)
		}
	}
	c.collisions(wrong)
	switch c.Log.Level {
	case "debug", "info", "warn", "error":
	default:
		wrong("log.level", "%q: want debug, info, warn or error", c.Log.Level)
	}
	return errors.Join(all...)
}

// CompleteAddress adds port to an address without one and refuses what others
// cannot connect to. With literal the host must be an IP address.
func CompleteAddress(s string, port int, literal bool) (string, error) {
	host, p, err := net.SplitHostPort(s)
	if err != nil {
		host, p = s, strconv.Itoa(port)
		if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
			host = s[1 : len(s)-1]
		}
		if strings.Contains(host, ":") {
			if _, err := netip.ParseAddr(host); err != nil {
				return "", fmt.Errorf("%q is not host:port", s)
			}
		}
	}
	if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("%q: port %q is not between 1 and 65535", s, p)
	}
	ip, err := netip.ParseAddr(host)
	switch {
	case host == "":
		return "", fmt.Errorf("%q has no host: name the address that others connect to", s)
	case err != nil && literal:
		return "", fmt.Errorf("%q: %q is not an IP address", s, host)
	case err == nil && ip.IsUnspecified():
		return "", fmt.Errorf("%q is no address that others can connect to", s)
	case err != nil && strings.ContainsAny(host, " /\\@[]"):
		return "", fmt.Errorf("%q is not a host name", host)
	}
	return net.JoinHostPort(host, p), nil
}

// lineOf finds the line where key ("table.key" or "key") is set, or 0. It is
// for messages only: the decoder has accepted the text before.
func lineOf(text []byte, key string) int {
	table, name, found := strings.Cut(key, ".")
	if !found {
		table, name = "", key
	}
	current := ""
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") && !strings.HasPrefix(line, "[[") {
			if end := strings.IndexByte(line, ']'); end > 0 {
				current = strings.TrimSpace(line[1:end])
			}
			continue
		}
		k, _, ok := strings.Cut(line, "=")
		if ok && ((current == table && strings.TrimSpace(k) == name) || (current == "" && strings.TrimSpace(k) == key)) {
			return i + 1
		}
	}
	return 0
}

// TOML writes the configuration as a file that LoadConfig accepts.
func (c *Config) TOML() ([]byte, error) {
	var b bytes.Buffer
	encoder := toml.NewEncoder(&b)
	encoder.SetTablesInline(false)
	encoder.SetArraysMultiline(false)
	if err := encoder.Encode(c); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
