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
	SizeBytes  uint64 // multiple of 4096, up to MaxVolumeBytes
	BlockBytes uint32 // logical block, 512 or 4096; 0 is 512
	// PhysicalBytes is the physical block, 512 or 4096 and not below BlockBytes; 0 is 4096.
	PhysicalBytes uint32
	Thick         bool     // UNMAP and provisioning are not offered to hosts
	Hosts         []string // names of hosts that see it
	AnyHost       bool     // every initiator sees it
	NoDedup       bool
	NoCompress    bool
	MirroredRAM   bool // write policy: see replication.Record
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
		Dedup: !spec.NoDedup, Compress: !spec.NoCompress, Thin: !spec.Thick, AnyHost: spec.AnyHost, Hosts: spec.Hosts,
		PhysicalBytes: spec.PhysicalBytes, MirroredRAM: spec.MirroredRAM,
	}
	if x.BlockBytes == 0 {
		x.BlockBytes = 512
	}
	if x.PhysicalBytes == 0 {
		x.PhysicalBytes = defaultPhysicalBytes
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
// With snapshots its snapshots go with it; without, it is refused while it has some.
func (c *Cluster) DeleteVolume(ctx context.Context, id lsfs.VolumeID, snapshots bool) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdDeleteVolume{id, snapshots})
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

// MapVolume lets hosts see a volume in addition to those that do; with readOnly
// their writes are refused. A host that sees it already changes its mode.
func (c *Cluster) MapVolume(ctx context.Context, id lsfs.VolumeID, hosts []string, readOnly bool) (*Volume, error) {
	as := mapReadWrite
	if readOnly {
		as = mapReadOnly
	}
	return c.mapVolume(ctx, id, hosts, as)
}

// UnmapVolume takes a volume away from hosts; one that does not see it is no error.
func (c *Cluster) UnmapVolume(ctx context.Context, id lsfs.VolumeID, hosts []string) (*Volume, error) {
	return c.mapVolume(ctx, id, hosts, mapNone)
}

func (c *Cluster) mapVolume(ctx context.Context, id lsfs.VolumeID, hosts []string, as mapping) (*Volume, error) {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	if _, err := c.proposeSync(ctx, &cmdMapVolume{id, hosts, as}); err != nil {
		return nil, err
	}
	return c.volume(id)
}

// DrainNode records that volumes and initiators leave a node, or with drain false
// that they may come back. It is refused (ErrRefused) while a volume in sync there
// has no other in-sync copy on a node that stays.
func (c *Cluster) DrainNode(ctx context.Context, id replication.NodeID, drain bool) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdDrainNode{id, drain})
	return err
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
	if err := c.checkReuse(spec.Secret, spec.MutualSecret); err != nil {
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

// checkReuse refuses a target's secret that is an initiator's secret: of the same
// pair, of a host, or of discovery.
func (c *Cluster) checkReuse(secret, mutual string) error {
	same := func(a, b string) bool { return a != "" && subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
	reused := same(secret, mutual)
	against := func(initiators, targets string, err error) error {
		reused = reused || same(secret, targets) || same(mutual, initiators)
		return err
	}
	state := c.State()
	if err := against(c.DiscoverySecrets(&state.Discovery)); err != nil {
		return err
	}
	for _, h := range state.Hosts {
		if err := against(c.Secrets(h)); err != nil {
			return err
		}
	}
	if reused {
		return errorf(ErrInvalid, "the target's secret must differ from the secret of every initiator")
	}
	return nil
}

// DiscoverySpec says how initiators prove themselves for discovery. The secrets
// are in the clear; they are sealed before they leave this node.
type DiscoverySpec struct {
	Mode         DiscoveryMode
	User         string // DiscoveryCHAP only, as all that follows
	Secret       string
	MutualUser   string // empty: the target does not prove itself
	MutualSecret string
}

// SetDiscovery sets how initiators prove themselves for discovery. The rules for
// secrets are those of AddHost. A witness cannot (ErrRefused).
func (c *Cluster) SetDiscovery(ctx context.Context, spec DiscoverySpec) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	if c.seal == nil {
		return errorf(ErrRefused, "%s is a witness: set this through a data node", c.id.Name)
	}
	d := Discovery{Mode: spec.Mode, User: spec.User, MutualUser: spec.MutualUser}
	if spec.Mode == DiscoveryCHAP {
		if err := checkSecret("the discovery secret", spec.Secret); err != nil {
			return err
		}
		d.Secret = c.seal.seal(purposeDiscovery(false), []byte(spec.Secret))
	} else if spec.Secret != "" {
		return errorf(ErrInvalid, "only discovery by CHAP takes users and secrets")
	}
	if spec.MutualSecret != "" {
		if err := checkSecret("the mutual discovery secret", spec.MutualSecret); err != nil {
			return err
		}
		d.MutualSecret = c.seal.seal(purposeDiscovery(true), []byte(spec.MutualSecret))
	}
	if err := c.checkReuse(spec.Secret, spec.MutualSecret); err != nil {
		return err
	}
	_, err := c.proposeSync(ctx, &cmdDiscovery{d})
	return err
}

// DiscoverySecrets opens the secrets of discovery; what it does not have is empty.
// A witness cannot (ErrRefused).
func (c *Cluster) DiscoverySecrets(d *Discovery) (secret, mutual string, err error) {
	if c.seal == nil {
		return "", "", errorf(ErrRefused, "%s is a witness and cannot open secrets", c.id.Name)
	}
	if secret, err = c.openSecret(purposeDiscovery(false), d.Secret); err == nil {
		mutual, err = c.openSecret(purposeDiscovery(true), d.MutualSecret)
	}
	return secret, mutual, err
}

func (c *Cluster) openSecret(purpose string, s Sealed) (string, error) {
	if len(s) == 0 {
		return "", nil
	}
	b, err := c.seal.open(purpose, s)
	return string(b), err
}

// Secrets opens the CHAP secrets of a host; what it does not have is empty. A
// witness cannot (ErrRefused).
func (c *Cluster) Secrets(h *Host) (secret, mutual string, err error) {
	if c.seal == nil {
		return "", "", errorf(ErrRefused, "%s is a witness and cannot open secrets", c.id.Name)
	}
	if secret, err = c.openSecret(purposeCHAP(h.Name, false), h.Secret); err == nil {
		mutual, err = c.openSecret(purposeCHAP(h.Name, true), h.MutualSecret)
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
