"""What a failure means: retry, another source, or the end."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shoal_common.errors import (
    BadInput,
    Corrupt,
    Denied,
    DiskFull,
    Expired,
    NodeAway,
    NotFound,
    QuotaExceeded,
    Refused,
    ShoalError,
)
from shoal_common.messages.downloads import DownloadPhase
from shoal_fetcher.errors import RateLimited, ReservationLost, WrongWhole

HUB = "hub"
"""The hub, as the name of a source."""


class Holding(msgspec.Struct, frozen=True):
    """A live peer that has the complete blob, and its sha256, which a manifest from the hub may lack."""

    node: str
    sha256: str


def ended_as(error: ShoalError) -> DownloadPhase:
    """Return the phase of a download that ends with this error: `rejected` if over quota, else `failed`."""
    return "rejected" if isinstance(error, QuotaExceeded) else "failed"


PEER_TRIES = 5
"""A peer is skipped after this many failures in a row: about 8 s, in which a killed service has restarted."""
BAD_LEAVES = 2
"""A node that has sent this many corrupt leaves of a blob is banned for it."""
EARLIER = ""
"""The source of leaves that were on disk before this attempt: it is not known any more."""
MAX_ASKED_WAIT_S = 1800.0
"""Longest time in all that the hub may make us wait for one blob."""


class Setbacks(msgspec.Struct):
    """Failures while one blob is fetched, and the peers that are banned for it."""

    corrupt: set[str] = msgspec.field(default_factory=set)
    """Peers that sent corrupt bytes: never asked again for this blob."""
    failures_of: dict[str, int] = msgspec.field(default_factory=dict)
    """Other failures, by peer."""
    hub_failures: int = 0
    hub_was_corrupt: bool = False
    asked_wait_s: float = 0.0
    last: ShoalError | None = None
    givers: set[str] = msgspec.field(default_factory=set)
    """Who vouched for leaves that arrived before a list was sealed: nodes, `hub`, and UNKNOWN_SOURCE."""
    bad_leaves_of: dict[str, int] = msgspec.field(default_factory=dict)
    """Number of corrupt leaves, by sender."""
    alone: bool = False
    """Somebody vouched for corrupt leaves and it is unknown who: from now on only one source is trusted."""

    def usable(self, found: Iterable[Holding]) -> list[Holding]:
        """Return the holders that may be asked now."""
        return [h for h in self.trusted(found) if self.failures_of.get(h.node, 0) < PEER_TRIES]

    def trusted(self, found: Iterable[Holding]) -> list[Holding]:
        """Return the holders that may be asked now or later."""
        return [h for h in found if h.node not in self.corrupt]

    def after(self, error: ShoalError, peer: str | None, hopes: bool = False) -> float:
        """Return the seconds to wait before the next attempt; raises the error if a retry cannot help.

        `peer` is the node that failed, None for the hub. Corrupt bytes ban a peer, and allow the hub one clean
        restart. Other failures are retried: peers first, to keep bytes from the hub few (I9); when the hub fails too,
        peers get another chance. `has_peer`: a peer has the blob, so a refusal by the hub is not final.
        """
        self.last = error
        if isinstance(error, ReservationLost | NodeAway | Expired | DiskFull):
            raise error  # our own storage or disk: no source is to blame
        if isinstance(error, WrongWhole):
            givers, self.givers = self.givers, set()
            if len(givers) != 1 or EARLIER in givers:
                return self._after_mixed(givers, error)
            giver = givers.pop()
            peer = None if giver == HUB else giver
        if peer is not None:
            if isinstance(error, Corrupt | BadInput):
                self.corrupt.add(peer)
                return 0.0
            self.failures_of[peer] = self.failures_of.get(peer, 0) + 1
            return retry_delay_s(self.failures_of[peer])
        if isinstance(error, Corrupt):
            if self.hub_was_corrupt:
                raise error
            self.hub_was_corrupt = True
            return 0.0
        self.failures_of.clear()
        if isinstance(error, RateLimited):
            self.asked_wait_s += error.retry_after_s
            if self.asked_wait_s > MAX_ASKED_WAIT_S:
                raise error
            return error.retry_after_s
        if isinstance(error, NotFound | Denied | Refused) and not hopes:
            raise error
        self.hub_failures += 1
        return retry_delay_s(self.hub_failures)

    def _after_mixed(self, givers: set[str], error: ShoalError) -> float:
        # One of several lied. Start again, once, and trust only one source.
        if self.alone:
            raise error
        self.alone = True
        self.hub_was_corrupt |= HUB in givers and EARLIER not in givers
        if not givers & self.corrupt:  # if one of them is known to be corrupt, it is to blame
            self.corrupt |= givers - {HUB, EARLIER}
        return 0.0

    def bad_leaf(self, node: str) -> bool:
        """Count a corrupt leaf of a node. Returns whether the node is banned for this blob now."""
        self.bad_leaves_of[node] = self.bad_leaves_of.get(node, 0) + 1
        if self.bad_leaves_of[node] >= BAD_LEAVES:
            self.corrupt.add(node)
        return node in self.corrupt

    def may_ask(self, node: str) -> bool:
        """Return whether a node may be asked for its leaves of this blob."""
        return not self.alone and node not in self.corrupt and self.failures_of.get(node, 0) < PEER_TRIES


def retry_delay_s(failures: int) -> float:
    """Return the seconds to wait after the n-th failure in a row: 0.25, 0.5, … at most 8."""
    return float(min(0.25 * 2 ** min(max(failures - 1, 0), 10), 8.0))


MAX_BLOCKED_S = 24 * 3600.0
"""A download fails after a full disk has blocked it for this long (I7)."""


def in_vain_delay_s(count: int) -> float:
    """Return the seconds to wait after the n-th attempt that made nothing durable although storage reports space, as
    under a quota of the file system: 0, 1, 2, … at most 60.
    """
    return 0.0 if count <= 0 else float(min(2 ** min(count - 1, 10), 60))


def look_again_s(count: int) -> float:
    """Return the seconds until storage is asked for the n-th time for free space, if nothing changes before: 5, 10, …
    at most 60.
    """
    return float(min(5 * 2 ** min(max(count - 1, 0), 10), 60))
