package initiator_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/iscsi"
	"github.com/twinsan/twinsan/tests/initiator"
)

// TestLoginStatus_RFC7143_11_13_5 (RFC 7143 section 11.13.5): what is wrong with a login is said
// by the right status, and the connection closed.
func TestLoginStatus_RFC7143_11_13_5(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{})
	r.access["iqn.2026-01.example:chap"] = iscsi.Access{User: "user", Secret: "secret of the user", MutualUser: "san", MutualSecret: "secret of the san"}
	keys := func(pairs ...string) []initiator.Key {
		var k []initiator.Key
		for i := 0; i < len(pairs); i += 2 {
			k = append(k, initiator.Key{Name: pairs[i], Value: pairs[i+1]})
		}
		return k
	}
	good := keys("InitiatorName", hostName, "TargetName", targetName, "SessionType", "Normal", "AuthMethod", "None")
	for _, c := range []struct {
		name   string
		keys   []initiator.Key
		change func(*initiator.PDU)
		status uint16
	}{
		{"no initiator name", good[1:], nil, 0x0207},
		{"no target name", keys("InitiatorName", hostName, "AuthMethod", "None"), nil, 0x0207},
		{"another target", keys("InitiatorName", hostName, "TargetName", targetName+"2", "AuthMethod", "None"), nil, 0x0203},
		{"session type", keys("InitiatorName", hostName, "TargetName", targetName, "SessionType", "Odd"), nil, 0x0209},
		{"unknown initiator", keys("InitiatorName", "iqn.2026-01.example:nobody", "TargetName", targetName, "AuthMethod", "None"), nil, 0x0202},
		{"CHAP not offered", keys("InitiatorName", "iqn.2026-01.example:chap", "TargetName", targetName, "AuthMethod", "None"), nil, 0x0201},
		{"version", good, func(p *initiator.PDU) { p.BHS[2], p.BHS[3] = 2, 1 }, 0x0205},
		{"key twice", append(good[:len(good):len(good)], good[0]), nil, 0x0200},
		{"no end of text", good, func(p *initiator.PDU) { p.Data = p.Data[:len(p.Data)-1] }, 0x0200},
		{"no equals sign", good, func(p *initiator.PDU) { p.Data = append(p.Data, "junk\x00"...) }, 0x0200},
		{"stage 2", good, func(p *initiator.PDU) { p.BHS[1] = 0x80 | 2<<2 | 3 }, 0x0200},
		{"next stage 2", good, func(p *initiator.PDU) { p.BHS[1] = 0x80 | 2 }, 0x0200},
		{"next stage behind", good, func(p *initiator.PDU) { p.BHS[1] = 0x80 | 1<<2 }, 0x0200},
		{"T and C", good, func(p *initiator.PDU) { p.BHS[1] |= 0x40 }, 0x0200},
		{"long key name", append(good[:len(good):len(good)], initiator.Key{Name: string(bytes.Repeat([]byte("k"), 64)), Value: "v"}), nil, 0x0200},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := initiator.Open(wait(t), r.config())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			p := conn.LoginRequest(0, 1, true, c.keys)
			if c.change != nil {
				c.change(p)
			}
			a, err := conn.Exchange(p)
			if err != nil {
				t.Fatal(err)
			}
			if got := a.U16(36); a.Opcode() != initiator.OpLoginResponse || got != c.status {
				t.Errorf("%v with status %04x, want %04x", a, got, c.status)
			}
			if _, err := conn.Exchange(&initiator.PDU{Drop: true}); err == nil {
				t.Error("the connection stays open")
			}
		})
	}
	cfg := r.config()
	cfg.TSIH = 0x7777 // said no later than at the end of the login
	var refused *initiator.LoginError
	if _, err := initiator.Dial(wait(t), cfg); !errors.As(err, &refused) || refused.Class != 2 || refused.Detail != 0x0a {
		t.Errorf("unknown TSIH: %v, want 020a", err)
	}
	mustWork(t, dial(t, r.config()))
}

// TestCHAP_RFC7143_12_1_3 (RFC 7143 sections 12.1.3 and 9.2.1).
func TestCHAP_RFC7143_12_1_3(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{FailedLoginDelay: time.Millisecond})
	const name = "iqn.2026-01.example:chap"
	r.access[name] = iscsi.Access{User: "user", Secret: "secret of the user", MutualUser: "san", MutualSecret: "secret of the san"}
	good := initiator.CHAP{Name: "user", Secret: "secret of the user", MutualName: "san", MutualSecret: "secret of the san"}
	for _, c := range []struct {
		name   string
		change func(*initiator.CHAP)
		ok     bool
	}{
		{"mutual", func(*initiator.CHAP) {}, true},
		{"one way", func(c *initiator.CHAP) { c.MutualSecret = "" }, true},
		{"MD5", func(c *initiator.CHAP) { c.Algorithms = []int{initiator.CHAPMD5} }, true},
		{"SHA-256 after what is unknown", func(c *initiator.CHAP) { c.Algorithms = []int{99, initiator.CHAPSHA256} }, true},
		{"SHA3-256", func(c *initiator.CHAP) { c.Algorithms = []int{initiator.CHAPSHA3256} }, true},
		{"SHA-1 alone", func(c *initiator.CHAP) { c.Offer = ptr("6") }, false},
		{"the first that is known", func(c *initiator.CHAP) { c.Offer = ptr("6,8,5") }, true},
		{"hexadecimal list", func(c *initiator.CHAP) { c.Offer = ptr("0x7") }, true},
		{"empty list", func(c *initiator.CHAP) { c.Offer = ptr("") }, false},
		{"list cut off", func(c *initiator.CHAP) { c.Offer = ptr(",5") }, false},
		{"begins like 5", func(c *initiator.CHAP) { c.Offer = ptr("5x") }, false},
		{"no prefix", func(c *initiator.CHAP) { c.RawResponse = "00112233445566778899aabbccddeeff" }, false},
		{"no digits", func(c *initiator.CHAP) { c.RawResponse = "0x" }, false},
		{"not hexadecimal", func(c *initiator.CHAP) { c.RawResponse = "0xzz" }, false},
		{"not base64", func(c *initiator.CHAP) { c.RawResponse = "0b!!!!" }, false},
		{"empty challenge", func(c *initiator.CHAP) { c.Challenge = []byte{} }, false},
		{"longest challenge", func(c *initiator.CHAP) { c.Challenge = make([]byte, 1024); c.Challenge[0] = 1 }, true},
		{"longer challenge", func(c *initiator.CHAP) { c.Base64, c.Challenge = true, make([]byte, 1025) }, false},
		{"base64", func(c *initiator.CHAP) { c.Base64 = true }, true},
		{"no common algorithm", func(c *initiator.CHAP) { c.Algorithms = []int{56} }, false},
		{"wrong secret", func(c *initiator.CHAP) { c.Secret = "secret of the use" }, false},
		{"wrong name", func(c *initiator.CHAP) { c.Name = "use" }, false},
		{"empty response", func(c *initiator.CHAP) { c.Response = []byte{} }, false},
		{"short response", func(c *initiator.CHAP) { c.Response = make([]byte, 15) }, false},
		{"long response", func(c *initiator.CHAP) { c.Response = make([]byte, 64) }, false},
		{"reflected challenge", func(c *initiator.CHAP) { c.Reflect = true }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := r.config()
			cfg.InitiatorName = name
			chap := good
			c.change(&chap)
			cfg.CHAP = &chap
			conn, err := initiator.Dial(wait(t), cfg)
			if conn != nil {
				conn.Close()
			}
			var refused *initiator.LoginError
			if c.ok && err != nil || !c.ok && (!errors.As(err, &refused) || refused.Class != 2 || refused.Detail != 1) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestCHAPNames_RFC7143_12_1_3: a name is a plain string, whatever it looks like.
func TestCHAPNames_RFC7143_12_1_3(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{FailedLoginDelay: time.Millisecond, ConnectionsPerAddress: 100})
	for i, user := range []string{"0x414243", "0bQUJD", "0x", "0b", "0", "a name with, odd = characters"} {
		name := fmt.Sprintf("iqn.2026-01.example:chap%d", i)
		r.access[name] = iscsi.Access{User: user, Secret: "secret of the user", MutualUser: "0bsan", MutualSecret: "secret of the san"}
		for _, said := range []string{user, "ABC"} {
			cfg := r.config()
			cfg.InitiatorName = name
			cfg.CHAP = &initiator.CHAP{Name: said, Secret: "secret of the user", MutualName: "0bsan", MutualSecret: "secret of the san"}
			c, err := initiator.Dial(wait(t), cfg)
			if (err == nil) != (said == user) {
				t.Errorf("user %q says %q: %v", user, said, err)
			}
			if c != nil {
				c.Close()
			}
		}
	}
}

func ptr[T any](v T) *T { return &v }

// TestDiscoveredPortals_RFC7143_C (RFC 7143 appendix C).
func TestDiscoveredPortals_RFC7143_C(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{})
	cfg := r.config()
	cfg.TargetName = ""
	conn, err := initiator.Dial(wait(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, what := range []string{"All", targetName} {
		got, err := conn.SendTargets(wait(t), what)
		want := "map[" + targetName + ":[192.0.2.1:3260,1 [2001:db8::1]:3260,2]]"
		if err != nil || fmt.Sprint(got) != want {
			t.Errorf("SendTargets=%s: %v, %v, want %s", what, got, err, want)
		}
	}
	if got, err := conn.SendTargets(wait(t), targetName+"2"); err != nil || len(got) != 0 {
		t.Errorf("an unknown target: %v, %v", got, err)
	}
}

// TestSessionReinstatement_RFC7143_6_3_5 (RFC 7143 section 6.3.5): the same port comes again,
// the old session ends first; another ISID is another port.
func TestSessionReinstatement_RFC7143_6_3_5(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	old := dial(t, r.config())
	cfg := r.config()
	cfg.ISID[5] = 2
	beside := dial(t, cfg)
	again, err := initiator.Dial(wait(t), r.config())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := old.Done(wait(t)); errors.Is(err, context.DeadlineExceeded) {
		t.Error("the old session lives on")
	}
	if res := do(t, again, &initiator.Command{CDB: initiator.TestUnitReady()}); sense(res) != "06/29/07" {
		t.Errorf("first command after the reinstatement: %v", res)
	}
	mustWork(t, again)
	mustWork(t, beside)
	if again.Params().TSIH == old.Params().TSIH || again.Params().TSIH == beside.Params().TSIH {
		t.Error("two sessions have one TSIH")
	}
	// A second connection of a session that allows one.
	cfg.TSIH, cfg.CID = beside.Params().TSIH, 5
	var refused *initiator.LoginError
	if _, err := initiator.Dial(wait(t), cfg); !errors.As(err, &refused) || refused.Class != 2 || refused.Detail != 6 {
		t.Errorf("a second connection: %v, want 0206", err)
	}
	mustWork(t, beside)
}
