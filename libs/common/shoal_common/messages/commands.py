"""Commands: what people ask for, typed by hand (`nats pub`), by REST or by the CLI; and how one ended.

A command's id comes from the `Nats-Msg-Id` header, else from `id`, else from its place in the stream. The same
id twice does the work once.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from shoal_common.errors import ErrorBody
from shoal_common.messages import Message


class Command(Message):
    """Base of every command."""

    id: str = ""
    deadline_s: float = 0.0
    """Seconds from sending until the command ends with `expired`; 0 takes the verb's own default."""
    expires_at_s: float = 0.0
    """When its sender has given it up, in seconds since 1970: whoever gets it later does not do it. 0: not said."""


class Download(Command):
    """`shoal.v1.cmd.fetcher.<node>.download`: bring a model to this node. Ends when it is ready or is not to be.

    A person who pulls what is paused resumes it.
    """

    model: str
    layers: list[int] = []
    """`[first, last)`: only what a stage with these layers needs, where it can be had so; empty: all of it."""
    unless_paused: bool = False
    """A download that is paused stays so, and this ends with `paused`: for services, which ask by themselves."""


class CancelDownload(Command):
    """`shoal.v1.cmd.fetcher.<node>.cancel`: withdraw a download that is under way; its partial bytes go too."""

    model: str


class PauseDownload(Command):
    """`shoal.v1.cmd.fetcher.<node>.pause`: stop a download (all of this node: "") and keep its bytes and its room.

    Nothing but `resume`, or pulling it again, lets it go on.
    """

    model: str = ""


class ResumeDownload(Command):
    """`shoal.v1.cmd.fetcher.<node>.resume`: let a paused download (all of this node: "") go on."""

    model: str = ""


class Delete(Command):
    """`shoal.v1.cmd.storage.<node>.delete`: remove a model from this node. Deleting what is absent succeeds."""

    model: str


class Configure(Command):
    """`shoal.v1.cmd.storage.<node>.configure`: change this node's storage settings, in its file and at once.

    A field left out stays as it is.
    """

    max_storage_bytes: int | msgspec.UnsetType | None = msgspec.UNSET
    """Null takes the quota away."""
    eviction_policy: Literal["manual", "lru"] | msgspec.UnsetType = msgspec.UNSET
    headroom_bytes: int | msgspec.UnsetType = msgspec.UNSET
    partial_retention_s: int | msgspec.UnsetType = msgspec.UNSET
    """How long to keep bytes of a download that nobody wants any more; 0: not at all."""
    read_only_roots: list[str] | msgspec.UnsetType = msgspec.UNSET
    """All of them, absolute or with `~`; an empty list takes them away."""
    roots: list[str] | msgspec.UnsetType = msgspec.UNSET
    """All further roots, absolute or with `~`; an empty list takes them away. Their files stay as they are."""
    max_upload_bytes_per_s: int | msgspec.UnsetType | None = msgspec.UNSET
    """What the node's fileserver sends in all. Null takes the limit away; the same for what follows."""
    max_hub_bytes_per_s: int | msgspec.UnsetType | None = msgspec.UNSET
    """What its fetcher takes from the hub in all."""
    max_peer_bytes_per_s: int | msgspec.UnsetType | None = msgspec.UNSET
    """What its fetcher takes from each peer."""


class Pin(Command):
    """`shoal.v1.cmd.storage.<node>.pin`: never evict or delete this model of this node; `pinned` false ends that."""

    model: str
    pinned: bool = True


class CollectGarbage(Command):
    """`shoal.v1.cmd.storage.<node>.gc`: remove what nothing refers to. The outcome reports it."""


class Verify(Command):
    """`shoal.v1.cmd.storage.<node>.verify`: hash a model's blobs (of all models: "") again; set bad ones aside."""

    model: str = ""


class Place(Command):
    """`shoal.v1.cmd.placement.any.place`: lay a model out over the nodes' memory and start it."""

    model: str
    min_nodes: int = 1
    max_nodes: int = 16
    nodes: list[str] = []
    """Only these nodes; empty means any live one."""
    context_tokens: int = 0
    """Tokens of context to keep room for; 0 means the model's own limit, at most 4096."""
    without: list[str] = []
    """Not these nodes."""
    objective: Literal["latency", "throughput", "balanced"] = "latency"
    """What the layout is best at: one answer at a time, `in_flight` at once, or as many as it has stages."""
    in_flight: int = 0
    """For `throughput`: answers at once; 0 means 4."""
    answers: int = 1
    """Room for so many at once, each as long as the context; more than that share it, 8 at least."""
    allow_low_memory: bool = False
    """Also where other programs would have to give memory back (tier `tight`)."""
    force: bool = False
    """Also without a reserve for the system (tier `force`)."""
    layers: dict[str, int] = {}
    """These nodes take exactly so many layers."""
    max_fetch_bytes: int | None = None
    """The most that all nodes together may have to download."""
    layout: str = ""
    """Exactly these nodes with so many layers each, in this order, as a preview names them: `a:14,b:2`."""


class Unplace(Command):
    """`shoal.v1.cmd.placement.any.unplace`: stop an instance."""

    instance: str


class Rebalance(Command):
    """Move an instance to a better layout. It does not answer meanwhile."""

    instance: str
    layout: str = ""
    """As a proposal names it; "" for the best that there is now."""


class Forget(Command):
    """Retire a node that is not live: remove every key that names it, now."""

    node: str


class Drain(Command):
    """Place nothing on a node any more and move what runs there; `drained=false` takes that back."""

    node: str
    drained: bool = True


class Outcome(Message):
    """How a command ended: the reply to `nats req`, and the value of `done` at the command's id."""

    id: str
    ok: bool
    node: str = ""
    service: str = ""
    verb: str = ""
    result: dict[str, Any] = {}
    error: ErrorBody | None = None
    ended_at_s: float = 0.0
