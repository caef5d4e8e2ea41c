"""The gateway's answers, as far as commands read them; named as in the gateway. Unknown fields are ignored."""

from __future__ import annotations

from typing import Any

from shoal_common.messages import WireStruct
from shoal_common.messages.views import DownloadView, InstanceView, StorageView
from shoal_common.settings.node import StorageSettings


class RebalancedInstanceView(InstanceView, frozen=True, kw_only=True):
    """POST /v1/instances/{id}/rebalance."""

    moved: bool = False


class DownloadsView(WireStruct):
    """GET and POST /v1/downloads. `commands`: the ids of those just sent, by node."""

    downloads: list[DownloadView] = []
    commands: dict[str, str] = {}


class InstancesView(WireStruct):
    """GET /v1/instances."""

    instances: list[InstanceView] = []


class StorageListView(WireStruct):
    """GET /v1/storage."""

    node: str = ""
    nodes: list[StorageView] = []


class SettingsView(StorageSettings, frozen=True, kw_only=True):
    """A node's settings after PUT /v1/storage/config."""

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
    incomplete: list[str] = []


JsonObject = dict[str, Any]
"""An answer that is printed as it came."""
