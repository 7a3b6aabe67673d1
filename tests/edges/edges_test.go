package edges

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/twinsan/twinsan"

// allowed lists, for each package, the packages of the project that its own code
// may import. Imports walk down and never climb: cmd, api, server and its rooms,
// replication, lsfs, dedup and cache. A package that is missing here may import
// nothing of the project. See docs/architecture.md before you add a line.
var allowed = map[string][]string{
	"cmd/twinsan": {"api", "api/v1", "server", "lsfs"},

	// The API translates what the node says; the words it translates live below the node.
	"api": {"api/v1", "server", "replication", "lsfs"},

	"server":         {"server/cluster", "server/iscsi", "server/scsi", "replication", "lsfs", "lsfs/device", "lsfs/format", "cache", "dedup"},
	"server/cluster": {"replication", "lsfs", "dedup"},
	"server/iscsi":   {"server/scsi", "server/iscsi/pdu"},
	// Of replication it takes the type of a request and nothing else.
	"server/scsi": {"server/scsi/cdb", "replication"},

	"replication":      {"replication/wire", "lsfs", "dedup"},
	"replication/wire": {"lsfs", "dedup"},

	"lsfs":        {"lsfs/format", "lsfs/device", "dedup", "cache"},
	"lsfs/format": {"dedup"},
}

// doubles stand beside what they double, for tests of every package: no code
// that ships may import them, and what they import is their own affair.
var doubles = []string{"api/apitest", "lsfs/device/devicetest", "server/scsi/memlu"}

// tools make source code or run tests; nothing may import them.
var tools = []string{"api/gen"}

type pkg struct {
	ImportPath   string
	Standard     bool
	Imports      []string
	TestImports  []string
	XTestImports []string
}

func short(path string) (string, bool) {
	if path == module {
		return ".", true
	}
	return strings.CutPrefix(path, module+"/")
}

func list(t *testing.T) []pkg {
	t.Helper()
	// With the tag of the end-to-end tests, so that they are seen as well.
	c := exec.Command("go", "list", "-e", "-json=ImportPath,Standard,Imports,TestImports,XTestImports", "-tags", "e2e,invariants", module+"/...")
	var problems strings.Builder
	c.Stderr = &problems
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", c, err, &problems)
	}
	var all []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// forbidden says why an import may not be, or "".
func forbidden(from, to string) string {
	switch {
	case strings.HasPrefix(from, "tests/"), slices.Contains(doubles, from):
		if slices.Contains(tools, to) {
			return "nothing may import a tool"
		}
		return ""
	case strings.HasPrefix(to, "tests/"):
		return "only tests import from tests"
	case slices.Contains(doubles, to):
		return "a test double must not ship"
	case !slices.Contains(allowed[from], to):
		return fmt.Sprintf("%s may import %v", from, allowed[from])
	}
	return ""
}

func TestImportsWalkDown(t *testing.T) {
	found := map[string]bool{}
	for _, p := range list(t) {
		from, _ := short(p.ImportPath)
		found[from] = true
		for _, i := range p.Imports {
			if to, ours := short(i); ours {
				if why := forbidden(from, to); why != "" {
					t.Errorf("%s imports %s: %s", from, to, why)
				}
			}
		}
		// A test may import what it likes, but not make its package part of an
		// outer room: "server" in a test of lsfs would be a climb through the back door.
		for _, i := range append(slices.Clone(p.TestImports), p.XTestImports...) {
			to, ours := short(i)
			if !ours || strings.HasPrefix(from, "tests/") || slices.Contains(doubles, from) {
				continue
			}
			if floor(from) > 0 && floor(to) > floor(from) {
				t.Errorf("a test of %s imports %s, which stands above it: put it under tests/", from, to)
			}
		}
	}
	for from, to := range allowed {
		for _, name := range append([]string{from}, to...) {
			if !found[name] {
				t.Errorf("the list names %s, which does not exist", name)
			}
		}
	}
	for _, name := range slices.Concat(doubles, tools) {
		if !found[name] {
			t.Errorf("the list names %s, which does not exist", name)
		}
	}
}

// floor is the height of a package in the house; 0: it stands in none.
func floor(name string) int {
	for _, f := range []struct {
		prefix string
		height int
	}{
		{"tests/", 0}, {"cmd/", 6}, {"api", 5}, {"server/", 3}, {"server", 4}, {"replication", 2}, {"lsfs", 1}, {"dedup", 1}, {"cache", 1},
	} {
		if strings.HasPrefix(name, f.prefix) {
			return f.height
		}
	}
	return 0
}

// The list itself must describe a house: no package may reach itself.
func TestAllowedEdgesHaveNoCycle(t *testing.T) {
	var walk func(name string, path []string)
	walk = func(name string, path []string) {
		if slices.Contains(path, name) {
			t.Fatalf("the list allows a cycle: %s", strings.Join(append(path, name), " -> "))
		}
		for _, to := range allowed[name] {
			walk(to, append(slices.Clone(path), name))
		}
	}
	for name := range allowed {
		walk(name, nil)
	}
}

// Some outside modules, and input and output itself, belong to some rooms only.
func TestOutsideModulesStayInTheirRooms(t *testing.T) {
	rooms := map[string][]string{
		"github.com/hashicorp/raft": {"server/cluster"},
		"google.golang.org/grpc":    {"api", "api/v1", "api/apitest", "cmd/twinsan"},
		"github.com/spf13/cobra":    {"cmd/twinsan"},
		"github.com/dgraph-io":      {"lsfs", "server"},
	}
	for _, p := range list(t) {
		from, _ := short(p.ImportPath)
		if strings.HasPrefix(from, "tests/") {
			continue
		}
		for _, i := range p.Imports {
			for prefix, in := range rooms {
				if strings.HasPrefix(i, prefix) && !slices.Contains(in, from) {
					t.Errorf("%s imports %s, which only %v may", from, i, in)
				}
			}
			if strings.HasPrefix(i, "net/http") && (strings.HasPrefix(from, "lsfs") || strings.HasPrefix(from, "dedup") || strings.HasPrefix(from, "cache")) {
				t.Errorf("%s imports %s: the store knows nothing of networks", from, i)
			}
			if i == "net" && (strings.HasPrefix(from, "lsfs") || strings.HasPrefix(from, "dedup") || strings.HasPrefix(from, "cache")) {
				t.Errorf("%s imports net: the store knows nothing of networks", from)
			}
			if strings.HasPrefix(i, "github.com/twinsan/twinsan/") || p.Standard {
				continue
			}
			// Codecs are pure: bytes in, value or error out.
			codec := slices.Contains([]string{"lsfs/format", "replication/wire", "server/iscsi/pdu", "server/scsi/cdb"}, from)
			if codec && slices.Contains([]string{"net", "os", "time", "io", "syscall", "golang.org/x/sys/unix"}, i) {
				t.Errorf("%s imports %s: a codec does no I/O and knows no clock", from, i)
			}
		}
	}
}
