"""Liveness: a key with a TTL that states which process runs this service of this node, and facts about it.

A service claims the key at startup. If another live process holds it, startup fails with `AlreadyRunning`, naming the
holder; a dead holder on this machine is recognized by its pid and start time, and replaced at once.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable

from msgspec import structs

from shoal_common import VERSION
from shoal_common.bus.keys import liveness_key
from shoal_common.bus.kv_bucket import Bucket
from shoal_common.bus.streams import LIVE_TTL_S
from shoal_common.concurrency.threads import shared_threads_work
from shoal_common.errors import AlreadyRunning, Unavailable
from shoal_common.host.addresses import non_loopback
from shoal_common.host.process_identity import is_dead, this_process
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode
from shoal_common.messages.liveness import LivenessRecord, NodeAddress, NodeFacts

log = StructuredLogger("live")

RENEW_INTERVAL_S = 6.5
"""A third of the key's TTL: a service that misses two renewals is still live."""
_MIN_WAIT_S = 0.1
_CLAIM_POLL_S = 1.0
_MAX_DELETE_ATTEMPTS = 3
_CLAIM_TIMEOUT_S = LIVE_TTL_S + 5.0
"""A holder on another host may have died without releasing its key: wait until it would have expired."""


def next_beat_in_s(node: str, now_s: float) -> float:
    """Return the seconds until this node's next renewal, by a clock that all of its processes share.

    A node's services renew together, so that a watcher wakes once for all of them; nodes renew at different times.
    """
    phase_s = zlib.crc32(node.encode()) / 2**32 * RENEW_INTERVAL_S
    left_s = RENEW_INTERVAL_S - (now_s - phase_s) % RENEW_INTERVAL_S
    return left_s if left_s >= _MIN_WAIT_S else left_s + RENEW_INTERVAL_S  # the timer may have fired a little early


class Liveness:
    """This process's liveness key."""

    def __init__(self, bucket: Bucket, node: str, service: str) -> None:
        self._bucket, self._key = bucket, liveness_key(node, service)
        self._node, self._service = node, service
        self._live = LivenessRecord(holder=this_process(), version=VERSION, started_at_s=round(time.time(), 1))
        self._revision = 0
        self._renew_requested = asyncio.Event()
        self._after_publish: list[Callable[[], None]] = []
        self._read_links: Callable[[], list[NodeAddress]] | None = None

    @property
    def uid(self) -> str:
        """Id of this process, unique among all that ever ran this service of this node."""
        return self._live.holder.uid

    @property
    def facts(self) -> NodeFacts:
        """Facts that are published, or will be with the next renewal."""
        return self._live.facts

    def set_facts(self, facts: NodeFacts) -> None:
        """Publish these facts with the next renewal; at once if the addresses have changed."""
        if facts.addresses != self._live.facts.addresses:
            self._renew_requested.set()
        self._live = LivenessRecord(
            holder=self._live.holder,
            version=self._live.version,
            started_at_s=self._live.started_at_s,
            facts=facts,
        )

    def track_addresses(self, read_links: Callable[[], list[NodeAddress]]) -> None:
        """Read the addresses with `read_links` (in a thread) before each renewal, and publish them with it."""
        self._read_links = read_links

    def publish_now(self, facts: NodeFacts | None, on_published: Callable[[], None]) -> None:
        """Publish these facts at once, and call `on_published` when they are published."""
        if facts is not None:
            self.set_facts(facts)
        self._after_publish.append(on_published)
        self._renew_requested.set()

    def renew_now(self) -> None:
        """Renew the key early: after a NATS outage it may be about to expire, or gone."""
        self._renew_requested.set()

    async def claim(self) -> None:
        """Claim the key. Raises AlreadyRunning if another live process holds it.

        A holder on this machine is checked by its pid at once. One on another machine gets its TTL: if it still
        renews the key after that, two machines use the same node id.
        """
        first_seen: int | None = None
        give_up_s = time.monotonic() + _CLAIM_TIMEOUT_S
        while True:
            revision = await self._bucket.create(self._key, self._live)
            if revision is not None:
                self._revision = revision
                return
            entry = await self._bucket.get(self._key)
            if entry is None:
                continue
            holder = decode(entry.value, LivenessRecord).holder
            # Our own uid: a renewal was stored whose ack was lost.
            if holder.uid == self.uid or is_dead(holder, self._live.holder.host):
                revision = await self._bucket.compare_and_set(self._key, self._live, entry.revision)
                if revision is not None:
                    self._revision = revision
                    return
                continue
            first_seen = first_seen or entry.revision
            same_host = holder.host == self._live.holder.host
            if same_host or entry.revision != first_seen or time.monotonic() > give_up_s:
                raise AlreadyRunning(
                    f"{self._service} of node {self._node} is already running: pid {holder.pid} on "
                    f"{holder.host.split('/')[0]} holds its key; stop it, or give this machine its own node id"
                )
            log.warning("waiting for another host's key to be renewed or expire", holder=holder.host, pid=holder.pid)
            await asyncio.sleep(_CLAIM_POLL_S)

    async def renew_forever(self) -> None:
        """Renew the key at every interval of the node, while the loop's shared threads work.

        Raises AlreadyRunning if another process has taken it.
        """
        while True:
            try:
                async with asyncio.timeout(next_beat_in_s(self._node, time.monotonic())):
                    await self._renew_requested.wait()
            except TimeoutError:
                pass
            if self._read_links is None:
                await shared_threads_work()
            else:
                links = await asyncio.to_thread(self._read_links)
                addresses = [link.address for link in non_loopback(links)]
                self.set_facts(structs.replace(self.facts, links=links, addresses=addresses))
            self._renew_requested.clear()
            try:
                revision = await self._bucket.compare_and_set(self._key, self._live, self._revision)
            except Unavailable:
                continue
            if revision is None:
                # Expired in an outage, or lost with NATS's store: claim it again, unless another process did.
                await self.claim()
            else:
                self._revision = revision
            while self._after_publish:
                self._after_publish.pop(0)()

    async def remove_key(self) -> None:
        """Remove the key at shutdown."""
        # Not by the known revision: a renewal that shutdown interrupted may still be on its way to the server.
        for _ in range(_MAX_DELETE_ATTEMPTS):
            entry = await self._bucket.get(self._key)
            if entry is None or decode(entry.value, LivenessRecord).holder.uid != self.uid:
                return
            if await self._bucket.delete(self._key, entry.revision):
                return
