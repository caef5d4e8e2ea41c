"""What the fetcher decides, apart from doing it: where a blob comes from, and how failures end. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

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
from shoal_common.layout import leaf_count
from shoal_common.messages.records import DownloadPhase, DownloadState, Manifest, ManifestFile, ModelState
from shoal_fetcher.errors import RateLimited, ReservationLost, WrongWhole

HUB = "hub"
"""The hub among sources."""
MIN_RELAYED_LEAVES = 2


class FromPeer(msgspec.Struct, frozen=True):
    """Take it from this node, which has all of it."""

    node: str
    sha256: str


class FromHub(msgspec.Struct, frozen=True):
    """Nobody has it and nobody is getting it: become its origin."""


class WaitFor(msgspec.Struct, frozen=True):
    """Another node is getting it from the hub: take it from there when it has it."""

    node: str


Choice = FromPeer | FromHub | WaitFor


class Holding(msgspec.Struct, frozen=True):
    """A live peer that has a blob whole; its sha256, which a manifest from the hub may not have."""

    node: str
    sha256: str


def holders(
    blob: str,
    manifest: Manifest,
    models: Iterable[ModelState],
    downloads: Iterable[DownloadState],
    reachable: Iterable[str],
    me: str,
) -> list[Holding]:
    """The live peers that have a blob of this model, by what they say of themselves."""
    live = set(reachable) - {me}
    found: dict[str, str] = {}
    for model in models:
        # A node that has the model has its blob under its sha256; one known only by git's sha1 it lists below.
        if model.node in live and model.model == manifest.model and not blob.startswith("git-"):
            found[model.node] = blob
    for download in downloads:
        if download.node not in live:
            continue
        sha256 = download.known.get(blob, blob)
        if sha256 in download.blobs:
            found[download.node] = sha256
    return [Holding(node, found[node]) for node in sorted(found)]


def choose(
    blob: str,
    found: list[Holding],
    origin: str | None,
    me: str,
    setbacks: Setbacks,
    busy: Mapping[str, int],
) -> Choice:
    """Where to take a blob from.

    A peer if one has it: one that has not failed us, the one we ask least, ties broken differently on each node so
    that the load spreads. Else whoever holds its origin lease; else the hub, under that lease (I9).
    """
    usable = setbacks.usable(found)
    if usable:

        def rank(h: Holding) -> tuple[int, int, bytes]:
            draw = hashlib.sha256(f"{me}/{h.node}/{blob}".encode()).digest()
            return (setbacks.failures_of.get(h.node, 0), busy.get(h.node, 0), draw)

        best = min(usable, key=rank)
        return FromPeer(best.node, best.sha256)
    if origin is not None and origin != me:
        return WaitFor(origin)
    return FromHub()


def sealed_root(said: Iterable[str]) -> str:
    """The root that all agree on who say one. Where two differ, neither is believed: sha256 decides."""
    roots = set(said) - {""}
    return roots.pop() if len(roots) == 1 else ""


def is_relayed(blob: str, size_bytes: int) -> bool:
    """Whether nodes pass a blob on while it arrives. Small files are taken whole, from whoever has them."""
    return not blob.startswith("git-") and leaf_count(size_bytes) >= MIN_RELAYED_LEAVES


def sealed(manifest: Manifest, known: Mapping[str, str]) -> Manifest:
    """The manifest with every sha256 that has been learned."""
    files = [
        ManifestFile(path=f.path, size_bytes=f.size_bytes, sha256=known.get(f.blob, f.sha256), git_sha1=f.git_sha1)
        for f in manifest.files  # roots of leaf lists are storage's to say
    ]
    return Manifest(repo=manifest.repo, commit=manifest.commit, files=files, revisions=manifest.revisions)


def ended_as(error: ShoalError) -> DownloadPhase:
    """How a download ends that met this error: storage's refusals are `rejected`, all else `failed`."""
    return "rejected" if isinstance(error, QuotaExceeded) else "failed"


PEER_TRIES = 5
"""A peer that fails so often in a row is passed over: about 8 s, in which a service that was killed is back."""
BAD_LEAVES = 2
"""A node that sent so many wrong leaves of a blob is not asked for it any more."""
EARLIER = ""
"""The giver of leaves that were here before: nobody knows any more who it was."""
MAX_ASKED_WAIT_S = 1800.0
"""The hub may make us wait so long in all for one blob."""


class Setbacks(msgspec.Struct):
    """What went wrong so far while one blob was fetched, and which peers are set aside for it."""

    corrupt: set[str] = msgspec.field(default_factory=set)
    """Peers that gave wrong bytes: never asked again for this blob."""
    failures_of: dict[str, int] = msgspec.field(default_factory=dict)
    """Other failures, by peer."""
    hub_failures: int = 0
    hub_was_corrupt: bool = False
    asked_wait_s: float = 0.0
    last: ShoalError | None = None
    givers: set[str] = msgspec.field(default_factory=set)
    """Whose word was taken for leaves that have arrived, before any list was sealed: nodes, `hub`, and EARLIER."""
    bad_leaves_of: dict[str, int] = msgspec.field(default_factory=dict)
    """Leaves that did not hash to what the list says, by who sent them."""
    alone: bool = False
    """Somebody's word was wrong, and nobody knows whose: nothing but the hub's, or one node's, is taken any more."""

    def usable(self, found: Iterable[Holding]) -> list[Holding]:
        """The holders that may be asked now."""
        return [h for h in self.trusted(found) if self.failures_of.get(h.node, 0) < PEER_TRIES]

    def trusted(self, found: Iterable[Holding]) -> list[Holding]:
        """The holders that may be asked now or later."""
        return [h for h in found if h.node not in self.corrupt]

    def after(self, error: ShoalError, peer: str | None, hopes: bool = False) -> float:
        """Seconds to wait before the next try; raises the error when trying again cannot help.

        `peer` is the node that failed, None for the hub. Wrong bytes set a peer aside, and cost the hub one clean
        restart. After other failures we try again: peers first, for each byte from the hub is one too many (I9);
        when the hub fails too, peers get another chance. `hopes`: a peer has the blob, so that a hub which refuses
        is not the end.
        """
        self.last = error
        if isinstance(error, ReservationLost | NodeAway | Expired | DiskFull):
            raise error  # our own storage, our own disk: no source is to blame
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
        # One of them lied. It starts again, once, and takes nobody's word but one source's.
        if self.alone:
            raise error
        self.alone = True
        self.hub_was_corrupt |= HUB in givers and EARLIER not in givers
        if not givers & self.corrupt:  # of whom it is known already, it was
            self.corrupt |= givers - {HUB, EARLIER}
        return 0.0

    def bad_leaf(self, node: str) -> bool:
        """A node sent a leaf that is not what the list says. Whether it is banned for this blob now."""
        self.bad_leaves_of[node] = self.bad_leaves_of.get(node, 0) + 1
        if self.bad_leaves_of[node] >= BAD_LEAVES:
            self.corrupt.add(node)
        return node in self.corrupt

    def may_ask(self, node: str) -> bool:
        """Whether a node may be asked for what it has of this blob."""
        return not self.alone and node not in self.corrupt and self.failures_of.get(node, 0) < PEER_TRIES


def retry_delay_s(failures: int) -> float:
    """Seconds to wait after the n-th failure in a row: 0.25, 0.5, … at most 8."""
    return float(min(0.25 * 2 ** min(max(failures - 1, 0), 10), 8.0))


MAX_BLOCKED_S = 24 * 3600.0
"""A download that a full disk has kept from getting on for so long fails (I7)."""


def in_vain_delay_s(count: int) -> float:
    """Seconds to wait before writing is tried for the n-th time after none of it became durable, though storage says
    that there is room: a quota of the file system, say. 0, 1, 2, … at most 60.
    """
    return 0.0 if count <= 0 else float(min(2 ** min(count - 1, 10), 60))


def look_again_s(count: int) -> float:
    """Seconds until storage is asked for the n-th time whether there is room, if nothing is heard before: 5, 10, … at
    most 60.
    """
    return float(min(5 * 2 ** min(max(count - 1, 0), 10), 60))
