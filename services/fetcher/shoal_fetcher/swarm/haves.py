"""Saying and hearing who has what of one blob that is being fetched: `Have`, core NATS, kept nowhere.

At most every 100 ms when something changed, every second when nothing did. The newest message of a node says all, so
any of them may be lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from shoal_common import subjects
from shoal_common.connection import Nats
from shoal_common.errors import BadMessage
from shoal_common.layout import LEAF_BYTES, leaf_count
from shoal_common.leaves import HASH_BYTES
from shoal_common.logs import Log
from shoal_common.messages import decode, encode
from shoal_common.messages.swarm import Have
from shoal_common.runs import bounds, from_bitmap, run, to_bitmap
from shoal_fetcher.partial import PartialBlob

log = Log("haves")

BATCH_S = 0.1
UNCHANGED_S = 1.0
SILENT_S = 3.0
"""Who was not heard for so long does not count as fetching."""
MAX_NODES = 1024
"""Nodes that are listened to for one blob."""
_HASHES_AT_ONCE = 4096
_PENDING_MESSAGES = 4096
_GROWTH_WEIGHT = 0.3


class Heard(msgspec.Struct):
    """What a node said last, and when."""

    node: str
    uid: str
    leaves: int
    wanted: int
    origin: bool
    sealed: str
    at_s: float
    grows_bytes_per_s: float = 0.0


class Haves:
    """`async with`: listens and says what this node has; at the end it says that it leaves."""

    def __init__(
        self,
        nats: Nats,
        node: str,
        uid: str,
        blob: str,
        partial: PartialBlob,
        wanted: int,
        changed: Callable[[], None],
        told: Callable[[Have], None],
    ) -> None:
        self._nats, self._node, self._uid, self._blob = nats, node, uid, blob
        self._partial, self._changed, self._told = partial, changed, told
        self._wanted = b"" if wanted == partial.all else to_bitmap(wanted, partial.leaf_count)
        self.heard: dict[str, Heard] = {}
        """Others, by node."""
        self.origin = False
        self.sealed = ""
        self._untold = 0
        self._dirty = asyncio.Event()
        self._subscription: Subscription | None = None
        self._saying: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Haves:
        with suppress(NatsError):
            self._subscription = await self._nats.client.subscribe(
                subjects.have("*", self._blob), cb=self._hear, pending_msgs_limit=_PENDING_MESSAGES
            )
        self._saying = asyncio.create_task(self._say_forever())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._saying is not None:
            self._saying.cancel()
            await asyncio.wait({self._saying})
        if self._subscription is not None:
            with suppress(NatsError):
                await self._subscription.unsubscribe()
        await self._say(leaving=True)

    def say_soon(self) -> None:
        """Something changed: it is said with the next batch."""
        self._dirty.set()

    def tell_hashes(self, leaves: int) -> None:
        """As origin: the hashes of these leaves are new."""
        self._untold |= leaves
        self._dirty.set()

    async def _say_forever(self) -> None:
        hello = True
        while True:
            self._dirty.clear()
            await self._say(hello=hello)
            hello = False
            await asyncio.sleep(BATCH_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(UNCHANGED_S - BATCH_S):
                    await self._dirty.wait()

    async def _say(self, hello: bool = False, leaving: bool = False) -> None:
        first, end = bounds(self._untold)
        end = min(end, first + _HASHES_AT_ONCE)
        have = Have(
            node=self._node,
            blob=self._blob,
            size_bytes=self._partial.size_bytes,
            uid=self._uid,
            leaves=to_bitmap(self._partial.ready, self._partial.leaf_count),
            wanted=self._wanted,
            origin=self.origin,
            hashes_from=first,
            hashes=self._partial.hashes[first * HASH_BYTES : end * HASH_BYTES] if self.origin else b"",
            sealed=self.sealed,
            hello=hello,
            leaving=leaving,
        )
        if not self._nats.connected:
            return
        with suppress(NatsError):
            await self._nats.client.publish(subjects.have(self._node, self._blob), encode(have))
            self._untold &= ~run(first, end)
            if self._untold:
                self._dirty.set()

    async def _hear(self, message: Msg) -> None:
        try:
            have = decode(message.data, Have)
        except BadMessage as e:
            return log.debug("a word that does not decode", subject=message.subject, why=e.message)
        if not self._makes_sense(have, message.subject):
            return log.debug("a word that makes no sense", subject=message.subject)
        loop_s = asyncio.get_running_loop().time()
        before = self.heard.get(have.node)
        if have.leaving:
            self.heard.pop(have.node, None)
        else:
            wanted = from_bitmap(have.wanted) if have.wanted else self._partial.all
            now = Heard(have.node, have.uid, from_bitmap(have.leaves), wanted, have.origin, have.sealed, loop_s)
            if before is not None and before.uid == now.uid and loop_s > before.at_s:
                grown = (now.leaves & ~before.leaves).bit_count() * LEAF_BYTES / (loop_s - before.at_s)
                old = before.grows_bytes_per_s
                now.grows_bytes_per_s = old + _GROWTH_WEIGHT * (grown - old) if old else grown
            self.heard[have.node] = now
        if have.hello:
            self._dirty.set()
        self._told(have)
        self._changed()

    def _makes_sense(self, have: Have, subject: str) -> bool:
        """Whether it is of this blob, of the node whose subject it came on, and within bounds (I10)."""
        count = leaf_count(self._partial.size_bytes)
        return (
            have.node != self._node
            and subject == f"{subjects.ROOT}.have.{have.node}.{self._blob}"
            and (have.blob, have.size_bytes) == (self._blob, self._partial.size_bytes)
            and len(have.leaves) <= -(-count // 8)
            and from_bitmap(have.leaves).bit_length() <= count
            and len(have.wanted) <= -(-count // 8)
            and from_bitmap(have.wanted).bit_length() <= count
            and len(have.hashes) % HASH_BYTES == 0
            and 0 <= have.hashes_from <= count - len(have.hashes) // HASH_BYTES
            and (have.node in self.heard or len(self.heard) < MAX_NODES)
        )
