package server

import (
	"context"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestHistoryIsBounded notes the fill for three years, with a restart each week: the file
// stays small, and the last month is known in detail.
func TestHistoryIsBounded(t *testing.T) {
	dir := t.TempDir()
	h := readHistory(dir)
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range 3 * 365 * 24 {
		now = now.Add(time.Hour)
		h = h.add(now, int64(i))
		if len(h.Notes) > historyMax {
			t.Fatalf("%d notes", len(h.Notes))
		}
		if i%(7*24) == 0 {
			if err := h.write(dir); err != nil {
				t.Fatal(err)
			}
			h = readHistory(dir)
		}
	}
	if n := len(h.Notes); n < 300 || now.Unix()-h.Notes[0].Unix < 300*86400 {
		t.Errorf("%d notes over %d days", n, (now.Unix()-h.Notes[0].Unix)/86400)
	}
	for i := 1; i < len(h.Notes); i++ {
		if d, age := h.Notes[i].Unix-h.Notes[i-1].Unix, now.Unix()-h.Notes[i].Unix; d <= 0 || 3600+age/25 < d {
			t.Fatalf("%d s between notes of %d s ago", d, age)
		}
	}
	// A clock that ran ahead, and a damaged file, do no harm.
	h = h.add(now.Add(1000*time.Hour), 7).add(now.Add(time.Hour), 8)
	if k := len(h.Notes) - 1; h.Notes[k].Live != 8 || h.Notes[k-1].Unix > now.Unix() {
		t.Errorf("%+v", h.Notes[k-1:])
	}
	for _, text := range []string{"{", `{"version":2}`, `{"version":1,"notes":[{"t":5,"live":1},{"t":4,"live":1}]}`} {
		if err := os.WriteFile(filepath.Join(dir, historyFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if h := readHistory(dir); h.Version != 1 || len(h.Notes) != 0 {
			t.Errorf("%s is read as %+v", text, h)
		}
	}
}

func TestForecast(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	const gib = 1 << 30
	run := func(days int, live func(day float64) float64) (h *spaceHistory, last int64) {
		h = &spaceHistory{Version: 1}
		for i := range days * 144 {
			last = int64(live(float64(i)/144) * gib)
			h = h.add(now.Add(-time.Duration(days)*24*time.Hour+time.Duration(i)*historyEvery), last)
		}
		return h, last
	}
	near := func(got, want float64) bool { return want*0.97-0.1 <= got && got <= want*1.03+0.1 }
	for _, test := range []struct {
		name   string
		days   int
		live   func(day float64) float64
		growth float64 // GiB a day
		levels [3]float64
	}{
		{"steady", 20, func(d float64) float64 { return 10 + d }, 1, [3]float64{50, 60, 70}},
		{"one big copy", 20, func(d float64) float64 {
			if d > 15 {
				return 62 + d/10
			}
			return 2 + d/10
		}, 0.1, [3]float64{160, 260, 360}},
		{"shrinks", 10, func(d float64) float64 { return 85 - d/10 }, -0.1, [3]float64{0, -1, -1}},
		{"faster of late counts when it is long enough", 90, func(d float64) float64 { return max(10, d-50) }, 1, [3]float64{40, 50, 60}},
	} {
		h, last := run(test.days, test.live)
		f := h.forecast(now, last, 100*gib)
		if !f.Known || !near(f.Growth/gib, test.growth) || len(f.Levels) != 3 {
			t.Errorf("%s: %+v", test.name, f)
			continue
		}
		for i, l := range f.Levels {
			if want := test.levels[i]; want > 0 && !near(l.Days, want) || want <= 0 && l.Days != want {
				t.Errorf("%s: %+v", test.name, f)
			}
		}
	}
	h, last := run(1, func(float64) float64 { return 1 })
	if f := h.forecast(now.Add(-time.Hour), last, gib); f.Known || f.History != 23*time.Hour || f.Needed != 24*time.Hour {
		t.Errorf("a short history: %+v", f)
	}
	if f := (&spaceHistory{}).forecast(now, 0, gib); f.Known || f.History != 0 {
		t.Errorf("no history: %+v", f)
	}
}

// TestExplainPool explains the pool of one node through the other one.
func TestExplainPool(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	ca, cb := l.config("a", false), l.config("b", false)
	data := make([]byte, 64*4096)
	_, _ = rand.Read(data[:32*4096])
	copy(data[32*4096:], data[:32*4096])
	a, b := l.join(ca, cb)
	l.fill(a, b, data)
	told := 0.0
	x, err := a.ExplainPool(ctx, "b", true, false, func(d float64) error { told = d; return nil })
	if err != nil {
		t.Fatal(err)
	}
	p := &x.Pool
	if sum := p.Volumes + p.Snapshots + p.Leaving + p.Unsettled + p.Metadata + p.Garbage + p.Returning + p.Free(); sum != p.Size || p.Size != b.store.Room().Size {
		t.Errorf("the parts make %d: %+v", sum, p)
	}
	if len(p.List) != 1 || x.Names[p.List[0].ID] != "vm" || p.List[0].Mapped < 64*4096 || p.Deduplicated < 32*4096 || p.List[0].Frees != p.Volumes || x.Node != "b" || x.Forecast.Known || told != 1 {
		t.Errorf("%+v", x)
	}
	refused := errors.New("enough")
	if _, err := a.ExplainPool(ctx, "a", true, false, func(float64) error { return refused }); err != nil && !errors.Is(err, refused) {
		t.Error(err)
	}
	stopped, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := a.ExplainPool(stopped, "a", true, false, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := a.ExplainPool(ctx, "z", true, false, nil); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	b.note(time.Now())
	l.close(b)
	if h := readHistory(cb.DataDir); len(h.Notes) != 1 || h.Notes[0].Live <= 0 {
		t.Errorf("%s holds %+v", historyFile, h)
	}
}
