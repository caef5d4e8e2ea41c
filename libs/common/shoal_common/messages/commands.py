"""Commands: what people ask for with `nats pub`, REST or the CLI; and the outcome of a command.

A command's id is its `Nats-Msg-Id` header, else its `id`, else its sequence in the stream. A repeated id does the
work once.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from shoal_common.errors import ErrorBody
from shoal_common.messages import Message


class Command(Message):
    """Fields that every command has."""

    id: str = ""
    """The command's id, unless the `Nats-Msg-Id` header holds one."""
    deadline_s: float = 0.0
    """Seconds from sending until the command ends with `expired`; 0 means the verb's default."""
    expires_at_s: float = 0.0
    """When the sender gives up (set by gateways): a service that receives it later does not run it; 0: never."""


class Download(Command):
    """`cmd.fetcher.<node>.download`: download a model to this node. Returns when the download has ended.

    Resumes a paused download, unless `unless_paused`.
    """

    model: str
    """`org/name`, with or without `@revision`."""
    layers: list[int] = []
    """`[first, last)`: only what a stage with these layers needs, if the model allows it; empty: all of it."""
    unless_paused: bool = False
    """Leave a paused download paused and end with `paused`; for services, which ask on their own."""


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


class Delete(Command):
    """`cmd.storage.<node>.delete`: delete a model from this node. Deleting an absent model succeeds."""

    model: str
    """`org/name@revision`, or `org/name` for all its revisions."""


class Configure(Command):
    """`cmd.storage.<node>.configure`: change this node's storage settings now and in its file.

    Fields left out keep their value.
    """

    max_storage_bytes: int | msgspec.UnsetType | None = msgspec.UNSET
    """Quota of the store; null removes it."""
    eviction_policy: Literal["manual", "lru"] | msgspec.UnsetType = msgspec.UNSET
    """Whether models are evicted to make space: never, or least recently used first."""
    headroom_bytes: int | msgspec.UnsetType = msgspec.UNSET
    """Bytes of the disk that Shoal leaves free."""
    partial_retention_s: int | msgspec.UnsetType = msgspec.UNSET
    """How long to keep bytes of abandoned downloads; 0 deletes them at once."""
    read_only_roots: list[str] | msgspec.UnsetType = msgspec.UNSET
    """All libraries (read-only model directories), absolute or with `~`; an empty list removes them."""
    roots: list[str] | msgspec.UnsetType = msgspec.UNSET
    """All volumes besides the store's own, absolute or with `~`; an empty list removes them, their files stay."""
    max_upload_bytes_per_s: int | msgspec.UnsetType | None = msgspec.UNSET
    """Rate limit of the fileserver, in total; null means unlimited."""
    max_hub_bytes_per_s: int | msgspec.UnsetType | None = msgspec.UNSET
    """Rate limit of downloads from the hub, in total; null means unlimited."""
    max_peer_bytes_per_s: int | msgspec.UnsetType | None = msgspec.UNSET
    """Rate limit of downloads from each peer; null means unlimited."""


class Pin(Command):
    """`cmd.storage.<node>.pin`: protect a model of this node from eviction and deletion."""

    model: str
    """`org/name@revision`, or `org/name` for all its revisions."""
    pinned: bool = True
    """False unpins the model."""


class CollectGarbage(Command):
    """`cmd.storage.<node>.gc`: delete blobs that nothing refers to."""


class Verify(Command):
    """`cmd.storage.<node>.verify`: hash a model's blobs again and quarantine the corrupt ones."""

    model: str = ""
    """`org/name`, with or without `@revision`; "" means all models of this node."""


class Place(Command):
    """`cmd.placement.any.place`: place a model in the memory of one or more nodes and start it."""

    model: str
    """`org/name`, with or without `@revision`."""
    min_nodes: int = 1
    """Minimum number of nodes."""
    max_nodes: int = 16
    """Maximum number of nodes."""
    nodes: list[str] = []
    """Use only these nodes; empty means any live node."""
    context_tokens: int = 0
    """Context length to reserve KV cache for; 0 means the model's own limit, at most 4096."""
    without: list[str] = []
    """Do not use these nodes."""
    objective: Literal["latency", "throughput", "balanced"] = "latency"
    """Optimize for one answer at a time, for `in_flight` at once, or for as many as there are stages."""
    in_flight: int = 0
    """Concurrent answers that `throughput` optimizes for; 0 means 4."""
    answers: int = 1
    """Answers of full context length to reserve KV cache for; more answers than that share it, at least 8 at once."""
    allow_low_memory: bool = False
    """Allow the tier `tight`: other programs would have to give up memory."""
    force: bool = False
    """Allow the tier `force`: no reserve is left for the system."""
    layers: dict[str, int] = {}
    """Exact number of layers on these nodes."""
    max_fetch_bytes: int | None = None
    """Maximum bytes that all nodes together may download; null means no limit."""
    layout: str = ""
    """Use exactly this layout, written as a preview writes it: nodes in order with their layer counts, `a:14,b:2`."""


class Unplace(Command):
    """`cmd.placement.any.unplace`: stop an instance."""

    instance: str
    """The instance's id."""


class Rebalance(Command):
    """`cmd.placement.any.rebalance`: move an instance to a better layout. It does not answer meanwhile."""

    instance: str
    """The instance's id."""
    layout: str = ""
    """The layout, as a proposal writes it; "" means the best one now."""


class Forget(Command):
    """`cmd.placement.any.forget`: retire a node that is down: remove every key that names it, now."""

    node: str
    """The node; it must not be live."""


class Drain(Command):
    """`cmd.placement.any.drain`: place nothing more on a node and move its instances away."""

    node: str
    """The node; it must be live."""
    drained: bool = True
    """False lets the node take instances again."""


class Outcome(Message):
    """How a command ended; also the reply to `nats req`.

    `done` key `<command id>`, published by the service that ran it, or by a gateway that gave up on it.
    """

    id: str
    """The command's id."""
    ok: bool
    """Whether the command succeeded."""
    node: str = ""
    """The node that ran the command."""
    service: str = ""
    """The service that ran the command."""
    verb: str = ""
    """The command's verb."""
    result: dict[str, Any] = {}
    """The command's result, if it succeeded."""
    error: ErrorBody | None = None
    """Why it failed, if it failed."""
    ended_at_s: float = 0.0
    """When the command ended."""
