"""What the gateway answers, as far as the commands here use it. Unknown fields are ignored."""

from __future__ import annotations

from typing import Any

from shoal_common.errors import ErrorBody
from shoal_common.messages import Message
from shoal_common.messages.records import DownloadState, PartState, StorageState


class ServiceRow(Message):
    """A service of a node."""

    version: str = ""
    pid: int = 0
    host: str = ""
    uptime_s: float = 0.0
    addresses: list[str] = []


class NodeRow(Message):
    """A node."""

    node: str
    live: bool
    silent_since_s: float | None = None
    drained: bool = False
    services: dict[str, ServiceRow] = {}
    missing_services: list[str] = []
    other_versions: dict[str, str] = {}
    link: str = ""
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    storage: StorageState | None = None


class ModelRow(Message):
    """A model and the nodes that hold all of it."""

    model: str
    repo: str
    commit: str
    nodes: list[str] = []
    size_bytes: int = 0
    adopted_from: dict[str, str] = {}


class StageRow(Message):
    """A stage of an instance."""

    rank: int
    node: str
    first_layer: int | None = None
    last_layer: int | None = None
    phase: str | None = None
    error: ErrorBody | None = None


class InstanceRow(Message):
    """A model placed to run."""

    id: str
    repo: str
    commit: str
    phase: str
    nodes: list[str] = []
    stages: list[StageRow] = []
    tier: str = "fits"
    error: ErrorBody | None = None


class MovedRow(InstanceRow):
    """POST /v1/instances/{id}/rebalance."""

    moved: bool = False


class StatusAnswer(Message):
    """GET /v1/status."""

    node: str = ""
    version: str = ""
    nats_connected: bool = True
    nodes: list[NodeRow] = []
    models: list[ModelRow] = []
    parts: list[PartState] = []
    downloads: list[DownloadState] = []
    instances: list[InstanceRow] = []


class DownloadsAnswer(Message):
    """GET and POST /v1/downloads. `commands` are those just sent, by node."""

    downloads: list[DownloadState] = []
    commands: dict[str, str] = {}


class InstancesAnswer(Message):
    """GET /v1/instances."""

    instances: list[InstanceRow] = []


class DiskRow(Message):
    """A node's disk."""

    node: str
    live: bool = False
    disk_free_bytes: int | None = None
    storage: StorageState | None = None
    parts: list[PartState] = []


class DisksAnswer(Message):
    """GET /v1/storage."""

    node: str = ""
    nodes: list[DiskRow] = []


class ConfiguredRow(Message):
    """What a node's settings are after PUT /v1/storage/config."""

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


class ControlledRow(Message):
    """What POST /v1/downloads/pause, resume or cancel has done on a node."""

    models: dict[str, str] = {}
    """Of pause and resume: what each download is now."""
    cancelled: bool = False
    was: str = ""


class PinnedRow(Message):
    """What POST /v1/storage/pins has done on a node."""

    models: list[str] = []


class CollectedRow(Message):
    """What POST /v1/storage/gc has done on a node."""

    freed_bytes: int = 0
    blobs: int = 0


class VerifiedRow(Message):
    """What POST /v1/storage/verify has found on a node."""

    checked: int = 0
    checked_bytes: int = 0
    corrupt: list[str] = []
    bad_leaves: int = 0
    missing: list[str] = []
    models: list[str] = []
    instances: list[str] = []
    broken: list[str] = []


Anything = dict[str, Any]
"""An answer that is shown as it came."""
