package server

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/twinsan/twinsan/server/cluster"
)

// journal brings the facts that the parts of a node report into the log of the
// cluster. Reporting never waits: facts queue up, and when the queue is full
// because there has been no quorum for long, they are only in the node's own log.
type journal struct {
	log    *slog.Logger
	add    func(context.Context, cluster.Severity, string, string) error
	queue  chan fact
	cancel context.CancelFunc
	group  sync.WaitGroup
}

type fact struct {
	severity   cluster.Severity
	code, text string
}

const (
	journalLength = 256
	// recordMax is how long one fact may take; it gives up sooner than a cluster
	// without quorum is repaired, so that newer facts have a chance.
	recordMax = time.Minute
)

func newJournal(log *slog.Logger, add func(context.Context, cluster.Severity, string, string) error) *journal {
	ctx, cancel := context.WithCancel(context.Background())
	j := &journal{log: log, add: add, queue: make(chan fact, journalLength), cancel: cancel}
	j.group.Go(func() {
		for {
			select {
			case f := <-j.queue:
				once, done := context.WithTimeout(ctx, recordMax)
				if err := j.add(once, f.severity, f.code, f.text); err != nil {
					j.log.Warn("event was not recorded in the cluster", "code", f.code, "err", err)
				}
				done()
			case <-ctx.Done():
				return
			}
		}
	})
	return j
}

// report logs a fact and queues it for the cluster.
func (j *journal) report(level slog.Level, code, text string) {
	j.log.Log(context.Background(), level, "event", "code", code, "text", text)
	severity := cluster.Info
	switch {
	case level >= slog.LevelError:
		severity = cluster.Error
	case level >= slog.LevelWarn:
		severity = cluster.Warning
	}
	select {
	case j.queue <- fact{severity, code, text}:
	default:
	}
}

func (j *journal) close() {
	j.cancel()
	j.group.Wait()
}
