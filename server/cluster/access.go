package cluster

import (
	"slices"
	"strings"
)

// This file applies the commands that say who may do what: hosts, the volumes
// that they see, and discovery.

func (x *cmdAddHost) apply(e *edit) result {
	s, h := e.s, x.Host
	if !validName(h.Name) {
		return refuse(codeInvalid, "%q is not a host name: %s", h.Name, nameRule)
	}
	if len(h.Initiators) == 0 || len(h.Initiators) > maxInitiators {
		return refuse(codeInvalid, "a host has 1 to %d initiators", maxInitiators)
	}
	for _, i := range h.Initiators {
		if !validInitiator(i) {
			return refuse(codeInvalid, "%q is not an iSCSI name (iqn., eui. or naa.)", i)
		}
		if o := s.HostOf(i); o != nil {
			return refuse(codeExists, "initiator %s belongs to host %s", i, o.Name)
		}
	}
	if s.Host(h.Name) != nil {
		return refuse(codeExists, "there is a host %s already", h.Name)
	}
	if len(s.Hosts) >= maxHosts {
		return refuse(codeRefused, "there are %d hosts, the most that is supported", len(s.Hosts))
	}
	if (h.User == "") != (len(h.Secret) == 0) || (h.MutualUser == "") != (len(h.MutualSecret) == 0) || h.User == "" && h.MutualUser != "" {
		return refuse(codeInvalid, "CHAP takes a user and a secret, and mutual CHAP both of its own in addition")
	}
	h.Created = e.env.Now
	s.Hosts = append(slices.Clone(s.Hosts), &h)
	slices.SortFunc(s.Hosts, func(a, b *Host) int { return strings.Compare(a.Name, b.Name) })
	e.event(Info, "host-added", "host %s added (%s)", h.Name, strings.Join(h.Initiators, ", "))
	return result{}
}

func (x *cmdRemoveHost) apply(e *edit) result {
	if e.s.Host(x.Name) == nil {
		return refuse(codeNotFound, "there is no host %s", x.Name)
	}
	for _, v := range e.s.Volumes {
		if slices.Contains(v.Hosts, x.Name) {
			w := *v
			gone := func(h string) bool { return h == x.Name }
			w.Hosts, w.ReadOnly = without(v.Hosts, gone), without(v.ReadOnly, gone)
			e.setVolume(&w)
		}
	}
	e.s.Hosts = without(e.s.Hosts, func(h *Host) bool { return h.Name == x.Name })
	e.event(Info, "host-removed", "host %s was removed", x.Name)
	return result{}
}

func (x *cmdVolumeHosts) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	hosts, r := e.hostNames(x.Hosts)
	if r.Code != codeOK {
		return r
	}
	w := *v
	w.Hosts, w.AnyHost = hosts, x.AnyHost
	// Nobody gains the right to write by being named again.
	w.ReadOnly = without(v.ReadOnly, func(h string) bool { return !slices.Contains(hosts, h) })
	e.setVolume(&w)
	e.event(Info, "volume-hosts", "volume %s is seen by %s", v.Name, w.audience())
	return result{ID: uint64(v.ID)}
}

// audience says who sees a volume.
func (v *Volume) audience() string {
	var who []string
	if v.AnyHost {
		who = append(who, "every initiator")
	}
	for _, h := range v.Hosts {
		if slices.Contains(v.ReadOnly, h) {
			h += " (read-only)"
		}
		who = append(who, h)
	}
	if len(who) == 0 {
		return "no host"
	}
	return strings.Join(who, ", ")
}

func (x *cmdMapVolume) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	named, r := e.hostNames(x.Hosts)
	if r.Code != codeOK {
		return r
	}
	if len(named) == 0 || x.As > mapReadOnly {
		return refuse(codeInvalid, "a mapping names hosts, and whether they may write")
	}
	w := *v
	mentioned := func(h string) bool { return slices.Contains(named, h) }
	w.Hosts, w.ReadOnly = without(v.Hosts, mentioned), without(v.ReadOnly, mentioned)
	if x.As != mapNone {
		w.Hosts = slices.Sorted(slices.Values(append(w.Hosts, named...)))
	}
	if x.As == mapReadOnly {
		w.ReadOnly = slices.Sorted(slices.Values(append(w.ReadOnly, named...)))
	}
	if slices.Equal(v.Hosts, w.Hosts) && slices.Equal(v.ReadOnly, w.ReadOnly) {
		return result{ID: uint64(v.ID)}
	}
	e.setVolume(&w)
	e.event(Info, "volume-hosts", "volume %s is seen by %s", v.Name, w.audience())
	return result{ID: uint64(v.ID)}
}

// hostNames sorts the names and checks that the hosts exist.
func (e *edit) hostNames(names []string) ([]string, result) {
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	for _, h := range names {
		if e.s.Host(h) == nil {
			return nil, refuse(codeNotFound, "there is no host %s", h)
		}
	}
	return names, result{}
}

func (x *cmdDiscovery) apply(e *edit) result {
	d := x.Discovery
	chap := d.User != "" || len(d.Secret) != 0 || d.MutualUser != "" || len(d.MutualSecret) != 0
	switch {
	case d.Mode > DiscoveryCHAP:
		return refuse(codeInvalid, "discovery mode %d is not known", d.Mode)
	case d.Mode != DiscoveryCHAP && chap:
		return refuse(codeInvalid, "only discovery by CHAP takes users and secrets")
	case d.Mode == DiscoveryCHAP && (d.User == "" || len(d.Secret) == 0 || (d.MutualUser == "") != (len(d.MutualSecret) == 0)):
		return refuse(codeInvalid, "discovery by CHAP takes a user and a secret, and mutual CHAP both of its own in addition")
	}
	e.s.Discovery = d
	words := map[DiscoveryMode]string{
		DiscoveryAsHost: "initiators prove themselves for discovery as for a login", DiscoveryOpen: "discovery needs no authentication",
		DiscoveryCHAP: "initiators prove themselves for discovery as user " + d.User,
	}
	e.event(Info, "discovery-auth", "%s", words[d.Mode])
	return result{}
}
