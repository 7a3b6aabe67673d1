package server

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/twinsan/twinsan/server/cluster"
)

// control is where the other nodes ask this one.
func (c *Config) control() string {
	if c.Management.Address != "" {
		return c.Management.Address
	}
	return c.Sync.Address
}

// JoinAddress is where another machine joins the cluster through this node.
func (c *Config) JoinAddress() string { return c.control() }

// APIDetour is where the other nodes find the API when the management network is cut:
// at the sync address, with the port of the API. Empty: the networks are one.
func (c *Config) APIDetour() string {
	a := c.addresses()
	return apiDetour(&a)
}

// apiDetour computes the same from what a node has told of itself.
func apiDetour(a *cluster.Addresses) string {
	host, _, errSync := net.SplitHostPort(a.Sync)
	at, port, errAPI := net.SplitHostPort(a.API)
	if a.Control() == a.Sync || errSync != nil || errAPI != nil || at == host {
		return ""
	}
	return net.JoinHostPort(host, port)
}

// api is where another node is asked now.
func (n *Node) api(x *cluster.Node) string {
	if detour := apiDetour(&x.Addresses); detour != "" && slices.Contains(n.cluster.Detours(), x.ID) {
		return detour
	}
	return x.API
}

// reportShare is how much of reportMax the address of a node's API has for itself
// before the sync network is tried.
const reportShare = reportMax / 2

// askReport asks another node for its report, over the sync network if it must;
// detour says that it did.
func (n *Node) askReport(ctx context.Context, p Peers, x *cluster.Node) (r reply) {
	detour := apiDetour(&x.Addresses)
	if detour == "" {
		r.report, r.err = p.Report(ctx, x.ID, x.API)
		return r
	}
	once, cancel := context.WithTimeout(ctx, reportShare)
	r.report, r.err = p.Report(once, x.ID, x.API)
	cancel()
	if r.err == nil {
		return r
	}
	report, err := p.Report(ctx, x.ID, detour)
	if err == nil {
		return reply{report: report, detour: true}
	}
	return r
}

// collisions reports places that two parts of the node would listen at. One that
// listens everywhere takes its port at every address.
func (c *Config) collisions(wrong func(key, format string, args ...any)) {
	type place struct{ key, address string }
	places := []place{{"sync.address", c.Sync.Address}}
	if c.Management.Address != c.Sync.Address {
		places = append(places, place{"management.address", c.Management.Address})
	}
	if detour := c.APIDetour(); detour != "" {
		places = append(places, place{"sync.address, for the API", detour})
	}
	places = append(places, place{"api.address", c.API.Address}, place{"metrics.address", c.Metrics.Address})
	for _, p := range c.ISCSI.Portals {
		places = append(places, place{"iscsi.portals", p})
	}
	for i, p := range places {
		for _, q := range places[:i] {
			if p.address != "" && sameListener(p.address, q.address) {
				wrong(p.key, "%s is %s already", p.address, q.key)
			}
		}
	}
}

func sameListener(a, b string) bool {
	hostA, portA, errA := net.SplitHostPort(a)
	hostB, portB, errB := net.SplitHostPort(b)
	everywhere := func(h string) bool { return h == "" || h == "0.0.0.0" || h == "::" }
	return errA == nil && errB == nil && portA == portB && (hostA == hostB || everywhere(hostA) || everywhere(hostB))
}

// Networks are the addresses of a node that may be changed later. What is empty or
// nil stays as it is.
type Networks struct {
	Sync       string
	Management string // "sync": the same as Sync
	API        string
	Portals    []string
}

// SetNetworks changes addresses in the text of a node's file and leaves everything
// else in it as it stands, comments included. It returns the new text and what it
// says. The change takes effect when the node starts next: it tells the others then.
// An API address at the host of the old management address moves along with it,
// unless another one is given.
func SetNetworks(path string, text []byte, n Networks) ([]byte, *Config, error) {
	old, err := ParseConfig(path, text)
	if err != nil {
		return nil, nil, err
	}
	want := *old
	if n.Sync != "" {
		want.Sync.Address = n.Sync
	}
	switch n.Management {
	case "":
	case "sync":
		want.Management.Address = ""
	default:
		want.Management.Address = n.Management
	}
	if n.Portals != nil {
		if len(old.ISCSI.Portals) == 0 {
			return nil, nil, fmt.Errorf("%w: node %s is a witness and has no portals", ErrInvalid, old.Name)
		}
		want.ISCSI.Portals = slices.Clone(n.Portals)
	}
	switch host, _, _ := net.SplitHostPort(old.control()); {
	case n.API != "":
		want.API.Address = n.API
	case old.API.Address == net.JoinHostPort(host, strconv.Itoa(APIPort)):
		want.API.Address = "" // its default
	}
	if err := want.complete("the new addresses", nil); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	quoted := make([]string, len(want.ISCSI.Portals))
	for i, p := range want.ISCSI.Portals {
		quoted[i] = strconv.Quote(p)
	}
	for _, set := range []struct{ table, key, old, value string }{
		{"sync", "address", old.Sync.Address, strconv.Quote(want.Sync.Address)},
		{"management", "address", old.Management.Address, strconv.Quote(want.Management.Address)},
		{"api", "address", old.API.Address, strconv.Quote(want.API.Address)},
		{"iscsi", "portals", "", "[" + strings.Join(quoted, ", ") + "]"},
	} {
		if strconv.Quote(set.old) != set.value && (set.key != "portals" || n.Portals != nil) {
			text = setKey(text, set.table, set.key, set.value)
		}
	}
	got, err := ParseConfig(path, text)
	if err != nil || !bytes.Equal(mustTOML(got), mustTOML(&want)) {
		return nil, nil, fmt.Errorf("%w: %s is written in a way that this command does not change safely; change its addresses with an editor", ErrInvalid, path)
	}
	return text, got, nil
}

// mustTOML is the canonical text of a configuration that was complete already.
func mustTOML(c *Config) []byte {
	text, err := c.TOML()
	if err != nil {
		panic("server: configuration does not encode: " + err.Error())
	}
	return text
}

// setKey sets a key of a table to a value in TOML: in its line, or in a new line
// at the end of the table, or in a new table at the end of the text. It knows one-line
// values only; the caller reads back what it did.
func setKey(text []byte, table, key, value string) []byte {
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	current, end := "", -1
	for i, line := range lines {
		trimmed := strings.TrimSpace(line)
		if strings.HasPrefix(trimmed, "[") && strings.Contains(trimmed, "]") && !strings.Contains(trimmed, "=") {
			current = strings.TrimSpace(trimmed[1:strings.IndexByte(trimmed, ']')])
			if current == table {
				end = i + 1
			}
			continue
		}
		if current != table || trimmed == "" || strings.HasPrefix(trimmed, "#") {
			continue
		}
		end = i + 1
		if k, _, ok := strings.Cut(trimmed, "="); ok && strings.TrimSpace(k) == key {
			lines[i] = key + " = " + value
			return []byte(strings.Join(lines, "\n") + "\n")
		}
	}
	if end < 0 {
		lines = append(lines, "", "["+table+"]")
		end = len(lines)
	}
	lines = slices.Insert(lines, end, key+" = "+value)
	return []byte(strings.Join(lines, "\n") + "\n")
}
