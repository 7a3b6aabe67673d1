package dedup

import "testing"

// TestKernels: a kernel that comes to other results is not believed.
func TestKernels(t *testing.T) {
	if wide == narrow {
		t.Skip("this processor has no wide kernel")
	}
	defer func(was [lanes]uint32) { chunkNumbers = was }(chunkNumbers)
	if !wide.agrees() {
		t.Fatal("the kernel in use disagrees")
	}
	chunkNumbers[7]++ // the last chunk of the second block
	for k := avx2; k <= wide; k++ {
		if k.agrees() {
			t.Errorf("kernel %d is believed although it counts chunks wrongly", k)
		}
	}
}
