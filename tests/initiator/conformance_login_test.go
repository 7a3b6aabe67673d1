package initiator_test

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/twinsan/twinsan/tests/initiator"
)

// open says whether this target takes logins without authentication, which the
// tests of bare login exchanges need.
func (l *lab) open() *lab {
	if l.cfg.CHAP != nil {
		l.t.Skip("the target wants CHAP")
	}
	return l
}

// TestKeyResults_RFC7143_13: every key, what is answered to good and bad values.
func TestKeyResults_RFC7143_13(t *testing.T) {
	l := newLab(t).open()
	for _, c := range []struct{ offer, answer string }{ // answer "": none
		{"HeaderDigest=CRC32C,None", "CRC32C"}, {"HeaderDigest=None,CRC32C", "None"}, {"HeaderDigest=SHA,None", "None"}, {"HeaderDigest=SHA", "Reject"},
		{"DataDigest=CRC32C", "CRC32C"}, {"DataDigest=None", "None"}, {"DataDigest=CRC32", "Reject"}, {"DataDigest=", "Reject"},
		{"MaxConnections=1", "1"}, {"MaxConnections=65535", "1"}, {"MaxConnections=0", "Reject"}, {"MaxConnections=65536", "Reject"},
		{"InitialR2T=Yes", "Yes"}, {"InitialR2T=No", "No"}, {"InitialR2T=yes", "Reject"}, {"InitialR2T=1", "Reject"},
		{"ImmediateData=Yes", "Yes"}, {"ImmediateData=No", "No"}, {"ImmediateData=", "Reject"},
		{"MaxBurstLength=512", "512"}, {"MaxBurstLength=0x1000", "4096"}, {"MaxBurstLength=0X1000", "4096"}, {"MaxBurstLength=16777215", "1048576"},
		{"MaxBurstLength=511", "Reject"}, {"MaxBurstLength=16777216", "Reject"}, {"MaxBurstLength=-1", "Reject"}, {"MaxBurstLength=4k", "Reject"}, {"MaxBurstLength=99999999999999999999", "Reject"},
		{"FirstBurstLength=512", "512"}, {"FirstBurstLength=65536", "65536"}, {"FirstBurstLength=16777215", "262144"}, {"FirstBurstLength=0", "Reject"},
		{"MaxOutstandingR2T=1", "1"}, {"MaxOutstandingR2T=65535", "8"}, {"MaxOutstandingR2T=0", "Reject"},
		{"DataPDUInOrder=Yes", "Yes"}, {"DataPDUInOrder=No", "Yes"}, {"DataSequenceInOrder=No", "Yes"}, {"DataSequenceInOrder=x", "Reject"},
		{"DefaultTime2Wait=0", "2"}, {"DefaultTime2Wait=3600", "3600"}, {"DefaultTime2Wait=3601", "Reject"},
		{"DefaultTime2Retain=0", "0"}, {"DefaultTime2Retain=20", "20"}, {"DefaultTime2Retain=3600", "20"}, {"DefaultTime2Retain=3601", "Reject"},
		{"ErrorRecoveryLevel=0", "0"}, {"ErrorRecoveryLevel=2", "0"}, {"ErrorRecoveryLevel=3", "Reject"},
		{"TaskReporting=RFC3720", "RFC3720"}, {"TaskReporting=ResponseFence,FastAbort,RFC3720", "RFC3720"}, {"TaskReporting=FastAbort", "Reject"},
		{"iSCSIProtocolLevel=1", "1"}, {"iSCSIProtocolLevel=2", "1"}, {"iSCSIProtocolLevel=0", "0"}, {"iSCSIProtocolLevel=32", "Reject"},
		{"IFMarker=No", "No"}, {"IFMarker=Yes", "No"}, {"OFMarker=No", "No"}, {"OFMarker=Yes", "No"},
		{"IFMarkInt=2048~65535", "Reject"}, {"OFMarkInt=2048", "Reject"},
		{"RDMAExtensions=Yes", "NotUnderstood"}, {"TargetRecvDataSegmentLength=8192", "NotUnderstood"}, {"X-com.example=1", "NotUnderstood"}, {"X#key=", "NotUnderstood"},
		{"initialr2t=Yes", "NotUnderstood"},
		{"MaxRecvDataSegmentLength=512", "262144"}, {"MaxRecvDataSegmentLength=0xffffff", "262144"}, // the target's own
		{"InitiatorAlias=a host", ""}, {"InitiatorAlias=", ""},
		// Answers that nobody asked for.
		{"MaxBurstLength=Irrelevant", ""}, {"ImmediateData=Reject", ""}, {"Other=NotUnderstood", ""},
	} {
		_, r := l.exchange(1, 3, true, append(l.names(), keys(c.offer)...), nil)
		got := answers(t, r)
		name := keys(c.offer)[0].Name
		if answer, ok := got[name]; r.U16(36) != 0 || answer != c.answer || ok != (c.answer != "") {
			t.Errorf("%s: status %04x, answer %q, want %q", c.offer, r.U16(36), answer, c.answer)
		}
		if got["TargetPortalGroupTag"] == "" || r.U16(14) == 0 || r.BHS[2] != 0 || r.BHS[3] != 0 {
			t.Errorf("%s: %v with %v", c.offer, r, got)
		}
	}
}

// TestKeyDependencies_RFC7143_13_14: FirstBurstLength depends on other keys,
// in whatever order they come.
func TestKeyDependencies_RFC7143_13_14(t *testing.T) {
	l := newLab(t).open()
	for _, c := range []struct {
		offers []string
		answer string
	}{
		{[]string{"FirstBurstLength=262144", "MaxBurstLength=8192"}, "8192"},
		{[]string{"MaxBurstLength=8192", "FirstBurstLength=262144"}, "8192"},
		{[]string{"FirstBurstLength=1024", "InitialR2T=Yes", "ImmediateData=No"}, "Irrelevant"},
		{[]string{"InitialR2T=Yes", "ImmediateData=Yes", "FirstBurstLength=1024"}, "1024"},
	} {
		_, r := l.exchange(1, 3, true, append(l.names(), keys(c.offers...)...), nil)
		if got := answers(t, r)["FirstBurstLength"]; got != c.answer {
			t.Errorf("%v: FirstBurstLength=%s, want %s", c.offers, got, c.answer)
		}
	}
}

// TestKeyOfferedTwice_RFC7143_6_2: in one text or in two, it ends the login.
func TestKeyOfferedTwice_RFC7143_6_2(t *testing.T) {
	l := newLab(t).open()
	_, r := l.exchange(1, 3, true, append(l.names(), keys("MaxBurstLength=512", "MaxBurstLength=512")...), nil)
	if r.U16(36) != 0x0200 {
		t.Errorf("in one text: status %04x", r.U16(36))
	}
	c, r := l.exchange(1, 0, false, append(l.names(), keys("X-a=1")...), nil)
	if r.U16(36) != 0 {
		t.Fatalf("status %04x", r.U16(36))
	}
	r, err := c.Exchange(c.LoginRequest(1, 3, true, keys("X-a=1")))
	if err != nil || r.U16(36) != 0x0200 || r.U16(14) != 0 {
		t.Errorf("in the next: %v, %v", r, err)
	}
}

// TestMalformedText_RFC7143_6_1: each is an initiator error, and ends the connection.
func TestMalformedText_RFC7143_6_1(t *testing.T) {
	l := newLab(t).open()
	for _, text := range []string{"noequals\x00", "=value\x00", "\x00", "key=no end", "two words=1\x00", "k" + fmt.Sprintf("%063d", 0) + "=1\x00", "InitiatorAlias=" + fmt.Sprintf("%0256d", 0) + "\x00"} {
		c, r := l.exchange(1, 3, true, l.names(), func(p *initiator.PDU) { p.Data = append(p.Data, text...) })
		if r.U16(36) != 0x0200 {
			t.Errorf("%q: status %04x", text, r.U16(36))
		}
		if _, err := c.Exchange(&initiator.PDU{Drop: true}); !errors.Is(err, io.EOF) {
			t.Errorf("%q: the connection goes on: %v", text, err)
		}
	}
}

// TestTextOverSeveralPDUs_RFC7143_11_12_2: the C bit, cut at every length.
func TestTextOverSeveralPDUs_RFC7143_11_12_2(t *testing.T) {
	l := newLab(t)
	for _, n := range []int{20, 37, 100, 250} {
		c := l.dial(func(cfg *initiator.Config) { cfg.LoginSegment = n })
		if p := c.Params(); p.MaxBurstLength != 1048576 || p.FirstBurstLength != 262144 {
			t.Errorf("parts of %d bytes: %+v", n, p)
		}
		l.works(c)
	}
	_, r := l.open().exchange(1, 3, true, l.names(), func(p *initiator.PDU) { p.BHS[1] |= 0x40 })
	if r.U16(36) != 0x0200 {
		t.Errorf("C together with T: status %04x", r.U16(36))
	}
}

// TestStages_RFC7143_11_12_3: which stages a login may begin in and go to.
func TestStages_RFC7143_11_12_3(t *testing.T) {
	l := newLab(t).open()
	for csg := range byte(4) {
		for nsg := range byte(4) {
			want := uint16(0x0200)
			if csg < 2 && nsg > csg && nsg != 2 {
				want = 0
			}
			_, r := l.exchange(csg, nsg, true, l.names(), nil)
			if got := r.U16(36); got != want || got == 0 && (!r.Final() || r.BHS[1]&3 != nsg || r.BHS[1]>>2&3 != csg) {
				t.Errorf("from stage %d to %d: status %04x, flags %02x", csg, nsg, got, r.BHS[1])
			}
			if r.U16(36) != 0 && r.BHS[1]&0xc0 != 0 {
				t.Errorf("from stage %d to %d: T or C in a refusal", csg, nsg)
			}
		}
		if _, r := l.exchange(csg, 0, false, l.names(), nil); r.Final() || (r.U16(36) == 0) != (csg < 2) {
			t.Errorf("staying in stage %d: status %04x, flags %02x", csg, r.U16(36), r.BHS[1])
		}
	}
	c, _ := l.exchange(1, 0, false, l.names(), nil)
	if r, err := c.Exchange(c.LoginRequest(0, 1, true, nil)); err != nil || r.U16(36) != 0x0200 {
		t.Errorf("back to stage 0: %v, %v", r, err)
	}
}

// TestLoginBinding_RFC7143_11_12: one login keeps its tag, its port and its connection.
func TestLoginBinding_RFC7143_11_12(t *testing.T) {
	l := newLab(t).open()
	for name, change := range map[string]func(*initiator.PDU){
		"initiator task tag": func(p *initiator.PDU) { p.Put32(16, p.ITT()+1) },
		"ISID":               func(p *initiator.PDU) { p.BHS[13]++ },
		"TSIH":               func(p *initiator.PDU) { p.Put16(14, 9) },
		"CID":                func(p *initiator.PDU) { p.Put16(20, 9) },
		"version":            func(p *initiator.PDU) { p.BHS[2] = 1 },
	} {
		c, _ := l.exchange(1, 0, false, l.names(), nil)
		p := c.LoginRequest(1, 3, true, nil)
		change(p)
		if r, err := c.Exchange(p); err != nil || r.U16(36) != 0x0200 {
			t.Errorf("%s changes: %v, %v", name, r, err)
		}
	}
}

// TestFirstPDU_RFC7143_6_3: before the end of a login only login requests are taken.
func TestFirstPDU_RFC7143_6_3(t *testing.T) {
	l := newLab(t)
	for _, op := range []byte{initiator.OpNopOut, initiator.OpCommand, initiator.OpText, initiator.OpTaskManagement, initiator.OpLogout, initiator.OpDataOut, initiator.OpSNACK, initiator.OpLoginResponse, 0x1c} {
		c, r := l.exchange(1, 3, true, nil, func(p *initiator.PDU) { *p = *initiator.NewPDU(op, 5) })
		if r.Opcode() != initiator.OpLoginResponse || r.U16(36) != 0x020b {
			t.Errorf("opcode %02x: %v, status %04x", op, r, r.U16(36))
		}
		if _, err := c.Exchange(&initiator.PDU{Drop: true}); err == nil {
			t.Errorf("opcode %02x: the connection goes on", op)
		}
	}
}

// TestDiscoverySession_RFC7143_4_3: keys of a session are irrelevant in it, and
// it does nothing but text and logout.
func TestDiscoverySession_RFC7143_4_3(t *testing.T) {
	l := newLab(t).open()
	discovery := []initiator.Key{{Name: "InitiatorName", Value: l.cfg.InitiatorName}, {Name: "SessionType", Value: "Discovery"}}
	offers := keys("MaxConnections=1", "InitialR2T=No", "ImmediateData=Yes", "MaxBurstLength=4096", "FirstBurstLength=4096", "MaxOutstandingR2T=1",
		"DataPDUInOrder=Yes", "DataSequenceInOrder=Yes", "TaskReporting=RFC3720", "iSCSIProtocolLevel=1")
	_, r := l.exchange(1, 3, true, append(discovery, offers...), nil)
	got := answers(t, r)
	if r.U16(36) != 0 || r.U16(14) == 0 || got["TargetPortalGroupTag"] != "" {
		t.Errorf("status %04x, TSIH %d, %v", r.U16(36), r.U16(14), got)
	}
	for _, k := range offers {
		if got[k.Name] != "Irrelevant" {
			t.Errorf("%s=%s is answered %q", k.Name, k.Value, got[k.Name])
		}
	}
	dial := func() *initiator.Conn {
		cfg := l.cfg
		cfg.TargetName = ""
		c, err := initiator.Dial(wait(t), cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	targets, err := dial().SendTargets(wait(t), "All")
	if err != nil || len(targets[l.cfg.TargetName]) == 0 {
		t.Errorf("SendTargets=All: %v, %v", targets, err)
	}
	for _, op := range []byte{initiator.OpCommand, initiator.OpTaskManagement, initiator.OpDataOut} {
		c := dial()
		if err := c.Send(initiator.NewPDU(op|initiator.Immediate, 9)); err != nil {
			t.Fatal(err)
		}
		if ev, err := c.Event(wait(t)); err != nil || ev.Opcode() != initiator.OpReject {
			t.Errorf("opcode %02x: %v, %v", op, ev, err)
		}
		if err := c.Done(wait(t)); !errors.Is(err, io.EOF) {
			t.Errorf("opcode %02x: %v", op, err)
		}
	}
	c := dial()
	if n, err := c.Logout(wait(t), 0); n != 0 || err != nil {
		t.Errorf("logout: %d, %v", n, err)
	}
}

// TestSendTargets_RFC7143_C: what may be asked in either type of session.
func TestSendTargets_RFC7143_C(t *testing.T) {
	l := newLab(t)
	normal := l.dial(nil)
	for _, what := range []string{"", l.cfg.TargetName, "All"} {
		if got, err := normal.SendTargets(wait(t), what); err != nil || len(got) != 1 || len(got[l.cfg.TargetName]) == 0 {
			t.Errorf("SendTargets=%s: %v, %v", what, got, err)
		}
	}
	if got, err := normal.SendTargets(wait(t), "iqn.2026-01.example:unknown"); err != nil || len(got) != 0 {
		t.Errorf("an unknown target: %v, %v", got, err)
	}
	// Keys that are not for now, not known, or not good.
	got, err := normal.Text(wait(t), keys("MaxBurstLength=512", "X-other=1", "MaxRecvDataSegmentLength=1", "Some=Reject")...)
	want := keys("MaxBurstLength=Reject", "X-other=NotUnderstood", "MaxRecvDataSegmentLength=Reject")
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	l.works(normal)
}

// TestTSIH_RFC7143_6_3_4: a session handle names a session, its connection can be
// taken over by the same CID and not joined by another.
func TestTSIH_RFC7143_6_3_4(t *testing.T) {
	l := newLab(t)
	status := func(change func(*initiator.Config)) string {
		cfg := l.cfg
		change(&cfg)
		c, err := initiator.Dial(wait(t), cfg)
		var refused *initiator.LoginError
		if errors.As(err, &refused) {
			return fmt.Sprintf("%02x%02x", refused.Class, refused.Detail)
		}
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		return "0000"
	}
	c := l.dial(nil)
	tsih := c.Params().TSIH
	for name, test := range map[string]struct {
		change func(*initiator.Config)
		want   string
	}{
		"another handle":     {func(cfg *initiator.Config) { cfg.TSIH = tsih ^ 0x5555 }, "020a"},
		"another ISID":       {func(cfg *initiator.Config) { cfg.TSIH = tsih; cfg.ISID[0] ^= 1 }, "020a"},
		"another connection": {func(cfg *initiator.Config) { cfg.TSIH, cfg.CID = tsih, 7 }, "0206"},
	} {
		if got := status(test.change); got != test.want {
			t.Errorf("%s: status %s, want %s", name, got, test.want)
		}
	}
	l.works(c)
	_, _, next := c.Window()
	again, err := initiator.Dial(wait(t), func() initiator.Config { cfg := l.cfg; cfg.TSIH, cfg.CmdSN = tsih, next; return cfg }())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := c.Done(wait(t)); err == nil || again.Params().TSIH != tsih {
		t.Errorf("the connection that was replaced: %v; handle %d after %d", err, again.Params().TSIH, tsih)
	}
	l.works(again) // no unit attention: the nexus lives on
}
