"""Gossip between nodes that fetch the same blob."""

from __future__ import annotations

from shoal_common.messages import WireStruct


class HaveMessage(WireStruct):
    """Leaves of a blob that a fetching node has now. The newest message is complete; older ones may be lost.

    Subject `shoal.v1.have.<node>.<blob>` (core NATS, not stored), published by that node's fetcher.
    """

    node: str
    """The fetching node."""
    blob: str
    """The blob's sha256, or `git-<sha1>` while the sha256 is unknown."""
    size_bytes: int
    """Size of the whole blob."""
    uid: str = ""
    """The fetcher's process; tells a restarted fetcher from the earlier one."""
    available_leaves: bytes = b""
    """Bitmap of the verified leaves that peers can request, in the relay bitmap's format."""
    wanted_leaves: bytes = b""
    """Bitmap of the leaves that the node fetches; empty means all."""
    origin: bool = False
    """Whether the node reads this blob from the hub, under the origin lease."""
    first_hash_leaf: int = 0
    """Index of the first leaf in `hashes`."""
    hashes: bytes = b""
    """Provisional leaf hashes that are new since the last message, 32 bytes each; only an origin sends them."""
    leaf_list_digest: str = ""
    """Leaf list digest, once the whole blob has been verified."""
    hello: bool = False
    """The node has just joined: receivers answer with their own message."""
    leaving: bool = False
    """The node no longer works on this blob."""
