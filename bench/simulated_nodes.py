"""Nodes, links and transfers of the swarm simulator."""

from __future__ import annotations

from collections import Counter, deque

import msgspec

from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_set import enclosing_range, leaf_range
from shoal_fetcher.swarm.scheduler import (
    LeafRequest,
)

LEAF_CHUNKS = 4


CHUNK_BYTES = LEAF_BYTES // LEAF_CHUNKS


WINDOW_CHUNKS = 2


AVERAGED = 0.3
"""Weight of the newest value in a moving average."""


class Link(msgspec.Struct, frozen=True):
    """Rates of a node's link in bytes per second, and when the node is present."""

    up: float = 25e6
    down: float = 25e6
    joins_s: float = 0.0
    dies_s: float | None = None
    sticks_s: float | None = None
    """From then on it accepts requests and publishes what it has, but sends nothing."""


class Outcome(msgspec.Struct, frozen=True):
    """Result of a run."""

    finished_s: dict[str, float]
    """When each living fetcher had everything."""
    unfinished: list[str]
    """Living fetchers that do not have everything."""
    sent_bytes: dict[str, float]
    asked_count: int
    leaves_sent_count: int
    """Interrupted transfers count whole."""


class View(msgspec.Struct):
    """What a node knows about another one."""

    leaves: int = 0
    source: bool = False
    fetching: bool = False
    received_s: float = 0.0
    rate_bytes_per_s: float = 0.0
    run_s: float = 0.0
    grows_bytes_per_s: float = 0.0
    declined_at_s: float = float("-inf")
    aside_until_s: float = 0.0
    failures: int = 0


class Transfer:
    """A transfer of leaves from one node to another."""

    __slots__ = (
        "arrived_chunks",
        "asked_at_s",
        "asker",
        "end",
        "first",
        "flying_chunks",
        "giver",
        "max_leaves",
        "may",
        "moved_s",
        "over",
        "unsent_chunks",
    )

    def __init__(self, asker: Node, giver: Node, ask: LeafRequest, now_s: float) -> None:
        self.asker, self.giver = asker, giver
        self.may, self.max_leaves = (ask.leaves if ask.any else 0), ask.max_leaves
        self.first, self.end = (0, 0) if ask.any else enclosing_range(ask.leaves)
        self.asked_at_s = self.moved_s = now_s
        self.unsent_chunks = self.flying_chunks = self.arrived_chunks = 0
        self.over = False

    @property
    def leaves(self) -> int:
        """Leaves that have not arrived."""
        return leaf_range(self.first + self.arrived_chunks // LEAF_CHUNKS, self.end)


class Node:
    """A node: what it has, whom it knows, what it sends and receives."""

    def __init__(self, name: str, link: Link, leaf_count: int, source: bool) -> None:
        self.name, self.link, self.source = name, link, source
        self.have = leaf_range(0, leaf_count) if source else 0
        self.views: dict[str, View] = {}
        self.neighbours: list[Node] = []
        self.runs: list[Transfer] = []
        self.sent = [leaf_range(0, leaf_count)]
        self.kept_back: Counter[int] = Counter()
        self.queue: deque[Transfer] = deque()
        self.giving: set[Transfer] = set()
        self.sending = self.there = self.stuck = self.deciding = False
        self.down_free_s = self.sent_bytes = 0.0
        self.published = 0
        self.moved_s = link.joins_s
        self.finished_s: float | None = None
        self.wakes_s = float("inf")


def averaged(before: float, new: float) -> float:
    """Return a moving average after another value; the first value is the average."""
    return before + AVERAGED * (new - before) if before else new
