package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/twinsan/twinsan/server"
)

// page is the result of a command: its exported fields are the JSON that
// scripts read, and text is what people read.
//
// The JSON is stable: with the same "version" fields are only added. Sizes are
// whole bytes under names that end in _bytes, times are RFC 3339 in UTC, states
// are lower case words; a list is [] and never null.
type page interface {
	text(p *printer)
}

// version1 stands first in every page.
type version1 struct {
	Version int `json:"version"`
}

var v1Header = version1{Version: 1}

// print writes a page to standard output in the format asked for.
func (a *app) print(v page) error {
	if a.output == "json" {
		e := json.NewEncoder(a.out)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(v)
	}
	p := &printer{w: a.out, bytes: a.bytes}
	v.text(p)
	return p.err
}

// printer writes pages for people.
type printer struct {
	w     io.Writer
	bytes bool
	err   error
}

func (p *printer) line(format string, args ...any) {
	if _, err := fmt.Fprintf(p.w, format+"\n", args...); err != nil && p.err == nil {
		p.err = err
	}
}

// size prints with a unit, or the exact bytes with --bytes.
func (p *printer) size(n uint64) string {
	if p.bytes {
		return fmt.Sprintf("%d B", n)
	}
	return server.Size(n).String()
}

// table writes rows under a heading; cells of a column are aligned.
func (p *printer) table(heading string, rows [][]string) {
	w := tabwriter.NewWriter(p.w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, strings.ReplaceAll(strings.Join(strings.Fields(heading), "\t"), "_", " "))
	for _, row := range rows {
		for i, cell := range row {
			if cell == "" {
				row[i] = "-"
			}
		}
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	if err := w.Flush(); err != nil && p.err == nil {
		p.err = err
	}
}

// facts writes names and values in two columns; empty values are left out.
func (p *printer) facts(pairs ...string) {
	w := tabwriter.NewWriter(p.w, 0, 8, 2, ' ', 0)
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fmt.Fprintf(w, "%s\t%s\n", pairs[i], pairs[i+1])
		}
	}
	if err := w.Flush(); err != nil && p.err == nil {
		p.err = err
	}
}

func list(words []string) string { return strings.Join(words, ",") }

func clock(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

// savings is what reduction gained: "2.7x", or nothing when it cannot be told.
func savings(before, after uint64) string {
	if before == 0 || after == 0 {
		return ""
	}
	return fmt.Sprintf("%.1fx", float64(before)/float64(after))
}

// bar draws progress of resync.
func bar(done, total uint64) string {
	const width = 20
	if total == 0 {
		return "[" + strings.Repeat(".", width) + "]   0 %"
	}
	done = min(done, total)
	full := int(done * width / total)
	return fmt.Sprintf("[%s%s] %3d %%", strings.Repeat("#", full), strings.Repeat(".", width-full), done*100/total)
}
