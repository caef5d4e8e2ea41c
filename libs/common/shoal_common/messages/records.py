"""Values of the `spec` and `state` buckets, and the manifest, which is also a file on disk.

| bucket | key                          | struct               | published by             |
| ------ | ---------------------------- | -------------------- | ------------------------ |
| spec   | download.<node>.<model>      | DownloadRequest      | that node's fetcher      |
| spec   | instance.<id>                | InstanceSpec         | placement's leader       |
| spec   | node.<node>                  | NodeSpec             | placement's leader       |
| state  | download.<node>.<model>      | DownloadState        | that node's fetcher      |
| state  | storage.<node>               | StorageState         | that node's storage      |
| state  | model.<node>.<model@commit>  | ModelState           | that node's storage      |
| state  | part.<node>.<model@commit>   | ShardState           | that node's storage      |
| state  | instance.<id>                | InstanceState        | placement's leader       |
| state  | stage.<id>.<rank>            | StageState           | inference of its node    |
| state  | node.<node>                  | NodeState            | placement's leader       |
| state  | links.<node>                 | LinksState           | that node's placement    |
"""

from __future__ import annotations

from typing import Literal

from shoal_common.errors import ErrorBody
from shoal_common.messages import Message
from shoal_common.messages.facts import Link


class ManifestFile(Message):
    """One file of a model. A sealed manifest has every sha256; before that a small file may have only a sha1."""

    path: str
    """Path below the model's directory."""
    size_bytes: int
    """Size of the file."""
    sha256: str = ""
    """sha256 of the file; "" while unknown."""
    git_sha1: str = ""
    """git's sha1 of the file, as the hub lists small files; "" if it lists none."""
    leaves: str = ""
    """Leaf list digest of the file (docs/transfer.md); "" if unknown."""

    @property
    def blob(self) -> str:
        """Name of the blob in the store: the sha256, or `git-<sha1>` while that is unknown."""
        return self.sha256 or f"git-{self.git_sha1}"


class Manifest(Message):
    """The files of a model at a commit."""

    repo: str
    """`org/name`."""
    commit: str
    """Commit id of the hub's repository."""
    files: list[ManifestFile]
    """All files."""
    revisions: list[str] = []
    """Revisions that people used for this commit: `main`, a tag."""

    @property
    def model(self) -> str:
        """`org/name@commit`: the one name that never changes its meaning."""
        return f"{self.repo}@{self.commit}"

    @property
    def sealed(self) -> bool:
        """Whether every file's sha256 is known."""
        return all(f.sha256 for f in self.files)

    @property
    def blob_sizes(self) -> dict[str, int]:
        """Size of each distinct blob: files with the same content count once."""
        return {f.blob: f.size_bytes for f in self.files}

    @property
    def size_bytes(self) -> int:
        """Size of all distinct blobs."""
        return sum(self.blob_sizes.values())


class KvRule(Message):
    """Size of one layer's KV cache for one sequence. All zero for a layer without a cache."""

    bytes_per_token: int = 0
    """Bytes per token of context."""
    window_tokens: int = 0
    """Maximum number of tokens that the layer keeps; 0 means the whole context."""
    constant_bytes: int = 0
    """Bytes that do not depend on the sequence's length: a recurrent state."""


class ModelShape(Message):
    """What placement has to know about a model, read from its config and safetensors headers."""

    architecture: str
    """`model_type` of the model's config."""
    layer_bytes: list[int]
    """Tensor bytes of each layer, in order."""
    embed_bytes: int
    """Bytes of the embedding."""
    head_bytes: int
    """Bytes of the final norm and the head; a head tied to the embedding counts the embedding's bytes again."""
    kv_bytes_per_token_layer: int
    """KV cache bytes per token of the layer that needs most; `kv_rules` has each layer."""
    context_tokens: int
    """Maximum context length of the model."""
    hidden_bytes: int
    """Bytes of one token's hidden state."""
    tied: bool = False
    """Whether head and embedding are one tensor, which a stage with both holds once."""
    kv_rules: list[KvRule] = []
    """KV cache size of each layer, in order; empty from versions that apply `kv_bytes_per_token_layer` to all."""
    layer_active_bytes: list[int] = []
    """Bytes of each layer that one token reads: fewer than `layer_bytes` in a mixture of experts; empty: all."""
    chunk_bytes_per_token: int = 0
    """Activation bytes per token of a prefill chunk while a layer computes it."""
    context_bytes_per_token: int = 0
    """Bytes that a layer expands per token of context while it computes a chunk."""
    score_bytes: int = 0
    """Bytes of attention scores per token of the chunk and token of the context, where attention is not fused."""
    fused_score_bytes: int = 0
    """The same where attention is fused."""
    head_dim: int = 0
    """Dimension of the value heads, on which it depends whether attention is fused."""
    estimated: bool = False
    """The figures are an upper bound: the architecture is unknown, or loading changes the weights' size."""


DownloadPhase = Literal[
    "queued", "reserving", "fetching", "verifying", "blocked", "ready", "paused", "rejected", "failed"
]
"""`blocked`: the disk is full; the download continues by itself once there is space."""
ENDED: frozenset[DownloadPhase] = frozenset({"ready", "rejected", "failed"})


class DownloadSpec(Message):
    """A request that a model be on a node, removed when the download ends.

    `spec` key `download.<node>.<model>`, published by that node's fetcher.
    """

    model: str
    """The model as requested: `org/name`, or `org/name@revision`."""
    asked_at_s: float
    """When the download was requested."""
    paused: bool = False
    """A person paused the download; it continues only when a person says so."""
    commands: list[str] = []
    """Ids of the last 64 commands waiting for it; their outcome goes to `done`, so that a redelivery runs nothing."""
    layers: list[list[int]] = []
    """Layer ranges `[first, last)`: only what stages with these layers need; empty means the whole model."""


class DownloadState(Message):
    """Progress of a download. `state` key `download.<node>.<model>`, published by that node's fetcher."""

    node: str
    """The node that downloads."""
    model: str
    """The model as requested: `org/name`, or `org/name@revision`."""
    phase: DownloadPhase
    """Current phase."""
    commit: str = ""
    """The commit that the revision resolved to; "" until it is resolved."""
    total_bytes: int = 0
    """Size of all that has to be on the disk at the end."""
    done_bytes: int = 0
    """Durable or verified bytes, never merely received ones."""
    resumed_bytes: int = 0
    """Of `done_bytes`, those that were on the disk when this attempt started."""
    sources: dict[str, int] = {}
    """Bytes received from each source: a node's id, or `hub`."""
    speed_bytes_per_s: float = 0.0
    """Current rate of all sources together."""
    source_speeds: dict[str, float] = {}
    """Current bytes per second of each source; sources that send nothing are absent."""
    eta_s: float | None = None
    """Seconds until all has arrived at this rate; null if unknown."""
    verified_bytes: int = 0
    """Of `done_bytes`, those of blobs that storage has verified."""
    switched: dict[str, int] = {}
    """How often each source was dropped because it was silent for too long; at most 16 sources."""
    blobs: list[str] = []
    """Complete blobs of this model on this node, which peers may request before the model is ready."""
    known: dict[str, str] = {}
    """sha256 of those complete blobs that the hub lists by git's sha1 only, by blob name."""
    roots: dict[str, str] = {}
    """Leaf list digests of those complete blobs, by sha256."""
    waiting_for: str = ""
    """What the download waits for, if it does: `origin node-b`, `hub: rate limited for 12 s`."""
    error: ErrorBody | None = None
    """Why the download was rejected, failed or is blocked."""
    started_at_s: float = 0.0
    """When this attempt started."""
    updated_at_s: float = 0.0
    """When this state was published."""
    blocked_since_s: float = 0.0
    """Since when a full disk has blocked it; 0 if none does."""
    layers: list[list[int]] = []
    """Layer ranges `[first, last)` that it downloads and that the figures count; empty means the whole model."""

    @property
    def resumed_from(self) -> float:
        """Fraction of the bytes, 0 to 1, that was on the disk when this attempt started."""
        return min(self.resumed_bytes / self.total_bytes, 1.0) if self.total_bytes else 0.0


class LeaseState(Message):
    """A lease on a model of a node."""

    id: str
    """The lease's id."""
    model: str
    """`org/name@commit`."""
    holder: str
    """Who holds it, in the holder's words."""
    since_s: float
    """When it was granted."""
    pid: int = 0
    """The process that holds its lock; 0 if none does yet or the system does not say."""


class RootState(Message):
    """A library: a read-only directory whose models a node offers in place."""

    path: str
    """The directory."""
    error: str = ""
    """Why it cannot be scanned; "" if it can."""
    model_count: int = 0
    """Models offered from it."""
    waiting_count: int = 0
    """Models whose files are not hashed yet."""
    waiting_bytes: int = 0
    """Size of those models."""
    not_adopted: dict[str, str] = {}
    """Directories that look like a model and are not offered, with the reason; at most 20."""
    not_adopted_count: int = 0
    """Number of all such directories."""


class FurtherRootState(Message):
    """A volume: a directory on another disk that holds blobs of this node's models."""

    path: str
    """The directory."""
    id: str = ""
    """Id in its VERSION file; "" while unknown."""
    error: str = ""
    """Why it is not used, such as a disk that is not mounted; its files stay as they are. "" if it is used."""
    used_bytes: int = 0
    """Size of the blobs on it; included in the node's `used_bytes`."""
    blob_count: int = 0
    """Number of blobs on it."""
    free_bytes: int = 0
    """Free space of its disk."""
    headroom_bytes: int = 0
    """Part of the free space that Shoal leaves free."""
    reserved_bytes: int = 0
    """Space reserved for blobs that are arriving on it."""
    double_bytes: int = 0
    """Size of blobs that another volume holds too; garbage."""


class StorageState(Message):
    """Settings and use of a node's disk. `state` key `storage.<node>`, published by that node's storage."""

    node: str
    """The node."""
    quota_bytes: int | None = None
    """Quota of the store; null if there is none."""
    used_bytes: int = 0
    """Size of all blobs, of the leaves of shards, and of unverified files."""
    reserved_bytes: int = 0
    """Bytes reserved for downloads that have not arrived yet."""
    free_bytes: int = 0
    """Free space of the store's disk."""
    headroom_bytes: int = 0
    """Part of the free space that Shoal leaves free."""
    model_count: int = 0
    """Complete models in the store."""
    blob_count: int = 0
    """Blobs in the store."""
    eviction_policy: Literal["manual", "lru"] = "manual"
    """Whether models are evicted to make space: never, or least recently used first."""
    pinned: list[str] = []
    """Models (`org/name@commit`) that are never evicted or deleted."""
    quarantined: list[str] = []
    """Corrupt blobs that were set aside."""
    leases: list[LeaseState] = []
    """Leases on models of this node."""
    from_environment: list[str] = []
    """Settings that environment variables override; changing them in the file has no effect."""
    unproven_count: int = 0
    """Files that somebody put in a blob's place and that are not verified yet; offered to nobody."""
    unproven_bytes: int = 0
    """Size of those files; included in `used_bytes`."""
    unknown_count: int = 0
    """Foreign files in the store: not Shoal's, or not what their name says; never deleted."""
    unknown_bytes: int = 0
    """Size of the foreign files."""
    unknown: list[str] = []
    """Paths of the first foreign files, below the store."""
    store_away: bool = False
    """Whether the store is missing, for example unmounted; its models are not offered then."""
    partial_retention_s: int = 0
    """How long bytes of abandoned downloads are kept."""
    unfinished: list[str] = []
    """Models (`org/name@commit`) of which only an ended download's bytes are left; evicted first."""
    paused: dict[str, int] = {}
    """Bytes kept for paused downloads, by `org/name@commit`; included in `reserved_bytes` and `used_bytes`."""
    reserve_bytes: int = 0
    """Size of the ballast file, which is deleted first when the disk is full."""
    read_only_roots: list[RootState] = []
    """Libraries of this node."""
    roots: list[FurtherRootState] = []
    """Volumes besides the store's own, each with its own `free_bytes`."""
    max_upload_bytes_per_s: int | None = None
    """Rate limit of the fileserver, in total; null means unlimited."""
    max_hub_bytes_per_s: int | None = None
    """Rate limit of downloads from the hub, in total; null means unlimited."""
    max_peer_bytes_per_s: int | None = None
    """Rate limit of downloads from each peer; null means unlimited."""


class ModelState(Message):
    """A model that is complete, verified and durable on a node.

    `state` key `model.<node>.<model@commit>`, published by that node's storage.
    """

    node: str
    """The node that holds the model."""
    repo: str
    """`org/name`."""
    commit: str
    """Commit id of the hub's repository."""
    size_bytes: int
    """Size of all distinct blobs."""
    file_count: int
    """Number of files."""
    revisions: list[str] = []
    """Revisions that people used for this commit."""
    shape: ModelShape | None = None
    """The model's shape; null if it is not a language model that Shoal can read."""
    shape_error: str = ""
    """Why there is no shape."""
    ready_at_s: float = 0.0
    """When the model became complete."""
    adopted_from: str = ""
    """Its directory in a library; "" for a model of the store."""

    @property
    def model(self) -> str:
        """`org/name@commit`."""
        return f"{self.repo}@{self.commit}"


class PartState(Message):
    """A shard: what stages with some layers need of a model, verified and durable on a node that lacks the rest.

    `state` key `part.<node>.<model@commit>`, published by that node's storage.
    """

    node: str
    """The node that holds the shard."""
    repo: str
    """`org/name`."""
    commit: str
    """Commit id of the hub's repository."""
    layers: list[list[int]]
    """Layer ranges `[first, last)`, in order."""
    size_bytes: int
    """Bytes of the shard."""
    model_bytes: int
    """Bytes of the whole model."""
    revisions: list[str] = []
    """Revisions that people used for this commit."""

    @property
    def model(self) -> str:
        """`org/name@commit`."""
        return f"{self.repo}@{self.commit}"


class StageSpec(Message):
    """The layers of an instance that run on one node."""

    rank: int
    """Position in the pipeline, from 0."""
    node: str
    """The node that runs the stage."""
    first_layer: int
    """First layer."""
    last_layer: int
    """The layer after the last one."""


class Asked(Message):
    """What people asked of a layout, with the fields of `place`; later layouts of the instance respect it."""

    min_nodes: int = 1
    """Minimum number of nodes."""
    max_nodes: int = 16
    """Maximum number of nodes."""
    nodes: list[str] = []
    """Use only these nodes; empty means any."""
    without: list[str] = []
    """Do not use these nodes."""
    objective: Literal["latency", "throughput", "balanced"] = "latency"
    """What the layout is optimized for."""
    in_flight: int = 0
    """Concurrent answers that `throughput` optimizes for; 0 means 4."""
    answers: int = 1
    """Answers of full context length to reserve KV cache for."""
    allow_low_memory: bool = False
    """Allow the tier `tight`."""
    force: bool = False
    """Allow the tier `force`."""
    layers: dict[str, int] = {}
    """Exact number of layers on these nodes."""
    max_fetch_bytes: int | None = None
    """Maximum bytes that all nodes together may download; null means no limit."""


class InstanceSpec(Message):
    """A placed model. Its stages are in rank order and cover every layer once.

    `spec` key `instance.<id>`, published by placement's leader.
    """

    id: str
    """The instance's id."""
    repo: str
    """`org/name`."""
    commit: str
    """Commit id of the hub's repository."""
    stages: list[StageSpec]
    """The stages in rank order."""
    context_tokens: int
    """Context length that KV cache is reserved for."""
    epoch: int = 1
    """Number of the layout: every new layout of the instance counts up."""
    created_at_s: float = 0.0
    """When the instance was placed."""
    asked: Asked = Asked()
    """What people asked of the layout."""
    tier: Literal["fits", "tight", "force"] = "fits"
    """Memory tier that the layout needed."""

    @property
    def model(self) -> str:
        """`org/name@commit`."""
        return f"{self.repo}@{self.commit}"


class NodeSpec(Message):
    """A drained node: placement puts nothing on it. `spec` key `node.<node>`, published by placement's leader."""

    node: str
    """The drained node."""
    asked_at_s: float
    """When the drain was requested."""


class NodeState(Message):
    """A node that is down and that other keys name. `state` key `node.<node>`, published by placement's leader."""

    node: str
    """The node."""
    silent_since_s: float
    """When the leader found it down."""
    forgotten: bool = False
    """A person asked to retire it at once."""


StagePhase = Literal["fetching", "loading", "linking", "ready", "failed"]


class StageState(Message):
    """State of a stage, and its address for its neighbour.

    `state` key `stage.<id>.<rank>`, published by inference of its node.
    """

    instance: str
    """The instance's id."""
    rank: int
    """Position in the pipeline, from 0."""
    node: str
    """The node that runs the stage."""
    epoch: int
    """The layout that the stage belongs to."""
    phase: StagePhase
    """Current phase."""
    address: str = ""
    """`host:port` of its activation port, once it listens."""
    links: list[Link] = []
    """All addresses of that port, best first."""
    weight_bytes: int = 0
    """Bytes of its layers' tensors, once they are loaded."""
    error: ErrorBody | None = None
    """Why the stage failed."""
    uid: str = ""
    """Random id of this incarnation of the stage's process."""


InstancePhase = Literal["starting", "ready", "degraded", "failed"]


class InstanceState(Message):
    """State of an instance as a whole. `state` key `instance.<id>`, published by placement's leader."""

    id: str
    """The instance's id."""
    repo: str
    """`org/name`."""
    commit: str
    """Commit id of the hub's repository."""
    phase: InstancePhase
    """Current phase."""
    nodes: list[str]
    """Nodes that run its stages, in rank order."""
    epoch: int = 1
    """Number of the current layout."""
    error: ErrorBody | None = None
    """Why it is degraded or failed."""


class MeasuredLink(Message):
    """A measurement of the network from a node to a peer."""

    peer: str
    """The peer's node id."""
    at_s: float
    """When it was measured."""
    ends: str = ""
    """Fingerprint of both nodes' addresses at the time: the measurement is void once they publish others."""
    address: str = ""
    """The peer's address that was measured."""
    kind: str = ""
    """Kind of the interface that carries the address, as the peer published it."""
    round_trip_s: float = 0.0
    """Shortest of several small exchanges, including both programs' own time."""
    bytes_per_s: float = 0.0
    """Rate of receiving from the peer; 0 if unknown."""
    error: str = ""
    """Why the peer could not be reached; "" if it was."""


class LinksState(Message):
    """A node's last 64 link measurements. `state` key `links.<node>`, published by that node's placement."""

    node: str
    """The node that measured."""
    links: list[MeasuredLink] = []
    """The measurements."""
