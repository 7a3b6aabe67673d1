package server

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const smallConfig = `
name = "a"
[store]
devices = ["/dev/sdb"]
[sync]
address = "10.0.1.11"
[iscsi]
portals = ["10.0.2.11", "[fd00::1]:3261"]
`

func TestConfigDefaults(t *testing.T) {
	c, err := ParseConfig("f", []byte(smallConfig))
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		Name: "a", DataDir: "/var/lib/twinsan",
		Store:   StoreConfig{Devices: []string{"/dev/sdb"}, Cache: 1 << 30, MetadataRAM: 1 << 30, MergeMinutes: 60, ColdMinutes: 1440, ScrubDays: 14, FlushMilliseconds: 200},
		Sync:    SyncConfig{Address: "10.0.1.11:7400"},
		ISCSI:   ISCSIConfig{Portals: []string{"10.0.2.11:3260", "[fd00::1]:3261"}},
		API:     APIConfig{Socket: "/run/twinsan/api.sock", Address: "10.0.1.11:7443"},
		Metrics: MetricsConfig{}, Log: LogConfig{Level: "info"},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestConfigWritesWhatItReads(t *testing.T) {
	c, err := ParseConfig("f", []byte(smallConfig+"[log]\nlevel = \"debug\"\n[metrics]\naddress = \"0.0.0.0:9260\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	c.Store.DeviceSize = 32 << 30
	text, err := c.TOML()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseConfig("f", text)
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	if !reflect.DeepEqual(c, again) {
		t.Errorf("got  %+v\nwant %+v\nfrom %s", again, c, text)
	}
}

// Every mistake names file, line and key, so that nobody has to search.
func TestConfigErrorsNameTheLine(t *testing.T) {
	for _, test := range []struct{ name, text, want string }{
		{"unknown key", "name = \"a\"\n[store]\ncash = \"1G\"\n", `f:3: store.cash: unknown key`},
		{"unknown table", "name = \"a\"\n[stoer]\ncache = \"1G\"\n", `f:2: stoer: unknown key`},
		{"syntax", "name = \"a\"\n[store\n", `f:2: `},
		{"type", "name = 3\n", `f:1: name: `},
		{"size", "name = \"a\"\n\n[store]\ncache = \"lots\"\n", `f:4: store.cache: `},
		{"range", smallConfig + "[log]\nlevel = \"loud\"\n", `f:10: log.level: "loud": want debug, info, warn or error`},
		{"small cache", "name = \"a\"\n[sync]\naddress = \"h\"\n[store]\ncache = \"1M\"\n", `f:5: store.cache: 1 MiB, want 16 MiB to 4 TiB`},
		{"name", "name = \"A b\"\n[sync]\naddress = \"h\"\n", `f:1: name: "A b": want 1 to 63 lower case letters`},
		{"no name", "[sync]\naddress = \"h\"\n", `f: name: "": want`},
		{"relative device", "name = \"a\"\n[sync]\naddress = \"h\"\n[store]\ndevices = [\"disk\"]\n", `f:5: store.devices: "disk" is not an absolute path`},
		{"twice", "name = \"a\"\n[sync]\naddress = \"h\"\n[store]\ndevices = [\"/d\", \"/x/../d\"]\n", `f:5: store.devices: "/x/../d" is named twice`},
		{"flash of the pool", "name = \"a\"\n[sync]\naddress = \"h\"\n[store]\ndevices = [\"/d\"]\nl2 = \"/x/../d\"\n", `f:6: store.l2: "/x/../d" is a device of the pool`},
		{"relative flash", "name = \"a\"\n[sync]\naddress = \"h\"\n[store]\nl2 = \"d\"\n", `f:5: store.l2: "d" is not an absolute path`},
		{"small flash", "name = \"a\"\n[sync]\naddress = \"h\"\n[store]\nl2-size = \"1M\"\n", `f:5: store.l2-size: 1 MiB, want 16 MiB to 64 TiB`},
		{"small budget", "name = \"a\"\n[sync]\naddress = \"h\"\n[store]\nmetadata-ram = \"8M\"\n", `f:5: store.metadata-ram: 8 MiB, want 16 MiB to 4 TiB`},
		{"budget of two parts", "name = \"a\"\n[sync]\naddress = \"h\"\n[store]\nmetadata-ram = \"1G\"\nmetadata = \"1G\"\nindex = \"256M\"\n", `f:5: store.metadata-ram: 1 GiB, of which metadata and index take 1.3 GiB: raise it`},
		{"budget of one part", "name = \"a\"\n[sync]\naddress = \"h\"\n[store]\nmetadata-ram = \"64M\"\nindex = \"60M\"\n", `f:5: store.metadata-ram: 64 MiB, of which metadata and index take 60 MiB: raise it`},
		{"portal everywhere", "name = \"a\"\n[sync]\naddress = \"h\"\n[iscsi]\nportals = [\"0.0.0.0\"]\n", `f:5: iscsi.portals: "0.0.0.0" is no address`},
		{"portal name", "name = \"a\"\n[sync]\naddress = \"h\"\n[iscsi]\nportals = [\"san.local\"]\n", `f:5: iscsi.portals: "san.local": "san.local" is not an IP address`},
		{"port", "name = \"a\"\n[sync]\naddress = \"h:0\"\n", `f:3: sync.address: "h:0": port "0" is not between`},
		{"socket", "name = \"a\"\n[sync]\naddress = \"h\"\n[api]\nsocket = \"x\"\n", `f:5: api.socket: "x" is not an absolute path`},
		{"dotted key", "name = \"a\"\nsync.address = \"h:99999\"\n", `f:2: sync.address: `},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := ParseConfig("f", []byte(test.text))
			if err == nil {
				t.Fatal("accepted")
			}
			var ce *ConfigError
			if !errors.As(err, &ce) {
				t.Fatalf("%T is no ConfigError: %v", err, err)
			}
			if !strings.HasPrefix(err.Error(), test.want) {
				t.Errorf("got  %s\nwant %s...", err, test.want)
			}
		})
	}
}

func TestConfigReportsAllMistakes(t *testing.T) {
	_, err := ParseConfig("f", []byte("nome = \"a\"\n[sync]\nadress = \"h\"\n"))
	if err == nil || !strings.Contains(err.Error(), "f:1: nome") || !strings.Contains(err.Error(), "f:3: sync.adress") {
		t.Errorf("got %v", err)
	}
}

func TestConfigRefusesAHugeFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	if err := os.WriteFile(path, make([]byte, maxConfigBytes+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(path); err == nil || !strings.Contains(err.Error(), "larger than 1 MiB") {
		t.Errorf("got %v", err)
	}
}

// The commented example is complete and its defaults are the program's.
func TestPackagedConfig(t *testing.T) {
	text, err := os.ReadFile("../packaging/twinsan.toml")
	if err != nil {
		t.Fatal(err)
	}
	c, err := ParseConfig("twinsan.toml", text)
	if err != nil {
		t.Fatal(err)
	}
	// With every commented key switched on the result is the same, but for the
	// keys whose default depends on others.
	var on []string
	for _, line := range strings.Split(string(text), "\n") {
		if rest, ok := strings.CutPrefix(line, "# "); ok {
			if key, _, ok := strings.Cut(rest, " = "); ok && !strings.Contains(key, " ") {
				line = rest
			}
		}
		on = append(on, line)
	}
	all, err := ParseConfig("twinsan.toml", []byte(strings.Join(on, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(c, all) {
		t.Errorf("the defaults in the file are not the program's:\n%+v\n%+v", c, all)
	}
	// And every key of Config is in the file.
	have := strings.Join(on, "\n")
	var walk func(reflect.Type)
	walk = func(v reflect.Type) {
		for i := range v.NumField() {
			f := v.Field(i)
			if f.Type.Kind() == reflect.Struct {
				if !strings.Contains(have, "["+f.Tag.Get("toml")+"]") {
					t.Errorf("the example lacks the table %s", f.Tag.Get("toml"))
				}
				walk(f.Type)
			} else if !strings.Contains(have, "\n"+f.Tag.Get("toml")+" = ") {
				t.Errorf("the example lacks the key %s", f.Tag.Get("toml"))
			}
		}
	}
	walk(reflect.TypeFor[Config]())
}

func FuzzConfig(f *testing.F) {
	f.Add(smallConfig)
	f.Add("name = \"a\"\nsync.address = \"[::1\"\n")
	f.Add("[[store]]\ndevices = 1")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseConfig("f", []byte(text))
		if err != nil {
			return
		}
		out, err := c.TOML()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseConfig("f", out)
		if err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
		if twice, err := again.TOML(); err != nil || string(out) != string(twice) {
			t.Fatalf("%v\n%s\n%s", err, out, twice)
		}
	})
}

func TestParseSize(t *testing.T) {
	for _, test := range []struct {
		text string
		want Size
		out  string
	}{
		{"2T", 2 << 40, "2 TiB"}, {"2TiB", 2 << 40, "2 TiB"}, {"2tb", 2 << 40, "2 TiB"}, {" 4 GiB ", 4 << 30, "4 GiB"},
		{"4096", 4096, "4 KiB"}, {"1.5G", 3 << 29, "1.5 GiB"}, {"0", 0, "0 B"}, {"512B", 512, "512 B"}, {"1000M", 1000 << 20, "1000 MiB"},
		{"1023.99M", 0, ""}, {"7P", 7 << 50, "7 PiB"},
	} {
		got, err := ParseSize(test.text)
		if test.out == "" {
			if err == nil {
				t.Errorf("%q: accepted as %d", test.text, got)
			}
			continue
		}
		if err != nil || got != test.want || got.String() != test.out {
			t.Errorf("%q: got %d %q, %v; want %d %q", test.text, got, got, err, test.want, test.out)
		}
	}
	for _, bad := range []string{"", "T", "-1G", "1e9", "2X", "1.1", "9000P", "1..2G", "iB", "4iB", "0x10", "1_000", "1/2G", "99999999999999999999999999G"} {
		if got, err := ParseSize(bad); err == nil {
			t.Errorf("%q: accepted as %d", bad, got)
		}
	}
	if s := Size(1<<40 - 1).String(); s != "1024 GiB" {
		t.Errorf("rounding: %s", s)
	}
}
