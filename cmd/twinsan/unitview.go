package main

import (
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

// The views of what hosts do with a volume: paths, commands, reservations.

type pathView struct {
	Node     string   `json:"node"`
	State    string   `json:"state"`
	Portals  []string `json:"portals"`
	Sessions uint32   `json:"sessions"`
}

type countView struct {
	Class       string        `json:"class"`
	Commands    uint64        `json:"commands"`
	Good        uint64        `json:"good"`
	Bytes       uint64        `json:"bytes"`
	Nanoseconds uint64        `json:"nanoseconds"`
	Refused     []refusalView `json:"refused"`
}

type refusalView struct {
	Code   string `json:"code"`
	Reason string `json:"reason"`
	Text   string `json:"text"`
	Count  uint64 `json:"count"`
}

type offloadView struct {
	Name    string `json:"name"`
	Used    bool   `json:"used"`
	Refused uint64 `json:"refused"`
}

type reservationsView struct {
	Type          string             `json:"type"`
	Generation    uint32             `json:"generation"`
	Persist       bool               `json:"persist"`
	Registrations []registrationView `json:"registrations"`
	Reserve       *registrationView  `json:"reserve,omitempty"`
}

type registrationView struct {
	Host      string `json:"host"`
	Initiator string `json:"initiator"`
	ISID      string `json:"isid"`
	Node      string `json:"node"`
	Key       string `json:"key"` // hexadecimal: 64 bits do not fit every reader of JSON
	Holder    bool   `json:"holder"`
}

func viewPath(p *v1.Path) pathView {
	return pathView{p.Node, api.Word(p.State, "PATH_STATE_"), words(p.Portals), p.Sessions}
}

func viewCount(c *v1.ClassCount) countView {
	return countView{c.Class, c.Commands, c.Good, c.Bytes, c.Nanoseconds, views(c.Refused, func(r *v1.Refusal) refusalView {
		return refusalView{r.Code, r.Reason, r.Text, r.Count}
	})}
}

func viewOffload(o *v1.Offload) offloadView { return offloadView{o.Name, o.Used, o.Refused} }

func viewReservations(r *v1.Reservations) *reservationsView {
	if r == nil {
		return nil
	}
	v := &reservationsView{Type: r.Type, Generation: r.Generation, Persist: r.Persist, Registrations: views(r.Registrations, viewRegistration)}
	if r.Reserve != nil {
		x := viewRegistration(r.Reserve)
		v.Reserve = &x
	}
	return v
}

func viewRegistration(r *v1.Registration) registrationView {
	return registrationView{r.Host, r.Initiator, hex.EncodeToString(r.Isid), r.Node, fmt.Sprintf("%016x", r.Key), r.Holder}
}

// commandTables shows what hosts did with a volume, and what they were refused.
func commandTables(p *printer, v *volumeView) {
	if len(v.Commands) == 0 {
		p.line("no host has sent a command yet")
		return
	}
	rows, refused := [][]string{}, [][]string{}
	for _, c := range v.Commands {
		mean := ""
		if c.Commands > 0 {
			mean = latency(time.Duration(c.Nanoseconds / c.Commands))
		}
		rows = append(rows, []string{c.Class, fmt.Sprint(c.Commands), p.size(c.Bytes), mean, fmt.Sprint(c.Commands - min(c.Good, c.Commands))})
		for _, r := range c.Refused {
			refused = append(refused, []string{c.Class, fmt.Sprint(r.Count), r.Code + " " + r.Text})
		}
	}
	p.table("COMMAND COUNT BYTES MEAN REFUSED", rows)
	if len(refused) > 0 {
		p.line("")
		p.table("REFUSED COUNT WHY", refused)
	}
	p.line("")
	p.line("used by hosts: %s", offloadWords(v.Offloads))
}

func offloadWords(offloads []offloadView) string {
	var out []string
	for _, o := range offloads {
		word := o.Name + " no"
		if o.Used {
			word = o.Name + " yes"
		} else if o.Refused > 0 {
			word = fmt.Sprintf("%s no (%d refused)", o.Name, o.Refused)
		}
		out = append(out, word)
	}
	return strings.Join(out, ", ")
}

// latency rounds a time to three digits.
func latency(d time.Duration) string {
	for unit := time.Second; unit >= time.Microsecond; unit /= 1000 {
		if d >= unit {
			return d.Round(unit / 100).String()
		}
	}
	return d.String()
}

func reservationTable(p *printer, r *reservationsView) {
	if r == nil {
		p.line("reservations: none")
		return
	}
	kind := r.Type
	if kind == "" {
		kind = "registered, not reserved"
	}
	if r.Reserve != nil {
		p.line("reserved by RESERVE: %s through node %s", orWord(r.Reserve.Host, r.Reserve.Initiator), r.Reserve.Node)
	}
	if len(r.Registrations) == 0 {
		return
	}
	p.line("persistent reservation: %s (generation %d)", kind, r.Generation)
	rows := [][]string{}
	for _, x := range r.Registrations {
		holder := ""
		if x.Holder {
			holder = "holder"
		}
		rows = append(rows, []string{x.Host, x.Initiator, x.ISID, x.Node, x.Key, holder})
	}
	p.table("HOST INITIATOR ISID NODE KEY ROLE", rows)
}

func orWord(word, other string) string {
	if word == "" {
		return other
	}
	return word
}
