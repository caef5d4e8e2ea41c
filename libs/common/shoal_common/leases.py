"""Leases: one holder in the cluster, fenced by the key's revision, gone by itself when the holder is.

A holder trusts its own clock, not the server's: it stops acting as holder `margin_s` before the TTL could have
run out on the server, counted from before the last renewal was sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shoal_common.buckets import LEASE_TTL_S, Bucket
from shoal_common.errors import Unavailable
from shoal_common.logs import Log
from shoal_common.messages import Message, decode

log = Log("lease")

_RENEWALS_PER_TTL = 4
_MARGIN_S = 1.0


class LeaseValue(Message):
    """Who holds a lease. `uid` is the process, so that its successor knows the lease was its own node's."""

    node: str
    uid: str


class Lease:
    """A lease in hand. `held` turns false when it is lost; `revision` fences writes made under it."""

    def __init__(self, bucket: Bucket, key: str, value: LeaseValue, revision: int, asked_s: float) -> None:
        self.key, self.value, self.revision = key, value, revision
        self._bucket = bucket
        self._until_s = asked_s + LEASE_TTL_S - _MARGIN_S
        self._lost = asyncio.Event()

    @property
    def held(self) -> bool:
        """Whether this process may still act as the holder."""
        return not self._lost.is_set() and time.monotonic() < self._until_s

    def lose(self) -> None:
        """Somebody else has it, as is known from elsewhere: stop acting as the holder."""
        self._lost.set()

    async def wait_lost(self) -> None:
        """Return once the lease is lost."""
        await self._lost.wait()

    async def renew_forever(self) -> None:
        """Keep it, until somebody else has it or its time runs out unrenewed. Then return."""
        try:
            while True:
                await asyncio.sleep(LEASE_TTL_S / _RENEWALS_PER_TTL)
                asked_s = time.monotonic()
                try:
                    async with asyncio.timeout(max(self._until_s - asked_s, 0)):
                        revision = await self._bucket.swap(self.key, self.value, self.revision, LEASE_TTL_S)
                except (TimeoutError, Unavailable):
                    return
                if revision is None:
                    return
                self.revision, self._until_s = revision, asked_s + LEASE_TTL_S - _MARGIN_S
        finally:
            self._lost.set()

    async def release(self) -> None:
        """Give it back at once, unless somebody else has it by now."""
        self._lost.set()
        await self._bucket.delete(self.key, self.revision)


async def acquire(bucket: Bucket, key: str, node: str, uid: str) -> Lease | None:
    """Take a lease, or None when somebody holds it. A predecessor on this node hands over at once:

    liveness allows one process per node and service, so a lease of this node with another uid has no holder.
    """
    value = LeaseValue(node=node, uid=uid)
    asked_s = time.monotonic()
    revision = await bucket.create(key, value, LEASE_TTL_S)
    if revision is None:
        entry = await bucket.get(key)
        if entry is None or decode(entry.value, LeaseValue).node != node:
            return None
        revision = await bucket.swap(key, value, entry.revision, LEASE_TTL_S)
        if revision is None:
            return None
    return Lease(bucket, key, value, revision, asked_s)


@asynccontextmanager
async def holding(lease: Lease) -> AsyncIterator[Lease]:
    """Renew a lease while the body runs, and give it back afterwards."""
    renewal = asyncio.create_task(lease.renew_forever())
    try:
        yield lease
    finally:
        renewal.cancel()
        try:
            await asyncio.wait_for(lease.release(), LEASE_TTL_S)
        except (TimeoutError, Unavailable):
            log.warning("a lease could not be given back; it expires by itself", key=lease.key)
