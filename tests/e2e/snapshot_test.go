//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// at is what a snapshot that is taken by take may hold of a verified load: of each
// block any version from what was acknowledged before to what was issued by the end.
func (v *verified) at(take func()) *verified {
	v.r.Helper()
	before, err := os.ReadFile(v.table)
	v.r.must(err, "table")
	take()
	after, err := os.ReadFile(v.table)
	v.r.must(err, "table")
	for at := 4096; at+12 <= len(after) && at+12 <= len(before); at += 12 {
		copy(after[at:at+8], before[at:at+8]) // durable, acknowledged; issued stays
	}
	return v.with(after)
}

// with is the same load with a table of its own: checking writes to it.
func (v *verified) with(table []byte) *verified {
	v.r.Helper()
	f, err := os.CreateTemp(v.r.dir, "table-")
	v.r.must(err, "table")
	_, err = f.Write(table)
	v.r.must(errors.Join(err, f.Close()), "table")
	out := &verified{r: v.r, table: f.Name()}
	for _, a := range v.args {
		if a == v.table {
			a = f.Name()
		}
		out.args = append(out.args, a)
	}
	return out
}

// again checks through one path with a copy of the table.
func (v *verified) again(url string) {
	v.r.Helper()
	table, err := os.ReadFile(v.table)
	v.r.must(err, "table")
	v.with(table).check(url)
}

// live is what the pools hold without garbage, in bytes.
func (r *rig) live() (n int64) {
	r.Helper()
	s, err := r.c.Status(r.ctx)
	r.must(err, "status")
	for _, node := range s.Nodes {
		if node.Pool != nil {
			n += node.Pool.Live
		}
	}
	return n
}

// TestSnapshot takes snapshots of two volumes at one moment under verified load, while
// owners are killed; clones of them hold what they must, through both nodes; a volume
// is rolled back; and when all is deleted the space is there again.
func TestSnapshot(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:64M"}})
	size := 64 * mib
	empty := r.live()
	luns := map[string]int{}
	loads := map[string]*verified{}
	names := []string{"db", "log"}
	for _, name := range names {
		v, err := r.c.CreateVolume(r.ctx, name, fmt.Sprint(size))
		r.must(err, "create %s", name)
		luns[name] = v.LUN
	}
	for _, name := range names {
		loads[name] = r.verify(r.both(luns[name]), 0, size, "--failover", "--io-timeout", "20", "--iodepth", "8", "--initiator", "iqn.2024-01.org.iscsiload:"+name)
	}
	// What each snapshot may hold, by VOLUME@SNAPSHOT.
	held := map[string]*verified{}
	take := func(name string) (err error) {
		var log *verified
		db := loads["db"].at(func() {
			log = loads["log"].at(func() {
				_, err = r.c.CLI(r.ctx, "snapshot", "create", name, "--volume", "db", "--volume", "log")
			})
		})
		if err == nil {
			held["db@"+name], held["log@"+name] = db, log
		}
		return err
	}
	r.must(take("first"), "take a snapshot")
	r.refused("volume", "rollback", "db", "--snapshot", "first", "--yes") // it is in use
	r.refused("volume", "delete", "db", "--in-use", "--yes")              // it has snapshots

	for round := range *rounds {
		victim := r.volume(names[round%2]).Owner
		killed := make(chan error, 1)
		go func() {
			_, err := r.c.Demo(r.ctx, "kill", victim)
			killed <- err
		}()
		taken := 0
		for i := 0; i < 4; i++ {
			if err := take(fmt.Sprintf("kill-%d-%d", round, i)); err != nil {
				t.Logf("while node %s dies: %v", victim, err)
				continue
			}
			taken++
		}
		r.must(<-killed, "kill")
		for i := 4; taken == 0 && i < 30; i++ {
			if take(fmt.Sprintf("kill-%d-%d", round, i)) == nil {
				taken++
			}
		}
		if taken == 0 {
			t.Fatalf("no snapshot without node %s", victim)
		}
		loads["db"].progress(200, 30*time.Second)
		r.demo("start", victim)
		r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "recovery")
	}
	r.must(take("last"), "take a snapshot")
	for _, name := range names {
		loads[name].stop()
		r.must(r.c.CheckEqual(r.ctx, name), "check %s", name)
	}

	// Nothing is pending or half there, and every clone holds what it must.
	var page struct {
		Snapshots []struct {
			Name, Volume, State string
		}
	}
	r.must(lab.Until(r.ctx, time.Minute, func() error {
		if err := json.Unmarshal([]byte(r.cli("snapshot", "list", "-o", "json")), &page); err != nil {
			return err
		}
		for _, s := range page.Snapshots {
			if s.State != "ready" {
				return fmt.Errorf("snapshot %s@%s is %s", s.Volume, s.Name, s.State)
			}
		}
		return nil
	}), "snapshots")
	listed := map[string]bool{}
	clones := 0
	for _, s := range page.Snapshots {
		full := s.Volume + "@" + s.Name
		listed[full] = true
		if held[full] == nil {
			continue // its answer was lost, and it was taken
		}
		clone := fmt.Sprintf("clone-%d", clones)
		clones++
		r.cli("volume", "clone", full, clone, "--any-host")
		r.must(r.c.WaitServed(r.ctx, time.Minute), "clone of %s", full)
		lun := r.volume(clone).LUN
		for _, url := range r.both(lun) {
			held[full].again(url)
		}
		r.must(r.c.CheckEqual(r.ctx, clone), "check the clone of %s", full)
	}
	for full := range held {
		if !listed[full] {
			t.Errorf("snapshot %s was answered and is gone", full)
		}
	}
	t.Logf("%d snapshots, %d of them verified through both nodes", len(page.Snapshots), clones)

	changes := strings.Split(strings.TrimSpace(string(r.cli("snapshot", "diff", "db@first", "last", "--json"))), "\n")
	var changed int64
	for _, line := range changes {
		var x struct{ Offset, Length int64 }
		r.must(json.Unmarshal([]byte(line), &x), "diff: %s", line)
		changed += x.Length
	}
	if changed == 0 || changed > size {
		t.Errorf("%d bytes differ between the first and the last snapshot", changed)
	}

	r.must(lab.Until(r.ctx, 30*time.Second, func() error { // sessions of the generator end
		_, err := r.c.CLI(r.ctx, "volume", "rollback", "db", "--snapshot", "first", "--yes")
		return err
	}), "roll back")
	for _, url := range r.both(luns["db"]) {
		held["db@first"].again(url)
	}
	r.must(r.c.CheckEqual(r.ctx, "db"), "check after the rollback")

	full := r.live()
	for i := range clones {
		r.must(r.c.DeleteVolume(r.ctx, fmt.Sprintf("clone-%d", i)), "delete a clone")
	}
	r.cli("snapshot", "delete", "log@last", "--yes")
	for _, name := range names {
		r.cli("volume", "delete", name, "--with-snapshots", "--in-use", "--yes")
	}
	r.must(lab.Until(r.ctx, time.Minute, func() error {
		if now := r.live(); now > empty+8*mib {
			return fmt.Errorf("the pools hold %d KiB, before there was anything %d KiB, with all of it %d KiB", now>>10, empty>>10, full>>10)
		}
		return nil
	}), "space comes back")
}
