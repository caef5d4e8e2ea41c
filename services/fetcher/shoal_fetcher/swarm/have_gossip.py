"""Gossip of which node has which leaves of a blob being fetched: `HaveMessage` over core NATS, stored nowhere.

At most every 100 ms when something changed, else every second. A node's newest message has all its leaves, so any
message may be lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from shoal_common.bus import subjects
from shoal_common.errors import BadMessage
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode, encode
from shoal_common.messages.downloads import HaveMessage
from shoal_common.messages.manifest import LeafListSeal
from shoal_common.store.bitmap import LEAF_BYTES, leaf_count
from shoal_common.store.leaf_hash import HASH_BYTES
from shoal_common.store.leaf_set import enclosing_range, from_bitmap, leaf_range, to_bitmap
from shoal_fetcher.swarm.context import BlobFetchContext
from shoal_fetcher.swarm.scheduler import running_average

log = StructuredLogger("have_gossip")

BATCH_INTERVAL_S = 0.1
UNCHANGED_INTERVAL_S = 1.0
PEER_SILENCE_TIMEOUT_S = 3.0
"""A node not heard for this long does not count as fetching."""
MAX_NODES = 1024
"""Nodes whose messages are kept for one blob."""
_MAX_HASHES = 4096
_PENDING_MESSAGES = 4096


class PeerHave(msgspec.Struct):
    """The last message of a node, and when it came."""

    node: str
    uid: str
    leaves: int
    wanted: int
    origin: bool
    sealed: str
    seal: LeafListSeal | None
    at_s: float
    growth_bytes_per_s: float = 0.0


class HaveGossip:
    """Publishes this node's leaves and collects the others'. Leaving `async with` publishes that this node leaves."""

    def __init__(self, fetch: BlobFetchContext, on_message: Callable[[HaveMessage], None]) -> None:
        self._nats, self._node, self._uid = fetch.node_context.nats, fetch.node_context.node, fetch.node_context.uid
        self._blob, self._partial, self._changed = fetch.blob, fetch.partial, fetch.notify
        self._on_message = on_message
        is_all = fetch.wanted == fetch.partial.all_leaves
        self._wanted = b"" if is_all else to_bitmap(fetch.wanted, fetch.partial.leaf_count)
        self.by_node: dict[str, PeerHave] = {}
        """Other nodes' last messages, by node."""
        self.origin = False
        self.sealed = ""
        self.seal: LeafListSeal | None = None
        self._new_hashes = 0
        self._dirty = asyncio.Event()
        self._subscription: Subscription | None = None
        self._publish_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> HaveGossip:
        with suppress(NatsError):
            self._subscription = await self._nats.client.subscribe(
                subjects.have("*", self._blob), cb=self._receive, pending_msgs_limit=_PENDING_MESSAGES
            )
        self._publish_task = asyncio.create_task(self._publish_forever())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._publish_task is not None:
            self._publish_task.cancel()
            await asyncio.wait({self._publish_task})
        if self._subscription is not None:
            with suppress(NatsError):
                await self._subscription.unsubscribe()
        await self._publish(leaving=True)

    def publish_soon(self) -> None:
        """Publish a change with the next batch."""
        self._dirty.set()

    def publish_hashes(self, leaves: int) -> None:
        """Publish the hashes of these leaves, as the origin."""
        self._new_hashes |= leaves
        self._dirty.set()

    async def _publish_forever(self) -> None:
        hello = True
        while True:
            self._dirty.clear()
            await self._publish(hello=hello)
            hello = False
            await asyncio.sleep(BATCH_INTERVAL_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(UNCHANGED_INTERVAL_S - BATCH_INTERVAL_S):
                    await self._dirty.wait()

    async def _publish(self, hello: bool = False, leaving: bool = False) -> None:
        first, end = enclosing_range(self._new_hashes)
        end = min(end, first + _MAX_HASHES)
        have = HaveMessage(
            node=self._node,
            blob=self._blob,
            size_bytes=self._partial.size_bytes,
            uid=self._uid,
            available_leaves=to_bitmap(self._partial.relayable, self._partial.leaf_count),
            wanted_leaves=self._wanted,
            origin=self.origin,
            first_hash_leaf=first,
            hashes=self._partial.leaf_list[first * HASH_BYTES : end * HASH_BYTES] if self.origin else b"",
            leaf_list_digest=self.sealed,
            seal=self.seal,
            hello=hello,
            leaving=leaving,
        )
        if not self._nats.connected:
            return
        with suppress(NatsError):
            await self._nats.client.publish(subjects.have(self._node, self._blob), encode(have))
            self._new_hashes &= ~leaf_range(first, end)
            if self._new_hashes:
                self._dirty.set()

    async def _receive(self, message: Msg) -> None:
        try:
            have = decode(message.data, HaveMessage)
        except BadMessage as e:
            return log.debug("undecodable have message", subject=message.subject, reason=e.message)
        if not self._is_valid(have, message.subject):
            return log.debug("invalid have message", subject=message.subject)
        now_s = asyncio.get_running_loop().time()
        before = self.by_node.get(have.node)
        if have.leaving:
            self.by_node.pop(have.node, None)
        else:
            wanted = from_bitmap(have.wanted_leaves) if have.wanted_leaves else self._partial.all_leaves
            latest = PeerHave(
                have.node,
                have.uid,
                from_bitmap(have.available_leaves),
                wanted,
                have.origin,
                have.leaf_list_digest,
                have.seal,
                now_s,
            )
            if before is not None and before.uid == latest.uid and now_s > before.at_s:
                growth = (latest.leaves & ~before.leaves).bit_count() * LEAF_BYTES / (now_s - before.at_s)
                old = before.growth_bytes_per_s
                latest.growth_bytes_per_s = running_average(old, growth)
            self.by_node[have.node] = latest
        if have.hello:
            self._dirty.set()
        self._on_message(have)
        self._changed()

    def _is_valid(self, have: HaveMessage, subject: str) -> bool:
        """Return whether it is of this blob, from the node of its subject, and within bounds (I10)."""
        count = leaf_count(self._partial.size_bytes)
        return (
            have.node != self._node
            and subject == f"{subjects.ROOT}.have.{have.node}.{self._blob}"
            and (have.blob, have.size_bytes) == (self._blob, self._partial.size_bytes)
            and len(have.available_leaves) <= -(-count // 8)
            and from_bitmap(have.available_leaves).bit_length() <= count
            and len(have.wanted_leaves) <= -(-count // 8)
            and from_bitmap(have.wanted_leaves).bit_length() <= count
            and len(have.hashes) % HASH_BYTES == 0
            and 0 <= have.first_hash_leaf <= count - len(have.hashes) // HASH_BYTES
            and (have.node in self.by_node or len(self.by_node) < MAX_NODES)
        )
