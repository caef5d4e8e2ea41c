"""What a failure means: retry, another source, or the end."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shoal_common.concurrency.backoff import Backoff
from shoal_common.errors import (
    BadInput,
    Corrupt,
    Denied,
    DiskFull,
    Expired,
    NodeDown,
    NotFound,
    Refused,
    ShoalError,
)
from shoal_fetcher.errors import BlobHashMismatch, RateLimited, ReservationLost

HUB = "hub"
"""The hub, as the name of a source."""


class BlobHolder(msgspec.Struct, frozen=True):
    """A live peer that has the complete blob, and its sha256, which a manifest from the hub may lack."""

    node: str
    sha256: str


MAX_PEER_FAILURES = 5
"""A peer is skipped after this many failures in a row: about 8 s, in which a killed service has restarted."""
MAX_CORRUPT_LEAVES = 2
"""A node that has sent this many corrupt leaves of a blob is banned for it."""
UNKNOWN_SOURCE = ""
"""The source of leaves that were on disk before this attempt: it is not known any more."""
MAX_RATE_LIMITED_S = 1800.0
"""Longest time in all that the hub may make us wait for one blob."""


class SourceHealth(msgspec.Struct):
    """Failures while one blob is fetched, and the peers that are banned for it."""

    banned: set[str] = msgspec.field(default_factory=set)
    """Peers that sent corrupt bytes: never asked again for this blob."""
    failure_counts: dict[str, int] = msgspec.field(default_factory=dict)
    """Other failures, by peer."""
    hub_failures: int = 0
    hub_was_corrupt: bool = False
    rate_limited_s: float = 0.0
    last_error: ShoalError | None = None
    trusted_sources: set[str] = msgspec.field(default_factory=set)
    """Whose leaves were trusted before a list was sealed: nodes, `hub`, and UNKNOWN_SOURCE."""
    corrupt_leaf_counts: dict[str, int] = msgspec.field(default_factory=dict)
    """Number of corrupt leaves, by sender."""
    trusts_one_source: bool = False
    """A trusted source sent corrupt leaves and it is unknown which: from now on only one source is trusted."""

    def askable(self, holders: Iterable[BlobHolder]) -> list[BlobHolder]:
        """Return the holders that may be asked now."""
        return [h for h in self.not_banned(holders) if self.failure_counts.get(h.node, 0) < MAX_PEER_FAILURES]

    def not_banned(self, holders: Iterable[BlobHolder]) -> list[BlobHolder]:
        """Return the holders that may be asked now or later."""
        return [h for h in holders if h.node not in self.banned]

    def record_failure(self, error: ShoalError, peer: str | None, has_peer: bool = False) -> float:
        """Return the seconds to wait before the next attempt; raises the error if a retry cannot help.

        `peer` is the node that failed, None for the hub. Corrupt bytes ban a peer, and allow the hub one clean
        restart. Other failures are retried: peers first, to keep bytes from the hub few (I9); when the hub fails too,
        peers get another chance. `has_peer`: a peer has the blob, so a refusal by the hub is not final.
        """
        self.last_error = error
        if isinstance(error, ReservationLost | NodeDown | Expired | DiskFull):
            raise error  # our own storage or disk: no source is to blame
        if isinstance(error, BlobHashMismatch):
            sources, self.trusted_sources = self.trusted_sources, set()
            if len(sources) != 1 or UNKNOWN_SOURCE in sources:
                return self._after_mixed(sources, error)
            source = sources.pop()
            peer = None if source == HUB else source
        if peer is not None:
            if isinstance(error, Corrupt | BadInput):
                self.banned.add(peer)
                return 0.0
            self.failure_counts[peer] = self.failure_counts.get(peer, 0) + 1
            return RETRY_BACKOFF.delay_s(self.failure_counts[peer])
        if isinstance(error, Corrupt):
            if self.hub_was_corrupt:
                raise type(error)(f"{error.message}; tried twice, and not again", **error.details)
            self.hub_was_corrupt = True
            return 0.0
        self.failure_counts.clear()
        if isinstance(error, RateLimited):
            self.rate_limited_s += error.retry_after_s
            if self.rate_limited_s > MAX_RATE_LIMITED_S:
                raise error
            return error.retry_after_s
        if isinstance(error, NotFound | Denied | Refused) and not has_peer:
            raise error
        self.hub_failures += 1
        return RETRY_BACKOFF.delay_s(self.hub_failures)

    def _after_mixed(self, sources: set[str], error: ShoalError) -> float:
        # One of several lied. Start again, once, and trust only one source.
        if self.trusts_one_source:
            raise error
        self.trusts_one_source = True
        self.hub_was_corrupt |= HUB in sources and UNKNOWN_SOURCE not in sources
        if not sources & self.banned:  # if one of them is known to be corrupt, it is to blame
            self.banned |= sources - {HUB, UNKNOWN_SOURCE}
        return 0.0

    def record_corrupt_leaf(self, node: str) -> bool:
        """Count a corrupt leaf of a node. Returns whether the node is banned for this blob now."""
        self.corrupt_leaf_counts[node] = self.corrupt_leaf_counts.get(node, 0) + 1
        if self.corrupt_leaf_counts[node] >= MAX_CORRUPT_LEAVES:
            self.banned.add(node)
        return node in self.banned

    def may_ask(self, node: str) -> bool:
        """Return whether a node may be asked for its leaves of this blob."""
        return (
            not self.trusts_one_source
            and node not in self.banned
            and self.failure_counts.get(node, 0) < MAX_PEER_FAILURES
        )


RETRY_BACKOFF = Backoff(0.25, 8.0)
"""After failures in a row of a source."""


def waiting_text(error: ShoalError) -> str:
    """Return what is published while a failed source is tried again."""
    return error.message if isinstance(error, RateLimited) else f"{error.message}; trying again"
