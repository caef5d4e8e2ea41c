"""The views of the REST API: what a gateway answers and the command line reads.

Every field is always sent. The defaults are for a reader whose gateway is older and does not send one yet.
"""

from __future__ import annotations

import msgspec

from shoal_common.errors import ErrorBody
from shoal_common.messages.downloads import DownloadPhase
from shoal_common.messages.storage import ShardState, StorageState
from shoal_common.names import ModelId


class ServiceView(msgspec.Struct, frozen=True, kw_only=True):
    """A service of a node."""

    version: str = ""
    pid: int = 0
    host: str = ""
    uptime_s: float = 0.0
    addresses: list[str] = []
    tls: bool = False
    """Whether its port speaks TLS."""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node. One that is down is known from its keys in `state`."""

    node: str
    live: bool
    down_since_s: float | None = None
    """Unix time at which a node was found to be down; it is retired when that is long ago. None while it is up."""
    drained: bool = False
    """Whether nothing may be placed on it."""
    services: dict[str, ServiceView] = {}
    missing_services: list[str] = []
    other_versions: dict[str, str] = {}
    """Its services of another major version, which the answering node ignores."""
    link: str = ""
    """The kind of link over which the answering node would reach this one's fileserver; "" where unknown."""
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    storage: StorageState | None = None


class StorageView(msgspec.Struct, frozen=True, kw_only=True):
    """A node's disk as its storage last published it; `live` is whether the storage runs now."""

    node: str
    live: bool = False
    disk_free_bytes: int | None = None
    """Free space as of the latest renewal of a live storage; `storage` has it as of the last change."""
    storage: StorageState | None = None
    shards: list[ShardState] = []
    """Models of which the node has some layers."""


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model and the nodes that hold it completely."""

    model: ModelId
    repo: str
    commit: str
    nodes: list[str] = []
    size_bytes: int = 0
    library_directory: dict[str, str] = {}
    """By node, the library directory that holds it; nodes that have it in their store are left out."""


class DownloadView(msgspec.Struct, frozen=True, kw_only=True):
    """A DownloadState without its blob list."""

    node: str
    model: str
    phase: DownloadPhase
    commit: str = ""
    total_bytes: int = 0
    done_bytes: int = 0
    resumed_bytes: int = 0
    sources: dict[str, int] = {}
    verified_bytes: int = 0
    speed_bytes_per_s: float = 0.0
    source_speeds: dict[str, float] = {}
    eta_s: float | None = None
    source_switches: dict[str, int] = {}
    waiting_for: str = ""
    error: ErrorBody | None = None
    started_at_s: float = 0.0
    updated_at_s: float = 0.0
    layers: list[list[int]] = []
    """The layers it downloads; empty: the whole model."""

    @property
    def resumed_from(self) -> float:
        """Fraction of the bytes, 0 to 1, that was on the disk when this attempt started."""
        return min(self.resumed_bytes / self.total_bytes, 1.0) if self.total_bytes else 0.0


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    """A stage: its placement and its published state. `phase` is None until its node has published one, and `down`
    while its node is down, whatever that has published."""

    rank: int
    node: str
    first_layer: int | None = None
    last_layer: int | None = None
    phase: str | None = None
    epoch: int = 0
    address: str = ""
    weight_bytes: int = 0
    error: ErrorBody | None = None
    down_since_s: float | None = None
    """Unix time at which its node was found to be down; None while it is up, or where that is not known."""


class InstanceView(msgspec.Struct, frozen=True, kw_only=True):
    """An instance with its stages."""

    id: str
    model: str = ""
    repo: str
    commit: str
    phase: str
    nodes: list[str] = []
    epoch: int = 0
    context_tokens: int = 0
    created_at_s: float = 0.0
    tier: str = "fits"
    is_low_memory: bool = False
    """Whether other programs may have to give up memory for it."""
    error: ErrorBody | None = None
    stages: list[StageView] = []


class StatusView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole status. `node` is the answering node."""

    node: str = ""
    version: str = ""
    nats_connected: bool = True
    nodes: list[NodeView] = []
    models: list[ModelView] = []
    shards: list[ShardState] = []
    """Shards, by model, then node."""
    downloads: list[DownloadView] = []
    instances: list[InstanceView] = []
