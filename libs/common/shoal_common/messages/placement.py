"""Placement's contract: commands, previews, links."""

from __future__ import annotations

from typing import Literal

from shoal_common.messages import WireStruct
from shoal_common.messages.envelope import Command
from shoal_common.names import ModelId


class NodeSpec(WireStruct):
    """A drained node: placement puts nothing on it. `spec` key `node.<node>`, published by placement's leader."""

    node: str
    """The drained node."""
    requested_at_s: float
    """When the drain was requested."""


class NodeState(WireStruct):
    """A node that is down and that other keys name. `state` key `node.<node>`, published by placement's leader."""

    node: str
    """The node."""
    down_since_s: float
    """When the leader found it down."""
    forget_requested: bool = False
    """A person asked to retire it at once."""


class MeasuredLink(WireStruct):
    """A measurement of the network from a node to a peer."""

    peer: str
    """The peer's node id."""
    measured_at_s: float
    """When it was measured."""
    addresses_fingerprint: str = ""
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


class LinksState(WireStruct):
    """A node's last 64 link measurements. `state` key `links.<node>`, published by that node's placement."""

    node: str
    """The node that measured."""
    links: list[MeasuredLink] = []
    """The measurements."""


class PreviewStage(WireStruct):
    """What a stage would need on its node, and what the node has."""

    node: str
    """The node."""
    first_layer: int
    """First layer."""
    last_layer: int
    """The layer after the last one."""
    needed_bytes: int
    """Memory that the stage needs."""
    available_bytes: int
    """Memory that is free for one more stage: the tier `fits`."""
    tight_bytes: int
    """Memory that is free once other programs give up some: the tier `tight`."""
    total_bytes: int
    """Memory of the node."""
    bytes_to_free: int
    """Memory that other programs have to free until the stage fits; 0 if it fits."""
    link_s: float = 0.0
    """Time to pass a token's hidden state to the next stage, from the last one to the first; 0 for a single stage."""
    link_measured: bool = False
    """Whether `link_s` was measured, not estimated from the kind of link."""


class Preview(WireStruct):
    """A possible layout."""

    layout: str
    """The layout as `place` takes it: `a:14,b:2`."""
    tier: Literal["fits", "tight", "force"]
    """Memory tier that it needs."""
    is_low_memory: bool
    """Whether other programs would have to give up memory; `place` has to allow that."""
    stages: list[PreviewStage]
    """The stages in rank order."""
    tokens_per_s: float
    """Predicted rate of all answers together, from the nodes' memory bandwidth."""
    first_token_s: float
    """Predicted time to the first token of a short prompt: one pass through all stages. Long prompts add prefill."""
    fetch_bytes: int
    """Bytes that all nodes together would download."""


class Previews(WireStruct):
    """Possible layouts of a model. The first is what `place` would choose, if the request allows its tier."""

    model: ModelId
    """`org/name@commit`."""
    context_tokens: int
    """Context length that the layouts reserve KV cache for."""
    estimated: bool
    """The model's architecture is unknown: its memory need is an upper bound."""
    previews: list[Preview]
    """The layouts, best first."""


class ListFits(WireStruct):
    """`svc.placement.<node>.fits`: which models that nodes hold could be placed now."""

    context_tokens: int = 0
    """Context length, as in `place`."""


class FittingModel(WireStruct):
    """A model, and its best layout."""

    model: ModelId
    """`org/name@commit`."""
    size_bytes: int
    """Size of the model."""
    tier: Literal["fits", "tight", "force", ""] = ""
    """Memory tier that the model needs; "" if it does not fit at all."""
    preview: Preview | None = None
    """Its best layout; null if there is none."""
    reason: str = ""
    """Why it cannot be placed."""


class FittingModels(WireStruct):
    """Models by tier, those that fit first; within a tier the larger first."""

    models: list[FittingModel]
    """The models."""


class ListRebalances(WireStruct):
    """`svc.placement.<node>.rebalances`: which instances would run better in another layout."""


class RebalanceProposal(WireStruct):
    """An instance's layout, and a better one. Nothing moves by itself."""

    instance: str
    """The instance's id."""
    model: ModelId
    """`org/name@commit`."""
    current: Preview
    """The current layout."""
    proposed: Preview
    """The proposed layout; its `fetch_bytes` is what the move would download."""
    gain: float
    """Cost of the current layout over the proposed one's, by the objective that was asked for.

    Less than 1 if a slower layout leaves other programs their memory.
    """


class Rebalances(WireStruct):
    """Proposed moves, largest gain first."""

    rebalances: list[RebalanceProposal]
    """The proposals."""


class MeasureLinks(WireStruct):
    """`svc.placement.<node>.links`: measure the links to these peers, unless they were measured within the hour."""

    peers: list[str]
    """Node ids, 16 at most."""


class PlaceCommand(Command):
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
    excluded_nodes: list[str] = []
    """Do not use these nodes."""
    objective: Literal["latency", "throughput", "balanced"] = "latency"
    """Optimize for one answer at a time, for `in_flight` at once, or for as many as there are stages."""
    in_flight: int = 0
    """Concurrent answers that `throughput` optimizes for; 0 means 4."""
    max_parallel_answers: int = 1
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


class MembersState(WireStruct):
    """The nodes that have joined. `state` key `members.placement`, published by placement's leader."""

    lost_since_s: dict[str, float] = {}
    """By node: when the leader found it lost; 0 while it is live."""

    @property
    def down_since_s(self) -> dict[str, float]:
        """The nodes that are lost, with since when."""
        return {node: since_s for node, since_s in self.lost_since_s.items() if since_s > 0}
