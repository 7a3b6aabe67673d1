package server

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestManagementAddress(t *testing.T) {
	c, err := ParseConfig("f", []byte(smallConfig))
	if err != nil {
		t.Fatal(err)
	}
	if a := c.addresses(); a.Management != "" || a.Control() != "10.0.1.11:7400" || c.JoinAddress() != a.Control() {
		t.Errorf("one network: %+v", a)
	}
	if c, err = ParseConfig("f", []byte(smallConfig+"[management]\naddress = \"10.0.3.11\"\n")); err != nil {
		t.Fatal(err)
	}
	if a := c.addresses(); a.Management != "10.0.3.11:7400" || a.Sync != "10.0.1.11:7400" || c.API.Address != "10.0.3.11:7443" || c.JoinAddress() != "10.0.3.11:7400" {
		t.Errorf("two networks: %+v, API %s", a, c.API.Address)
	}
	if c, err = ParseConfig("f", []byte(smallConfig+"[management]\naddress = \"10.0.1.11:7400\"\n")); err != nil || c.addresses().Management != "" {
		t.Errorf("the same network: %+v, %v", c, err)
	}
}

func TestAddressesCollide(t *testing.T) {
	for _, test := range []struct{ more, want string }{
		{"[management]\naddress = \"0.0.0.0\"\n", `f:10: management.address: "0.0.0.0" is no address that others can connect to`},
		{"[management]\naddress = \"10.0.2.11:3260\"\n", `iscsi.portals: 10.0.2.11:3260 is management.address already`},
		{"[api]\naddress = \"10.0.1.11:7400\"\n", `f:10: api.address: 10.0.1.11:7400 is sync.address already`},
		{"[metrics]\naddress = \"0.0.0.0:7443\"\n", `f:10: metrics.address: 0.0.0.0:7443 is api.address already`},
		{"[metrics]\naddress = \"10.0.9.9:7443\"\n", ``},
	} {
		_, err := ParseConfig("f", []byte(smallConfig+test.more))
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", test.more, err)
		}
	}
}

const commentedConfig = `# a file with words of its own
name = "a"

[store]
devices = ["/dev/sdb"]   # the new one

[sync]
# the direct link
address = "10.0.1.11"

[iscsi]
portals = ["10.0.2.11"]
`

func TestSetNetworks(t *testing.T) {
	for _, test := range []struct {
		name string
		n    Networks
		want func(c *Config) bool
		has  []string
	}{
		{"management", Networks{Management: "10.0.3.11"}, func(c *Config) bool {
			return c.Management.Address == "10.0.3.11:7400" && c.API.Address == "10.0.3.11:7443" && c.Sync.Address == "10.0.1.11:7400"
		}, []string{"address = \"10.0.1.11\"\n", "[management]\naddress = \"10.0.3.11:7400\"\n"}},
		{"sync", Networks{Sync: "10.0.9.11:7500"}, func(c *Config) bool {
			return c.Sync.Address == "10.0.9.11:7500" && c.JoinAddress() == "10.0.9.11:7500" && c.API.Address == "10.0.9.11:7443"
		}, []string{"# the direct link\naddress = \"10.0.9.11:7500\"\n"}},
		{"portals", Networks{Portals: []string{"10.0.2.11", "10.0.4.11"}}, func(c *Config) bool {
			return slices.Equal(c.ISCSI.Portals, []string{"10.0.2.11:3260", "10.0.4.11:3260"}) && c.API.Address == "10.0.1.11:7443"
		}, []string{"portals = [\"10.0.2.11:3260\", \"10.0.4.11:3260\"]\n"}},
		{"all", Networks{Sync: "10.0.9.11", Management: "10.0.3.11", API: "10.0.5.11", Portals: []string{"10.0.6.11"}}, func(c *Config) bool {
			return c.addresses().Management == "10.0.3.11:7400" && c.API.Address == "10.0.5.11:7443"
		}, nil},
		{"nothing", Networks{Management: "sync"}, func(c *Config) bool { return c.Management.Address == "" }, nil},
	} {
		text, c, err := SetNetworks("f", []byte(commentedConfig), test.n)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if !test.want(c) {
			t.Errorf("%s: %+v from\n%s", test.name, c, text)
		}
		for _, line := range append(test.has, "# a file with words of its own\n", "   # the new one\n") {
			if !strings.Contains(string(text), line) {
				t.Errorf("%s: no %q in\n%s", test.name, line, text)
			}
		}
		// And back: the file says what it said before.
		back, old, err := SetNetworks("f", text, Networks{Sync: "10.0.1.11", Management: "sync", API: "10.0.1.11", Portals: []string{"10.0.2.11"}})
		if err != nil || old.addresses().Sync != "10.0.1.11:7400" || old.addresses().Management != "" {
			t.Errorf("%s, and back: %v\n%s", test.name, err, back)
		}
	}
	for _, test := range []struct {
		text string
		n    Networks
		want string
	}{
		{commentedConfig, Networks{Management: "0.0.0.0"}, "no address that others can connect to"},
		{commentedConfig, Networks{Sync: "10.0.2.11:3260"}, "10.0.2.11:3260 is sync.address already"},
		{commentedConfig, Networks{Portals: []string{"san.local"}}, "not an IP address"},
		{"name = \"w\"\n[sync]\naddress = \"h\"\n", Networks{Portals: []string{"10.0.2.11"}}, "is a witness"},
		{"name = \"a\"\nsync.address = \"10.0.1.1\"\n", Networks{Sync: "10.0.1.2"}, "with an editor"},
		{"name = \"a\"\nsync = { address = \"10.0.1.1\" }\n", Networks{Sync: "10.0.1.2"}, "f"},
		{strings.Replace(commentedConfig, `["10.0.2.11"]`, "[\n\"10.0.2.11\",\n]", 1), Networks{Portals: []string{"10.0.4.11"}}, "f"},
	} {
		if text, _, err := SetNetworks("f", []byte(test.text), test.n); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v\n%s", test.n, err, text)
		} else if test.want != "f" && !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", test.n, err)
		}
	}
}
