package cluster

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// repeatEvery is how often one message of raft is let through. raft repeats some
// of them several times a second for as long as a node is down.
const repeatEvery = 10 * time.Second

// raftLog passes the log of the raft library on to slog, one level lower than
// raft puts it: an election or an unreachable peer, which raft calls errors, is
// what raft is for.
type raftLog struct {
	to    *slog.Logger
	name  string
	quiet *quiet
}

// quiet holds back repetitions. Its size is bounded by forgetting all when full.
type quiet struct {
	mu   sync.Mutex
	last map[string]time.Time
}

func (q *quiet) pass(msg string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	if t, ok := q.last[msg]; ok && now.Sub(t) < repeatEvery {
		return false
	}
	if len(q.last) >= 256 {
		clear(q.last)
	}
	q.last[msg] = now
	return true
}

func newRaftLog(to *slog.Logger) *raftLog {
	return &raftLog{to: to, name: "raft", quiet: &quiet{last: make(map[string]time.Time)}}
}

func (l *raftLog) Log(level hclog.Level, msg string, args ...any) {
	var to slog.Level
	switch level {
	case hclog.Info:
		to = slog.LevelDebug
	case hclog.Warn:
		to = slog.LevelInfo
	case hclog.Error:
		to = slog.LevelWarn
	default:
		return // too much even for debugging
	}
	if !l.to.Enabled(context.Background(), to) || !l.quiet.pass(l.name+msg) {
		return
	}
	attrs := make([]any, 0, len(args)+2)
	attrs = append(attrs, "part", l.name)
	for i, a := range args {
		switch v := a.(type) {
		case hclog.Format:
			if len(v) > 0 {
				a = fmt.Sprintf(fmt.Sprint(v[0]), v[1:]...)
			}
		case error:
			a = v.Error()
		}
		if i%2 == 0 && a == "error" {
			a = "err"
		}
		attrs = append(attrs, a)
	}
	l.to.Log(context.Background(), to, msg, attrs...)
}

func (l *raftLog) Trace(msg string, args ...any) {}
func (l *raftLog) Debug(msg string, args ...any) {}
func (l *raftLog) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *raftLog) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *raftLog) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *raftLog) IsTrace() bool { return false }
func (l *raftLog) IsDebug() bool { return false }
func (l *raftLog) IsInfo() bool  { return true }
func (l *raftLog) IsWarn() bool  { return true }
func (l *raftLog) IsError() bool { return true }

func (l *raftLog) ImpliedArgs() []any { return nil }
func (l *raftLog) With(args ...any) hclog.Logger {
	return &raftLog{to: l.to.With(args...), name: l.name, quiet: l.quiet}
}
func (l *raftLog) Name() string { return l.name }
func (l *raftLog) Named(name string) hclog.Logger {
	return &raftLog{to: l.to, name: l.name + "." + name, quiet: l.quiet}
}
func (l *raftLog) ResetNamed(name string) hclog.Logger {
	return &raftLog{to: l.to, name: name, quiet: l.quiet}
}
func (l *raftLog) SetLevel(hclog.Level)  {}
func (l *raftLog) GetLevel() hclog.Level { return hclog.Info }
func (l *raftLog) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return log.New(io.Discard, "", 0)
}
func (l *raftLog) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return io.Discard }
