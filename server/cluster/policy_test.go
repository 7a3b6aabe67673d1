package cluster

import (
	"strings"
	"testing"
)

func TestWritePolicy(t *testing.T) {
	b, id := wide(t)
	x := *b.m.state
	x.Cluster.FeatureLevel = 3
	b.m.state = &x
	if r := b.do(&cmdWritePolicy{id, true}); r.Code != codeRefused || !strings.Contains(r.Text, "upgrade plan") {
		t.Errorf("on level 3: %+v", r)
	}
	ram := volumeCommand("vm9")
	ram.MirroredRAM = true
	if r := b.do(ram); r.Code != codeRefused || !strings.Contains(r.Text, "upgrade plan") {
		t.Errorf("a new volume on level 3: %+v", r)
	}
	if s := must(b.m.state.marshal())(t); s[len(snapshotMagic)] != 4 {
		t.Errorf("written in version %d on level 3", s[len(snapshotMagic)])
	}
	y := *b.m.state
	y.Cluster.FeatureLevel = 4
	b.m.state = &y
	epoch := b.m.state.Volume(id).Record.Epoch
	b.ok(&cmdWritePolicy{id, true})
	made := b.ok(ram)
	s := must(b.m.state.marshal())(t)
	if s[len(snapshotMagic)] != 5 {
		t.Errorf("written in version %d on level 4", s[len(snapshotMagic)])
	}
	again := must(unmarshalState(s))(t)
	if r := again.Volume(id).Record; !r.MirroredRAM || r.Epoch != epoch || !again.VolumeNamed("vm9").Record.MirroredRAM || made.ID == 0 {
		t.Errorf("read again: %+v", r)
	}
	b.ok(&cmdWritePolicy{id, false})
	if b.m.state.Volume(id).Record.MirroredRAM {
		t.Error("it stays")
	}
	if r := b.do(&cmdWritePolicy{999, true}); r.Code != codeNotFound {
		t.Errorf("of no volume: %+v", r)
	}
}

func TestVersion4HasNoWritePolicy(t *testing.T) {
	for _, v := range readsOld(t, 4).Volumes {
		if v.Record.MirroredRAM {
			t.Errorf("volume %s has a policy that version 4 did not know", v.Name)
		}
	}
}
