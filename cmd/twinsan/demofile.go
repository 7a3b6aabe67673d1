package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"

	"github.com/twinsan/twinsan/server"
)

// demoFile is D/demo.json: what runs where, kept true by every demo command and
// by a demo in the foreground. Part of the interface for scripts: fields are
// only added.
type demoFile struct {
	version1
	Target  string       `json:"target"` // IQN
	Volumes []demoVolume `json:"volumes"`
	Nodes   []demoNode   `json:"nodes"`
	Witness *demoWitness `json:"witness,omitempty"`

	// What "demo up" was asked for, for "demo start" and a second "demo up".
	BasePort int `json:"base_port"`
}

type demoVolume struct {
	Name  string `json:"name"`
	LUN   uint32 `json:"lun"`
	Bytes uint64 `json:"bytes"`
}

type demoNode struct {
	Name string `json:"name"`
	process
	Portal  string   `json:"portal"`  // ip:port
	API     string   `json:"api"`     // for --api
	Metrics string   `json:"metrics"` // URL
	Dir     string   `json:"dir"`
	Devices []string `json:"devices"`
	Debug   string   `json:"debug,omitempty"` // address of profiles
}

type demoWitness struct {
	process
	API string `json:"api"`
	Dir string `json:"dir"`
}

const (
	demoFileName = "demo.json"
	witnessName  = "w"
	demoCluster  = "demo"
)

// member is a node or the witness, as the demo commands name them.
type member struct {
	name  string
	dir   string
	api   string
	debug string
	proc  *process // in the demoFile
}

func (f *demoFile) members() []member {
	var out []member
	for i := range f.Nodes {
		n := &f.Nodes[i]
		out = append(out, member{n.Name, n.Dir, n.API, n.Debug, &n.process})
	}
	if f.Witness != nil {
		out = append(out, member{witnessName, f.Witness.Dir, f.Witness.API, "", &f.Witness.process})
	}
	return out
}

func (f *demoFile) member(name string) (member, error) {
	var names []string
	for _, m := range f.members() {
		if m.name == name {
			return m, nil
		}
		names = append(names, m.name)
	}
	return member{}, usage("the demo has no node %q: it has %s", name, list(names))
}

func (m member) config() string { return filepath.Join(m.dir, "twinsan.toml") }
func (m member) log() string    { return filepath.Join(m.dir, "node.log") }

// refresh forgets processes that are gone and says whether any was.
func (f *demoFile) refresh() bool {
	changed := false
	for _, m := range f.members() {
		if m.proc.PID != 0 && m.proc.state() == processGone {
			*m.proc, changed = process{}, true
		}
	}
	return changed
}

func loadDemo(dir string) (*demoFile, error) {
	text, err := os.ReadFile(filepath.Join(dir, demoFileName))
	if err != nil {
		return nil, err
	}
	f := &demoFile{}
	if err := json.Unmarshal(text, f); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, demoFileName), err)
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("%s has version %d: it was made by another version of twinsan", filepath.Join(dir, demoFileName), f.Version)
	}
	f.refresh()
	return f, nil
}

func (f *demoFile) save(dir string) error {
	f.version1 = v1Header
	text, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(dir, demoFileName), append(text, '\n'), 0o600)
}

// lockDemo keeps other demo commands out until the returned function is called.
func lockDemo(dir string) (func(), error) {
	l, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(l.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return func() { l.Close() }, nil
}

// demoPlan is what "demo up" is asked for.
type demoPlan struct {
	dir        string
	nodes      int
	basePort   int
	deviceSize server.Size
	volumes    []volumeSpec
	detach     bool
	debugBase  int
}

type volumeSpec struct {
	name string
	size server.Size
}

// The ports of a demo, relative to its base port; node i adds i.
const (
	demoSyncPorts    = 100
	demoMetricsPorts = 200
	demoAPIPorts     = 300
)

// layOut writes the files of all nodes and the first demo.json.
func layOut(plan *demoPlan) (*demoFile, error) {
	f := &demoFile{BasePort: plan.basePort, Volumes: []demoVolume{}}
	write := func(name string, index int, witness bool) (dir string, config *server.Config, err error) {
		dir = filepath.Join(plan.dir, name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", nil, err
		}
		local := func(offset int) string { return fmt.Sprintf("127.0.0.1:%d", plan.basePort+offset+index) }
		config = server.DefaultConfig()
		config.Name, config.DataDir = name, dir
		config.Sync.Address, config.API.Address, config.Metrics.Address = local(demoSyncPorts), local(demoAPIPorts), local(demoMetricsPorts)
		if config.API.Socket, err = demoSocket(plan.dir, name); err != nil {
			return "", nil, err
		}
		config.Store.Cache, config.Store.Metadata, config.Store.Index = 256<<20, 256<<20, 64<<20
		if !witness {
			config.Store.Devices, config.Store.DeviceSize = []string{filepath.Join(dir, "disk0.img")}, plan.deviceSize
			config.ISCSI.Portals = []string{local(0)}
		}
		text, err := config.TOML()
		if err != nil {
			return "", nil, err
		}
		if config, err = server.ParseConfig("demo", text); err != nil {
			return "", nil, err
		}
		return dir, config, renameio.WriteFile(filepath.Join(dir, "twinsan.toml"), text, 0o600)
	}
	for i := range plan.nodes {
		name := string(rune('a' + i))
		dir, c, err := write(name, i, false)
		if err != nil {
			return nil, err
		}
		node := demoNode{Name: name, Portal: c.ISCSI.Portals[0], API: "unix://" + c.API.Socket,
			Metrics: "http://" + c.Metrics.Address + "/metrics", Dir: dir, Devices: c.Store.Devices}
		if plan.debugBase > 0 {
			node.Debug = fmt.Sprintf("127.0.0.1:%d", plan.debugBase+i)
		}
		f.Nodes = append(f.Nodes, node)
	}
	if plan.nodes == 2 {
		dir, c, err := write(witnessName, plan.nodes, true)
		if err != nil {
			return nil, err
		}
		f.Witness = &demoWitness{API: "unix://" + c.API.Socket, Dir: dir}
	}
	return f, f.save(plan.dir)
}

// socketPathMax leaves room below the 107 bytes that a unix socket's path may have.
const socketPathMax = 96

// demoSocket is D/NAME/api.sock, or a short path when that is too long for a socket.
func demoSocket(dir, name string) (string, error) {
	path := filepath.Join(dir, name, "api.sock")
	if len(path) <= socketPathMax {
		return path, nil
	}
	h := fnv.New64a()
	h.Write([]byte(dir))
	short := filepath.Join(os.TempDir(), fmt.Sprintf("twinsan-demo-%d-%x", os.Getuid(), h.Sum64()))
	if err := os.Mkdir(short, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	info, err := os.Lstat(short)
	if err != nil {
		return "", err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !info.IsDir() || !ok || int(st.Uid) != os.Getuid() {
		return "", fmt.Errorf("%s is not a directory of ours", short)
	}
	return filepath.Join(short, name+".sock"), nil
}
