package replication

import "math"

// Peer says whether another node's link is up, and how many bytes of new data its
// pool can take as of its last answer to a beacon, less what was sent since; known
// is false while none came over this link. It costs two atomic loads.
func (n *Node) Peer(id NodeID) (linked bool, room uint64, known bool) {
	p := (*n.peers.Load())[id]
	if p == nil {
		return false, 0, false
	}
	free := p.room.Load()
	return p.link.Load() != nil, uint64(max(free, 0)), free != math.MaxInt64
}
