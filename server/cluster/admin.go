package cluster

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// adminMax bounds a mutation whose context has no earlier end.
const adminMax = 15 * time.Second

func adminContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, adminMax)
}

// VolumeSpec describes a new volume.
type VolumeSpec struct {
	Name       string
	SizeBytes  uint64   // multiple of 4096, up to MaxVolumeBytes
	BlockBytes uint32   // logical block, 512 or 4096; 0 is 512
	Hosts      []string // names of hosts that see it
	AnyHost    bool     // every initiator sees it
	NoDedup    bool
	NoCompress bool
	// RequestID makes a repeated call return the volume of the first; may be empty.
	RequestID string
}

// CreateVolume makes a volume with replicas on up to two data nodes, owned by the
// one of them that owns fewest. The owner alone is in sync at first; it takes the
// other one in (M4). Like every mutation it is sent to the leader and returns when
// this node shows the effect. Errors: ErrExists, ErrInvalid, ErrNotFound (a host),
// ErrRefused (a limit), ErrNoQuorum.
func (c *Cluster) CreateVolume(ctx context.Context, spec VolumeSpec) (*Volume, error) {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	x := &cmdCreateVolume{
		Name: spec.Name, UUID: uuid.New(), SizeBytes: spec.SizeBytes, BlockBytes: spec.BlockBytes,
		Dedup: !spec.NoDedup, Compress: !spec.NoCompress, Thin: true, AnyHost: spec.AnyHost, Hosts: spec.Hosts,
	}
	if x.BlockBytes == 0 {
		x.BlockBytes = 512
	}
	// NAA 3h is the locally assigned type: 60 bits of our own choice.
	rand.Read(x.NAA[:])
	x.NAA[0] = 0x30 | x.NAA[0]&0x0f
	x.Serial = strings.ToUpper(hex.EncodeToString(x.UUID[:8]))
	r, err := c.proposeOnce(ctx, spec.RequestID, x)
	if err != nil {
		return nil, err
	}
	return c.volume(lsfs.VolumeID(r.ID))
}

func (c *Cluster) volume(id lsfs.VolumeID) (*Volume, error) {
	if v := c.State().Volume(id); v != nil {
		return v, nil
	}
	return nil, errorf(ErrNotFound, "volume %d is gone already", id)
}

// DeleteVolume records that a volume is deleted. Its name and LUN are free at
// once; its replicas are freed by their nodes, which then call VolumeFreed.
func (c *Cluster) DeleteVolume(ctx context.Context, id lsfs.VolumeID) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdDeleteVolume{id})
	return err
}

// VolumeFreed says that this node holds nothing of a deleted volume any more.
// When all its replicas have said so, the volume leaves the state. Repeating it
// does no harm.
func (c *Cluster) VolumeFreed(ctx context.Context, id lsfs.VolumeID) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdVolumeFreed{id, c.id.Node})
	return err
}

// ResizeVolume grows a volume. Shrinking is refused (ErrRefused).
func (c *Cluster) ResizeVolume(ctx context.Context, id lsfs.VolumeID, sizeBytes uint64) (*Volume, error) {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	if _, err := c.proposeSync(ctx, &cmdResizeVolume{id, sizeBytes}); err != nil {
		return nil, err
	}
	return c.volume(id)
}

// SetVolumeHosts lets exactly these hosts, or with anyHost every initiator, see a volume.
func (c *Cluster) SetVolumeHosts(ctx context.Context, id lsfs.VolumeID, hosts []string, anyHost bool) (*Volume, error) {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	if _, err := c.proposeSync(ctx, &cmdVolumeHosts{id, hosts, anyHost}); err != nil {
		return nil, err
	}
	return c.volume(id)
}

// HostSpec describes a host. The secrets are in the clear; they are sealed before
// they leave this node.
type HostSpec struct {
	Name         string
	Initiators   []string
	User         string // CHAP; empty: none
	Secret       string
	MutualUser   string // mutual CHAP; empty: none
	MutualSecret string
}

const (
	// minSecret is what RFC 7143 section 9.2.1 asks for: 96 bits.
	minSecret = 12
	maxSecret = 255
)

func checkSecret(whose, s string) error {
	if len(s) < minSecret || len(s) > maxSecret {
		return errorf(ErrInvalid, "%s has %d to %d characters (Windows takes at most 16)", whose, minSecret, maxSecret)
	}
	for _, b := range []byte(s) {
		if b <= ' ' || b > '~' {
			return errorf(ErrInvalid, "%s consists of printable ASCII characters without spaces", whose)
		}
	}
	return nil
}

// AddHost adds a host. Initiator names are compared in lower case. The secret of
// the target may not be any initiator's secret: whoever knows one would know the
// answer to his own challenge. A witness cannot add hosts (ErrRefused).
func (c *Cluster) AddHost(ctx context.Context, spec HostSpec) (*Host, error) {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	if c.seal == nil {
		return nil, errorf(ErrRefused, "%s is a witness: add hosts through a data node", c.id.Name)
	}
	h := Host{Name: spec.Name, User: spec.User, MutualUser: spec.MutualUser}
	for _, i := range spec.Initiators {
		h.Initiators = append(h.Initiators, strings.ToLower(strings.TrimSpace(i)))
	}
	h.Initiators = slices.Compact(slices.Sorted(slices.Values(h.Initiators)))
	if (spec.User == "") != (spec.Secret == "") || (spec.MutualUser == "") != (spec.MutualSecret == "") {
		return nil, errorf(ErrInvalid, "CHAP takes a user and a secret")
	}
	if spec.Secret != "" {
		if err := checkSecret("the CHAP secret", spec.Secret); err != nil {
			return nil, err
		}
		h.Secret = c.seal.seal(purposeCHAP(h.Name, false), []byte(spec.Secret))
	}
	if spec.MutualSecret != "" {
		if err := checkSecret("the mutual CHAP secret", spec.MutualSecret); err != nil {
			return nil, err
		}
		h.MutualSecret = c.seal.seal(purposeCHAP(h.Name, true), []byte(spec.MutualSecret))
	}
	if err := c.checkReuse(spec); err != nil {
		return nil, err
	}
	if _, err := c.proposeSync(ctx, &cmdAddHost{h}); err != nil {
		return nil, err
	}
	if host := c.State().Host(h.Name); host != nil {
		return host, nil
	}
	return nil, errorf(ErrNotFound, "host %s is gone already", h.Name)
}

// checkReuse refuses a target secret that is an initiator's secret, of this or of
// another host.
func (c *Cluster) checkReuse(spec HostSpec) error {
	same := func(a, b string) bool { return a != "" && subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
	reused := same(spec.Secret, spec.MutualSecret)
	for _, h := range c.State().Hosts {
		secret, mutual, err := c.Secrets(h)
		if err != nil {
			return err
		}
		reused = reused || same(spec.Secret, mutual) || same(spec.MutualSecret, secret)
	}
	if reused {
		return errorf(ErrInvalid, "the target's secret must differ from the secret of every initiator")
	}
	return nil
}

// Secrets opens the CHAP secrets of a host; what it does not have is empty. A
// witness cannot (ErrRefused).
func (c *Cluster) Secrets(h *Host) (secret, mutual string, err error) {
	if c.seal == nil {
		return "", "", errorf(ErrRefused, "%s is a witness and cannot open secrets", c.id.Name)
	}
	open := func(mutual bool, s Sealed) (string, error) {
		if len(s) == 0 {
			return "", nil
		}
		b, err := c.seal.open(purposeCHAP(h.Name, mutual), s)
		return string(b), err
	}
	if secret, err = open(false, h.Secret); err == nil {
		mutual, err = open(true, h.MutualSecret)
	}
	return secret, mutual, err
}

// RemoveHost removes a host and takes it off all volumes.
func (c *Cluster) RemoveHost(ctx context.Context, name string) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdRemoveHost{name})
	return err
}

// AddEvent records a durable fact. Code is a lower-case name with hyphens that
// scripts may rely on.
func (c *Cluster) AddEvent(ctx context.Context, sev Severity, code, text string) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdAddEvent{sev, code, text[:min(len(text), maxText)]})
	return err
}

// RemoveNode takes a node out of the cluster for good; its id is never used again
// and its certificate is refused from then on. It is refused (ErrRefused) while
// the node holds an in-sync copy of a volume, and for the last data node.
func (c *Cluster) RemoveNode(ctx context.Context, id replication.NodeID) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdRemoveNode{id})
	return err
}

// Token is a new join token. Only its hash is kept in the cluster.
type Token struct {
	Text    string
	Role    Role
	Expires time.Time
}

// CreateToken makes a token with which one node of a role may join, once, within
// ttl (0: TokenTTL; at most a day).
func (c *Cluster) CreateToken(ctx context.Context, role Role, ttl time.Duration) (*Token, error) {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	if ttl == 0 {
		ttl = TokenTTL
	}
	if ttl < 0 || ttl > maxTokenTTL {
		return nil, errorf(ErrInvalid, "a join token lives at most %s", maxTokenTTL)
	}
	t := newTokenParts(c.creds.Load().ca.Raw)
	expires := c.now().UTC().Add(ttl)
	if _, err := c.proposeSync(ctx, &cmdCreateToken{token{Hash: t.hash(), Role: role, Expires: expires}}); err != nil {
		return nil, err
	}
	return &Token{t.String(), role, expires}, nil
}

// FingerprintKey is the key of the cluster's fingerprints. A witness has none.
func (c *Cluster) FingerprintKey() (dedup.Key, error) { return ReadFingerprintKey(c.cfg.Dir) }
