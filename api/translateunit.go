package api

import (
	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

// This file translates what a node tells of the logical unit of a volume: paths,
// counters, reservations.

func pathMessage(p *server.Path) *v1.Path {
	return &v1.Path{Node: p.Node, State: enum[v1.PathState](v1.PathState_value, "PATH_STATE_", string(p.State)), Portals: p.Portals, Sessions: uint32(p.Sessions)}
}

func countMessage(c *server.ClassCount) *v1.ClassCount {
	return &v1.ClassCount{Class: c.Class, Commands: c.Commands, Good: c.Good, Bytes: c.Bytes, Nanoseconds: c.Nanoseconds, Refused: each(c.Refused, refusalMessage)}
}

func countOf(m **v1.ClassCount) server.ClassCount {
	c := *m
	out := server.ClassCount{Class: c.Class, Commands: c.Commands, Good: c.Good, Bytes: c.Bytes, Nanoseconds: c.Nanoseconds}
	for _, r := range c.Refused {
		out.Refused = append(out.Refused, server.Refusal{Status: byte(r.Status), Key: byte(r.Key), ASC: byte(r.Asc), ASCQ: byte(r.Ascq), Count: r.Count})
	}
	return out
}

func refusalMessage(r *server.Refusal) *v1.Refusal {
	label, words := r.Reason()
	return &v1.Refusal{Status: uint32(r.Status), Key: uint32(r.Key), Asc: uint32(r.ASC), Ascq: uint32(r.ASCQ), Count: r.Count, Code: r.Code(), Reason: label, Text: words}
}

func reservationsMessage(r *server.Reservations) *v1.Reservations {
	if r.Empty() {
		return nil
	}
	out := &v1.Reservations{Generation: r.Generation, Persist: r.Persist, Type: r.Type, Registrations: each(r.Registrations, registrationMessage)}
	if r.Reserve != nil {
		out.Reserve = registrationMessage(r.Reserve)
	}
	return out
}

func reservationsOf(m *v1.Reservations) *server.Reservations {
	if m == nil {
		return nil
	}
	out := &server.Reservations{Generation: m.Generation, Persist: m.Persist, Type: m.Type, Registrations: each(m.Registrations, registrationOf)}
	if m.Reserve != nil {
		x := registrationOf(&m.Reserve)
		out.Reserve = &x
	}
	return out
}

func registrationMessage(r *server.Registration) *v1.Registration {
	return &v1.Registration{Host: r.Host, Initiator: r.Initiator, Isid: r.ISID[:], Node: r.Node, Key: r.Key, Holder: r.Holder}
}

func registrationOf(m **v1.Registration) server.Registration {
	r := *m
	out := server.Registration{Host: r.Host, Initiator: r.Initiator, Node: r.Node, Key: r.Key, Holder: r.Holder}
	copy(out.ISID[:], r.Isid)
	return out
}
