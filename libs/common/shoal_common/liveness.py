"""Liveness: a TTL key that says this service of this node is here, who it is, and its facts now.

Starting claims the key. Another live process that has it makes the start fail (`Claimed`), naming the holder; a
dead one on this machine is recognised by its pid and start time and succeeded at once.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable

from msgspec import structs

from shoal_common import VERSION
from shoal_common.buckets import LIVE_TTL_S, Bucket, live_key
from shoal_common.errors import Claimed, Unavailable
from shoal_common.identity import is_gone, this_process
from shoal_common.logs import Log
from shoal_common.messages import decode
from shoal_common.messages.facts import Facts, Link, Live
from shoal_common.reach import for_others

log = Log("live")

BEAT_S = 6.5
"""Three of them in the life of a key: whoever misses two is still there."""
_AT_LEAST_S = 0.1
_CLAIM_POLL_S = 1.0
_WITHDRAW_TRIES = 3
_CLAIM_WAIT_S = LIVE_TTL_S + 5.0
"""A holder on another host may have died without a word: wait until its key would have expired."""


def until_beat_s(node: str, now_s: float) -> float:
    """Seconds until this node's next beat, by a clock that all of its processes share.

    They beat together, so that who listens wakes once for all of them; nodes beat apart from each other.
    """
    phase_s = zlib.crc32(node.encode()) / 2**32 * BEAT_S
    left_s = BEAT_S - (now_s - phase_s) % BEAT_S
    return left_s if left_s >= _AT_LEAST_S else left_s + BEAT_S  # a timer that went off a little early


class Liveness:
    """This process's key in `live`."""

    def __init__(self, bucket: Bucket, node: str, service: str) -> None:
        self._bucket, self._key = bucket, live_key(node, service)
        self._node, self._service = node, service
        self._live = Live(holder=this_process(), version=VERSION, started_at_s=round(time.time(), 1))
        self._revision = 0
        self._news = asyncio.Event()
        self._once_said: list[Callable[[], None]] = []
        self._look: Callable[[], list[Link]] | None = None

    @property
    def uid(self) -> str:
        """This process, among all that ever were this service of this node."""
        return self._live.holder.uid

    @property
    def facts(self) -> Facts:
        """What is said of this service, or will be with the next beat."""
        return self._live.facts

    def set_facts(self, facts: Facts) -> None:
        """Say these facts from the next beat on; at once if a peer could not find us by the old ones."""
        if facts.addresses != self._live.facts.addresses:
            self._news.set()
        self._live = Live(
            holder=self._live.holder,
            version=self._live.version,
            started_at_s=self._live.started_at_s,
            facts=facts,
        )

    def follow_links(self, look: Callable[[], list[Link]]) -> None:
        """Before each beat, look (in a thread) how we are reached, and say that; nothing is written for it alone."""
        self._look = look

    def say_now(self, facts: Facts | None, then: Callable[[], None]) -> None:
        """Say these facts at once, and call `then` when the cluster has been told."""
        if facts is not None:
            self.set_facts(facts)
        self._once_said.append(then)
        self._news.set()

    def beat_now(self) -> None:
        """Renew the key before its time: NATS was away, and the key may be about to expire, or gone."""
        self._news.set()

    async def claim(self) -> None:
        """Become this node's service. Raises Claimed while another live process is.

        A holder on this machine is judged by its pid at once. One elsewhere is given its TTL: if its key is still
        renewed after that, two machines use one node id.
        """
        first_seen: int | None = None
        give_up_s = time.monotonic() + _CLAIM_WAIT_S
        while True:
            revision = await self._bucket.create(self._key, self._live)
            if revision is not None:
                self._revision = revision
                return
            entry = await self._bucket.get(self._key)
            if entry is None:
                continue
            holder = decode(entry.value, Live).holder
            # Our own uid: a beat was stored whose acknowledgement never reached us.
            if holder.uid == self.uid or is_gone(holder, self._live.holder.host):
                revision = await self._bucket.swap(self._key, self._live, entry.revision)
                if revision is not None:
                    self._revision = revision
                    return
                continue
            first_seen = first_seen or entry.revision
            here = holder.host == self._live.holder.host
            if here or entry.revision != first_seen or time.monotonic() > give_up_s:
                raise Claimed(
                    f"{self._service} of node {self._node} is already running: pid {holder.pid} on "
                    f"{holder.host.split('/')[0]} holds it; stop that one, or give this machine its own node id"
                )
            log.warning("waiting for a silent holder to expire", holder=holder.host, pid=holder.pid)
            await asyncio.sleep(_CLAIM_POLL_S)

    async def beat_forever(self) -> None:
        """Renew the key whenever the node beats. Raises Claimed if another process has taken it."""
        while True:
            try:
                async with asyncio.timeout(until_beat_s(self._node, time.monotonic())):
                    await self._news.wait()
            except TimeoutError:
                pass
            if self._look is not None:
                links = await asyncio.to_thread(self._look)
                addresses = [link.address for link in for_others(links)]
                self.set_facts(structs.replace(self.facts, links=links, addresses=addresses))
            self._news.clear()
            try:
                revision = await self._bucket.swap(self._key, self._live, self._revision)
            except Unavailable:
                continue
            if revision is None:
                # Expired during an outage, or wiped with NATS: ours to claim again. Anybody else's: we stop.
                await self.claim()
            else:
                self._revision = revision
            while self._once_said:
                self._once_said.pop(0)()

    async def withdraw(self) -> None:
        """Say that this service is going, now."""
        # Not by the revision we know: a beat that our stopping interrupted may be on its way to the server still.
        for _ in range(_WITHDRAW_TRIES):
            entry = await self._bucket.get(self._key)
            if entry is None or decode(entry.value, Live).holder.uid != self.uid:
                return
            if await self._bucket.delete(self._key, entry.revision):
                return
