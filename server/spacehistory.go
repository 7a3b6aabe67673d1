package server

import (
	"encoding/json"
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/renameio/v2"
)

// historyFile in the data directory holds how full the pool was, so that a forecast
// outlives restarts.
const historyFile = "space.json"

const (
	// historyEvery is how often the fill is noted.
	historyEvery = 10 * time.Minute
	// historyDense is how many times older a note is than the distance to the next one,
	// at least: so a year takes 700 notes, 40 KiB.
	historyDense = 100
	historyAge   = 400 * 24 * time.Hour
	historyMax   = 1024

	// forecastFrom is the least history that a forecast is made from, forecastOver the most.
	forecastFrom = 24 * time.Hour
	forecastOver = 30 * 24 * time.Hour
	// forecastPoints is how many evenly spaced notes it is made from, at most.
	forecastPoints = 120
)

// spaceNote is how full the pool was at a moment.
type spaceNote struct {
	Unix int64 `json:"t"`
	Live int64 `json:"live"`
}

// spaceHistory is the fill of the pool over time, oldest first. It is a value: who adds to
// it gets another.
type spaceHistory struct {
	Version int         `json:"version"`
	Notes   []spaceNote `json:"notes"`
}

// readHistory reads it; a file that is missing or damaged is an empty one.
func readHistory(dataDir string) *spaceHistory {
	h := &spaceHistory{Version: 1}
	text, err := os.ReadFile(filepath.Join(dataDir, historyFile))
	if errors.Is(err, fs.ErrNotExist) {
		return h
	}
	sorted := func(a, b spaceNote) int { return int(a.Unix - b.Unix) }
	if err != nil || json.Unmarshal(text, h) != nil || h.Version != 1 || !slices.IsSortedFunc(h.Notes, sorted) {
		return &spaceHistory{Version: 1}
	}
	return h
}

func (h *spaceHistory) write(dataDir string) error {
	text, err := json.Marshal(h)
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(dataDir, historyFile), append(text, '\n'), 0o600)
}

// add notes the fill at a moment, and thins what is old. Notes of the future, which a
// clock that was wrong has left, go.
func (h *spaceHistory) add(now time.Time, live int64) *spaceHistory {
	t := now.Unix()
	next := &spaceHistory{Version: 1}
	for _, n := range h.Notes {
		if t <= n.Unix || t-n.Unix > int64(historyAge/time.Second) {
			continue
		}
		if k := len(next.Notes); k > 0 && (n.Unix-next.Notes[k-1].Unix)*historyDense < t-n.Unix {
			continue // too near to the one before, for its age
		}
		next.Notes = append(next.Notes, n)
	}
	next.Notes = append(next.Notes, spaceNote{t, live})
	if n := len(next.Notes); n > historyMax {
		next.Notes = next.Notes[n-historyMax:]
	}
	return next
}

// Forecast says when a pool will be full if it goes on as it did.
type Forecast struct {
	// History is how far back the notes go that it is made from, 30 days at most. Without
	// Needed of it nothing is said.
	History, Needed time.Duration
	Known           bool
	// Growth is that of live data and metadata, bytes a day: the median of what it was
	// between any two moments, so that a single big copy does not count.
	Growth float64
	// Levels are 80, 90 and 100 percent of what is usable.
	Levels []ForecastLevel
}

// ForecastLevel is when a level is reached.
type ForecastLevel struct {
	Percent int
	// Days from now: 0 when it is reached already, negative when it never is at this pace.
	Days float64
}

// forecast looks ahead from now, when live of usable bytes are taken.
func (h *spaceHistory) forecast(now time.Time, live, usable int64) Forecast {
	f := Forecast{Needed: forecastFrom}
	end := now.Unix()
	notes := slices.DeleteFunc(slices.Clone(h.Notes), func(n spaceNote) bool {
		return end <= n.Unix || end-n.Unix > int64(forecastOver/time.Second)
	})
	if len(notes) > 0 {
		f.History = time.Duration(end-notes[0].Unix) * time.Second
	}
	f.Known = forecastFrom <= f.History
	if !f.Known {
		return f
	}
	notes = append(notes, spaceNote{end, live})
	// Evenly spaced, so that the last hours do not outvote the weeks before.
	step := max(int64(f.History/time.Second)/forecastPoints, 1)
	even := notes[:1]
	for _, n := range notes[1:] {
		if even[len(even)-1].Unix+step <= n.Unix {
			even = append(even, n)
		}
	}
	var slopes []float64
	for i := range even {
		for k := i + 1; k < len(even); k++ {
			slopes = append(slopes, float64(even[k].Live-even[i].Live)/float64(even[k].Unix-even[i].Unix))
		}
	}
	if len(slopes) == 0 {
		f.Known = false
		return f
	}
	slices.Sort(slopes)
	f.Growth = (slopes[len(slopes)/2] + slopes[(len(slopes)-1)/2]) / 2 * 86400
	for _, percent := range []int{80, 90, 100} {
		left := float64(usable)*float64(percent)/100 - float64(live)
		level := ForecastLevel{Percent: percent, Days: -1}
		if left <= 0 {
			level.Days = 0
		} else if days := left / f.Growth; f.Growth > 0 && !math.IsInf(days, 0) {
			level.Days = days
		}
		f.Levels = append(f.Levels, level)
	}
	return f
}

// note writes down how full the pool is.
func (n *Node) note(now time.Time) {
	h := n.history.Load().add(now, n.store.Room().Live)
	n.history.Store(h)
	if err := h.write(n.config.DataDir); err != nil {
		n.log.Warn("the history of the pool's fill was not written", "err", err)
	}
}
