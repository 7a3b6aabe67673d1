package scsi

import "testing"

func TestAttentionQueueIsBounded(t *testing.T) {
	i := &itlNexus{nexus: &Nexus{}}
	for n := range byte(maxAttentions) {
		i.raise(attention{0x2a, n})
		i.raise(attention{0x2a, n})
	}
	if len(i.attentions) != maxAttentions || i.pending.Load() != maxAttentions {
		t.Fatalf("%d conditions", len(i.attentions))
	}
	i.raise(attention{0x2a, maxAttentions})
	if a, ok := i.takeAttention(); !ok || a != attentionPowerOn {
		t.Errorf("overflow left %v", a)
	}
	if _, ok := i.takeAttention(); ok {
		t.Error("overflow left more than POWER ON")
	}
}
