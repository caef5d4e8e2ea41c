"""What the `spec` and `state` buckets hold, and the manifest, which is also a file on disk.

| key                                | struct        | its only writer             |
| ---------------------------------- | ------------- | --------------------------- |
| spec   download.<node>.<model>     | DownloadSpec  | that node's fetcher         |
| spec   instance.<id>               | InstanceSpec  | the placement leader        |
| state  download.<node>.<model>     | DownloadState | that node's fetcher         |
| state  storage.<node>              | StorageState  | that node's storage         |
| state  model.<node>.<model@commit> | ModelState    | that node's storage         |
| state  part.<node>.<model@commit>  | PartState     | that node's storage         |
| state  instance.<id>               | InstanceState | the placement leader        |
| state  stage.<id>.<rank>           | StageState    | the inference of its node   |
| state  links.<node>                | LinksState    | that node's placement       |
"""

from __future__ import annotations

from typing import Literal

from shoal_common.errors import ErrorBody
from shoal_common.messages import Message
from shoal_common.messages.facts import Link


class ManifestFile(Message):
    """One file of a model. A sealed manifest knows every sha256; before that a small file may have git's sha1."""

    path: str
    size_bytes: int
    sha256: str = ""
    git_sha1: str = ""
    leaves: str = ""
    """Root of its leaf list (docs/transfer.md); "" where nobody has said."""

    @property
    def blob(self) -> str:
        """What the bytes are called in the store: their sha256, or `git-<sha1>` until that is known."""
        return self.sha256 or f"git-{self.git_sha1}"


class Manifest(Message):
    """The files of a model at a commit."""

    repo: str
    commit: str
    files: list[ManifestFile]
    revisions: list[str] = []
    """Names people used for this commit: `main`, a tag."""

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
        """Bytes of each distinct blob: files that share content count once."""
        return {f.blob: f.size_bytes for f in self.files}

    @property
    def size_bytes(self) -> int:
        """Bytes of all distinct blobs."""
        return sum(self.blob_sizes.values())


class KvRule(Message):
    """What one layer's cache takes for each sequence. A layer without attention grows with nothing."""

    bytes_per_token: int = 0
    window_tokens: int = 0
    """The most tokens it keeps; 0: all of the context."""
    constant_bytes: int = 0
    """However long the sequence is: a state."""


class ModelShape(Message):
    """What placement needs to know of a model, read from its config and safetensors headers."""

    architecture: str
    layer_bytes: list[int]
    """Tensor bytes of each layer, in order."""
    embed_bytes: int
    head_bytes: int
    """Final norm and head; a head tied to the embedding counts as the embedding's bytes again."""
    kv_bytes_per_token_layer: int
    context_tokens: int
    hidden_bytes: int
    """Bytes of one token's hidden state."""
    tied: bool = False
    """Whether head and embedding are one tensor, which a stage that has both holds once."""
    kv_rules: list[KvRule] = []
    """Of each layer, in order; none from versions that took `kv_bytes_per_token_layer` for all. That is the most
    that any of them takes."""
    layer_active_bytes: list[int] = []
    """What one token reads of each layer, less than its bytes where a router chooses among experts; none: all."""
    chunk_bytes_per_token: int = 0
    """Activations of one token of a chunk, while a layer computes it."""
    context_bytes_per_token: int = 0
    """What a layer expands for one token of the context, while it computes a chunk."""
    score_bytes: int = 0
    """Attention scores of a token of the chunk with one of the context, where attention is not fused."""
    fused_score_bytes: int = 0
    """The same where it is."""
    head_dim: int = 0
    """Of the values: whether attention is fused depends on it."""
    estimated: bool = False
    """The architecture's rule is not known, or weights change their size when loaded: an upper bound."""


DownloadPhase = Literal[
    "queued", "reserving", "fetching", "verifying", "blocked", "ready", "paused", "rejected", "failed"
]
"""`blocked`: the disk is full; it goes on by itself when there is space again."""
ENDED: frozenset[DownloadPhase] = frozenset({"ready", "rejected", "failed"})


class DownloadSpec(Message):
    """Somebody wants this model on this node. Withdrawn when it is there, or is not to be."""

    model: str
    asked_at_s: float
    paused: bool = False
    """A person stopped it: it goes on when a person says so, and for no other reason."""
    commands: list[str] = []
    """Ids of the commands that wait for it, the last 64: whatever ends or stops it answers them in `done`, so that
    one that is delivered again does not begin anew what a person has taken back since."""
    layers: list[list[int]] = []
    """Only what stages with these layers, `[first, last)` each, need; empty: all of it."""


class DownloadState(Message):
    """How a download stands. `done_bytes` are durable or verified bytes, never merely received ones."""

    node: str
    model: str
    phase: DownloadPhase
    commit: str = ""
    total_bytes: int = 0
    done_bytes: int = 0
    resumed_bytes: int = 0
    """Of `done_bytes`, what was on the disk when this attempt began."""
    sources: dict[str, int] = {}
    """Bytes received, by source: a node's id, or `hub`."""
    speed_bytes_per_s: float = 0.0
    source_speeds: dict[str, float] = {}
    """Bytes per second now, by source; sources that send nothing are not here."""
    eta_s: float | None = None
    """Seconds until all has arrived at this speed; None while that cannot be told."""
    verified_bytes: int = 0
    """Of `done_bytes`, those of blobs that storage has hashed whole."""
    switched: dict[str, int] = {}
    """How often a source was left because it was silent for too long; the first 16 of them."""
    blobs: list[str] = []
    """Blobs of this model that are whole on this node: what peers may ask it for before it is ready."""
    known: dict[str, str] = {}
    """sha256 of those whole blobs that the hub names by git's sha1 only."""
    roots: dict[str, str] = {}
    """Roots of the leaf lists of those whole blobs, by sha256."""
    waiting_for: str = ""
    """What it waits for, when it does: `origin node-b`, `hub: rate limited for 12 s`."""
    error: ErrorBody | None = None
    started_at_s: float = 0.0
    updated_at_s: float = 0.0
    blocked_since_s: float = 0.0
    """Since when a full disk has kept it from getting on; 0 when none does."""
    layers: list[list[int]] = []
    """Of which layers, `[first, last)` each, it brings what is needed, and counts that; empty: all of the model."""

    @property
    def resumed_from(self) -> float:
        """The part of it, 0 to 1, that was on the disk when this attempt began."""
        return min(self.resumed_bytes / self.total_bytes, 1.0) if self.total_bytes else 0.0


class LeaseState(Message):
    """A lease on a model of a node, and who holds it."""

    id: str
    model: str
    holder: str
    """In the holder's own words."""
    since_s: float
    pid: int = 0
    """The process that holds its lock; 0 where none does yet, or the system does not say."""


class RootState(Message):
    """A read-only root: a directory whose models a node offers as they are."""

    path: str
    error: str = ""
    """Why it cannot be looked at, when it cannot."""
    model_count: int = 0
    """Models adopted from it."""
    waiting_count: int = 0
    """Models whose files have yet to be hashed."""
    waiting_bytes: int = 0
    not_adopted: dict[str, str] = {}
    """What looks like a model there and is not adopted, by its directory, and why; the first 20 of them."""
    not_adopted_count: int = 0


class FurtherRootState(Message):
    """A further root: a directory on another disk that a node's models may come to."""

    path: str
    id: str = ""
    """What its VERSION calls it; "" while it is not known."""
    error: str = ""
    """Why it is not used, when it is not: its disk is not mounted, say. What is there stays as it is."""
    used_bytes: int = 0
    """By blobs that are there; part of the node's `used_bytes`."""
    blob_count: int = 0
    free_bytes: int = 0
    headroom_bytes: int = 0
    """What stays free of them."""
    reserved_bytes: int = 0
    """Promised to blobs that are arriving there."""
    double_bytes: int = 0
    """Of blobs that are in another root too: garbage."""


class StorageState(Message):
    """A node's disk: its settings and their use."""

    node: str
    quota_bytes: int | None = None
    used_bytes: int = 0
    reserved_bytes: int = 0
    free_bytes: int = 0
    headroom_bytes: int = 0
    model_count: int = 0
    blob_count: int = 0
    eviction_policy: Literal["manual", "lru"] = "manual"
    pinned: list[str] = []
    """Models (`org/name@commit`) that are never evicted or deleted."""
    quarantined: list[str] = []
    """Blobs that did not hash to their name and were set aside."""
    leases: list[LeaseState] = []
    """Who uses models of this node through views of their own."""
    from_environment: list[str] = []
    """Settings that the environment holds, against which the file is of no use."""
    unproven_count: int = 0
    """Files that somebody put in a blob's place, not hashed yet: part of `used_bytes`, offered to nobody."""
    unproven_bytes: int = 0
    unknown_count: int = 0
    """Files in the store that are none of Shoal's, or do not hash to their name: never deleted."""
    unknown_bytes: int = 0
    unknown: list[str] = []
    """Paths of the first of them, below the store."""
    store_away: bool = False
    """Whether the store is not where it was, as when its disk was unmounted: its models are not offered."""
    partial_retention_s: int = 0
    """How long bytes of a download that nobody wants any more are kept."""
    unfinished: list[str] = []
    """Models (`org/name@commit`) of which only bytes of an ended download are here: the first to go."""
    paused: dict[str, int] = {}
    """Models (`org/name@commit`) whose download is paused, and the bytes that are kept for it: part of
    `reserved_bytes` and of `used_bytes`."""
    reserve_bytes: int = 0
    """Bytes of the reserve file: held back to be given up first when the disk is full."""
    read_only_roots: list[RootState] = []
    roots: list[FurtherRootState] = []
    """Further roots, beside the store, whose own `free_bytes` are above."""
    max_upload_bytes_per_s: int | None = None
    """What this node's fileserver sends in all; None: no limit. The same for what follows."""
    max_hub_bytes_per_s: int | None = None
    """What its fetcher takes from the hub in all."""
    max_peer_bytes_per_s: int | None = None
    """What its fetcher takes from each peer."""


class ModelState(Message):
    """A model that is whole, verified and durable on a node."""

    node: str
    repo: str
    commit: str
    size_bytes: int
    file_count: int
    revisions: list[str] = []
    shape: ModelShape | None = None
    """None when this is not a language model that Shoal can read; `shape_error` says why."""
    shape_error: str = ""
    ready_at_s: float = 0.0
    adopted_from: str = ""
    """The directory of a read-only root where it is; "" for a model of the store."""

    @property
    def model(self) -> str:
        """`org/name@commit`."""
        return f"{self.repo}@{self.commit}"


class PartState(Message):
    """A model of which a node has what stages with these layers need: verified, durable, and not the model."""

    node: str
    repo: str
    commit: str
    layers: list[list[int]]
    """`[first, last)` each, in order."""
    size_bytes: int
    """Of what is here."""
    model_bytes: int
    """Of the whole."""
    revisions: list[str] = []

    @property
    def model(self) -> str:
        """`org/name@commit`."""
        return f"{self.repo}@{self.commit}"


class StageSpec(Message):
    """Layers [first_layer, last_layer) of an instance, on one node."""

    rank: int
    node: str
    first_layer: int
    last_layer: int


class Asked(Message):
    """What people asked of a layout, as `place` has it: a later layout of the instance keeps to it."""

    min_nodes: int = 1
    max_nodes: int = 16
    nodes: list[str] = []
    without: list[str] = []
    objective: Literal["latency", "throughput", "balanced"] = "latency"
    in_flight: int = 0
    answers: int = 1
    allow_low_memory: bool = False
    force: bool = False
    layers: dict[str, int] = {}
    max_fetch_bytes: int | None = None


class InstanceSpec(Message):
    """A model placed to run. Stages are in rank order and cover every layer once."""

    id: str
    repo: str
    commit: str
    stages: list[StageSpec]
    context_tokens: int
    epoch: int = 1
    """Counts layouts: each time the instance is placed anew, its stages are others."""
    created_at_s: float = 0.0
    asked: Asked = Asked()
    tier: Literal["fits", "tight", "force"] = "fits"
    """Into which memory it was placed."""

    @property
    def model(self) -> str:
        """`org/name@commit`."""
        return f"{self.repo}@{self.commit}"


class NodeSpec(Message):
    """A node on which people want nothing to run. Written by the leader of placement."""

    node: str
    asked_at_s: float


class NodeState(Message):
    """A node that is not live, while anything else names it. Written by the leader of placement."""

    node: str
    silent_since_s: float
    """When the leader found it silent."""
    forgotten: bool = False
    """A person wants it retired at once."""


StagePhase = Literal["fetching", "loading", "linking", "ready", "failed"]


class StageState(Message):
    """How a stage stands, and where its neighbour reaches it."""

    instance: str
    rank: int
    node: str
    epoch: int
    phase: StagePhase
    address: str = ""
    """`host:port` of its activation port, once it listens."""
    links: list[Link] = []
    """All ways to that port, best first."""
    weight_bytes: int = 0
    error: ErrorBody | None = None
    uid: str = ""
    """Which incarnation of the stage's process this is."""


InstancePhase = Literal["starting", "ready", "degraded", "failed"]


class InstanceState(Message):
    """How an instance stands as a whole."""

    id: str
    repo: str
    commit: str
    phase: InstancePhase
    nodes: list[str]
    epoch: int = 1
    error: ErrorBody | None = None


class MeasuredLink(Message):
    """A node's way to a peer, as it was measured."""

    peer: str
    at_s: float
    ends: str = ""
    """Stands for the addresses that both nodes told then: once they tell others, this says nothing any more."""
    address: str = ""
    """Of the peer, which was measured."""
    kind: str = ""
    """Of the interface that carries that address, as the peer told it."""
    round_trip_s: float = 0.0
    """The least of several small exchanges, the two programs' own time in it."""
    bytes_per_s: float = 0.0
    """What came from the peer; 0: not known."""
    error: str = ""
    """Why the peer could not be reached, if it could not."""


class LinksState(Message):
    """What a node has measured of its ways to others: the last 64 of them."""

    node: str
    links: list[MeasuredLink] = []
