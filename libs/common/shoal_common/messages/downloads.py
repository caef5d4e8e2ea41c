"""The fetcher's contract: download commands, requests and state."""

from __future__ import annotations

from typing import Literal

from shoal_common.errors import ErrorBody
from shoal_common.messages import WireStruct
from shoal_common.messages.envelope import Command
from shoal_common.messages.manifest import LeafListSeal

DownloadPhase = Literal[
    "queued", "reserving", "fetching", "verifying", "blocked", "ready", "paused", "rejected", "failed"
]
"""`blocked`: the disk is full; the download continues by itself once there is space."""
ENDED_PHASES: frozenset[DownloadPhase] = frozenset({"ready", "rejected", "failed"})


class DownloadRequest(WireStruct):
    """A request that a model be on a node, removed when the download ends.

    `spec` key `download.<node>.<model>`, published by that node's fetcher.
    """

    model: str
    """The model as requested: `org/name`, or `org/name@revision`."""
    requested_at_s: float
    """When the download was requested."""
    paused: bool = False
    """A person paused the download; it continues only when a person says so."""
    commands: list[str] = []
    """Ids of the last 64 commands waiting for it; their outcome goes to `done`, so that a redelivery runs nothing."""
    layers: list[list[int]] = []
    """Layer ranges `[first, last)`: only what stages with these layers need; empty means the whole model."""
    force: bool = False
    """Also a model in a format that cannot run here."""


class DownloadState(WireStruct):
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
    source_switches: dict[str, int] = {}
    """How often each source was dropped because it was silent for too long; at most 16 sources."""
    blobs: list[str] = []
    """Complete blobs of this model on this node, which peers may request before the model is ready."""
    sha256_by_git_name: dict[str, str] = {}
    """sha256 of those complete blobs that the hub lists by git's sha1 only, by blob name."""
    leaf_list_digests: dict[str, str] = {}
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
    denied_by_hub: bool = False
    """The hub refuses the model to this node, which waits for another one that may read it there."""


class StopDownloads(WireStruct):
    """`svc.fetcher.<node>.stop_downloads`: drop the download requests for these models; answered once they have
    stopped."""

    repo: str
    """`org/name`."""
    revision: str = ""
    """Only this revision; "" means all of the repository."""


class DownloadCommand(Command):
    """`cmd.fetcher.<node>.download`: download a model to this node. Returns when the download has ended.

    Resumes a paused download, unless `keep_paused`.
    """

    model: str
    """`org/name`, with or without `@revision`."""
    layers: list[int] = []
    """`[first, last)`: only what a stage with these layers needs, if the model allows it; empty: all of it."""
    keep_paused: bool = False
    """Leave a paused download paused and end with `paused`; for services, which ask on their own."""
    force: bool = False
    """Download also a model in a format that cannot run here; else such a model ends with `unsupported`."""


class CancelDownload(Command):
    """`cmd.fetcher.<node>.cancel`: cancel a running download and delete its partial blobs."""

    model: str
    """`org/name`, with or without `@revision`."""


class PauseDownload(Command):
    """`cmd.fetcher.<node>.pause`: pause a download; its bytes and its reservation are kept.

    Only `resume` or another `download` by a person continues it.
    """

    model: str = ""
    """`org/name`, with or without `@revision`; "" means all downloads of this node."""


class ResumeDownload(Command):
    """`cmd.fetcher.<node>.resume`: continue a paused download."""

    model: str = ""
    """`org/name`, with or without `@revision`; "" means all downloads of this node."""


class HaveMessage(WireStruct):
    """Leaves of a blob that a fetching node has now. The newest message is complete; older ones may be lost.

    Subject `shoal.v1.have.<node>.<blob>` (core NATS, not stored), published by that node's fetcher.
    """

    node: str
    """The fetching node."""
    blob: str
    """The blob's sha256, or `git-<sha1>` while the sha256 is unknown."""
    size_bytes: int
    """Size of the whole blob."""
    uid: str = ""
    """The fetcher's process; tells a restarted fetcher from the earlier one."""
    available_leaves: bytes = b""
    """Bitmap of the verified leaves that peers can request, in the relay bitmap's format."""
    wanted_leaves: bytes = b""
    """Bitmap of the leaves that the node fetches; empty means all."""
    origin: bool = False
    """Whether the node reads this blob from the hub, under the origin lease."""
    first_hash_leaf: int = 0
    """Index of the first leaf in `hashes`."""
    hashes: bytes = b""
    """Provisional leaf hashes that are new since the last message, 32 bytes each; only an origin sends them."""
    leaf_list_digest: str = ""
    """Leaf list digest, once the whole blob has been verified."""
    seal: LeafListSeal | None = None
    """Seal of that leaf list, if the node has one."""
    hello: bool = False
    """The node has just joined: receivers answer with their own message."""
    leaving: bool = False
    """The node no longer works on this blob."""
