//go:build e2e

package e2e

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/twinsan/twinsan/tests/lab"
)

// TestClauses runs the tests of tests/initiator, which are named after the clauses
// that they prove, against the portals of both nodes: the owner's, and the one
// that forwards.
func TestClauses(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:64M"}})
	for _, url := range r.both(r.volume("demo").LUN) {
		c := exec.CommandContext(r.ctx, filepath.Join(*root, "bin/initiator.test"), "-test.timeout", "5m", "-target", url)
		if out, err := c.CombinedOutput(); err != nil {
			r.Fatalf("%s: %v\n%s", c, err, out)
		} else {
			r.Logf("%s: %s", url, out)
		}
	}
}
