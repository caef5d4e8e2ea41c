"""The gateway's answers, as far as commands read them; named as in the gateway. Unknown fields are ignored."""

from __future__ import annotations

from typing import Any

from shoal_common.errors import ErrorBody
from shoal_common.messages import WireStruct
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.storage import ShardState, StorageState


class ServiceView(WireStruct):
    """A service of a node."""

    version: str = ""
    pid: int = 0
    host: str = ""
    uptime_s: float = 0.0
    addresses: list[str] = []


class NodeView(WireStruct):
    """A node."""

    node: str
    live: bool
    silent_since_s: float | None = None
    drained: bool = False
    services: dict[str, ServiceView] = {}
    missing_services: list[str] = []
    other_versions: dict[str, str] = {}
    link: str = ""
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    storage: StorageState | None = None


class ModelView(WireStruct):
    """A model and the nodes that hold it completely."""

    model: str
    repo: str
    commit: str
    nodes: list[str] = []
    size_bytes: int = 0
    adopted_from: dict[str, str] = {}


class StageView(WireStruct):
    """A stage of an instance."""

    rank: int
    node: str
    first_layer: int | None = None
    last_layer: int | None = None
    phase: str | None = None
    error: ErrorBody | None = None


class InstanceView(WireStruct):
    """A model placed to run."""

    id: str
    repo: str
    commit: str
    phase: str
    nodes: list[str] = []
    stages: list[StageView] = []
    tier: str = "fits"
    error: ErrorBody | None = None


class RebalancedInstanceView(InstanceView):
    """POST /v1/instances/{id}/rebalance."""

    moved: bool = False


class StatusView(WireStruct):
    """GET /v1/status."""

    node: str = ""
    version: str = ""
    nats_connected: bool = True
    nodes: list[NodeView] = []
    models: list[ModelView] = []
    parts: list[ShardState] = []
    downloads: list[DownloadState] = []
    instances: list[InstanceView] = []


class DownloadsView(WireStruct):
    """GET and POST /v1/downloads. `commands`: the ids of those just sent, by node."""

    downloads: list[DownloadState] = []
    commands: dict[str, str] = {}


class InstancesView(WireStruct):
    """GET /v1/instances."""

    instances: list[InstanceView] = []


class StorageView(WireStruct):
    """A node's disk."""

    node: str
    live: bool = False
    disk_free_bytes: int | None = None
    storage: StorageState | None = None
    parts: list[ShardState] = []


class StorageListView(WireStruct):
    """GET /v1/storage."""

    node: str = ""
    nodes: list[StorageView] = []


class SettingsView(WireStruct):
    """A node's settings after PUT /v1/storage/config."""

    max_storage_bytes: int | None = None
    eviction_policy: str = ""
    headroom_bytes: int = 0
    partial_retention_s: int = 0
    read_only_roots: list[str] = []
    max_upload_bytes_per_s: int | None = None
    max_hub_bytes_per_s: int | None = None
    max_peer_bytes_per_s: int | None = None
    roots: list[str] = []
    note: str = ""


class DownloadControlView(WireStruct):
    """The result of POST /v1/downloads/pause, resume or cancel on a node."""

    models: dict[str, str] = {}
    """Of pause and resume: the state of each download now."""
    cancelled: bool = False
    was: str = ""


class PinView(WireStruct):
    """The result of POST /v1/storage/pins on a node."""

    models: list[str] = []


class GarbageView(WireStruct):
    """The result of POST /v1/storage/gc on a node."""

    freed_bytes: int = 0
    blobs: int = 0


class VerifyView(WireStruct):
    """The result of POST /v1/storage/verify on a node."""

    checked: int = 0
    checked_bytes: int = 0
    corrupt: list[str] = []
    bad_leaves: int = 0
    missing: list[str] = []
    models: list[str] = []
    instances: list[str] = []
    broken: list[str] = []


JsonObject = dict[str, Any]
"""An answer that is printed as it came."""
