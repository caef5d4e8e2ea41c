"""What nodes that fetch the same blob tell each other: `shoal.v1.have.<node>.<blob>`, core NATS, kept nowhere."""

from __future__ import annotations

from shoal_common.messages import Message


class Have(Message):
    """What a node that is fetching a blob has of it now. The newest one says all; older ones can be lost."""

    node: str
    blob: str
    size_bytes: int
    uid: str = ""
    """The process of the fetcher, so that a restarted one is not taken for the one before."""
    leaves: bytes = b""
    """Bitmap of the leaves that are verified and can be asked for, as `ready` has it (base64 in JSON)."""
    wanted: bytes = b""
    """Bitmap of the leaves that it fetches, where those are not all; empty: all."""
    origin: bool = False
    """Whether it reads this blob from the hub, under the lease."""
    hashes_from: int = 0
    """The first leaf of `hashes`."""
    hashes: bytes = b""
    """Provisional hashes that are new since the last message, 32 bytes each: from an origin alone."""
    sealed: str = ""
    """The list's root, once the whole has hashed to its name."""
    hello: bool = False
    """It has joined just now: whoever hears this says what it has."""
    leaving: bool = False
    """It works on this blob no more."""
