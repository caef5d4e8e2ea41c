"""Cluster leases: one holder in the cluster, fenced by the key's revision; expires when its holder dies.

A holder trusts its own clock, not the server's: it stops acting as the holder a margin before the TTL could run out
on the server, counted from before the last renewal was sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from nats.errors import Error as NatsError

from shoal_common.bus.kv_bucket import Bucket
from shoal_common.bus.streams import LEASE_TTL_S
from shoal_common.errors import Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages import WireStruct, decode

log = StructuredLogger("lease")

_RENEWALS_PER_TTL = 4
_MARGIN_S = 1.0
_RELEASE_TIMEOUT_S = 4.0


class LeaseValue(WireStruct):
    """A lease's holder. `uid` is the process: its successor recognizes the lease as its own node's."""

    node: str
    uid: str


class ClusterLease:
    """A held lease. `is_held` turns false when it is lost; `revision` fences writes made under it."""

    def __init__(self, bucket: Bucket, key: str, value: LeaseValue, revision: int, sent_s: float) -> None:
        self.key, self.value, self.revision = key, value, revision
        self._bucket = bucket
        self._until_s = sent_s + LEASE_TTL_S - _MARGIN_S
        self._lost = asyncio.Event()

    @property
    def is_held(self) -> bool:
        """Whether this process may still act as the holder."""
        return not self._lost.is_set() and time.monotonic() < self._until_s

    def mark_lost(self) -> None:
        """Stop acting as the holder, and renewing."""
        self._lost.set()

    async def wait_lost(self) -> None:
        """Return once the lease is lost."""
        await self._lost.wait()

    async def renew_until_lost(self) -> None:
        """Renew the lease until it is released, another process holds it, or it runs out unrenewed."""
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LEASE_TTL_S / _RENEWALS_PER_TTL):
                        await self._lost.wait()
                        return
                sent_s = time.monotonic()
                try:
                    async with asyncio.timeout(max(self._until_s - sent_s, 0)):
                        revision = await self._bucket.compare_and_set(
                            self.key, self.value, self.revision, LEASE_TTL_S
                        )
                except (TimeoutError, Unavailable):
                    return
                if revision is None:
                    return
                self.revision, self._until_s = revision, sent_s + LEASE_TTL_S - _MARGIN_S
        finally:
            self._lost.set()

    async def release(self) -> None:
        """Release the lease at once, unless another process holds it by now."""
        self._lost.set()
        await self._bucket.delete(self.key, self.revision)


async def acquire(bucket: Bucket, key: str, node: str, uid: str) -> ClusterLease | None:
    """Take a lease; return None if it is held. A predecessor on this node hands over at once: liveness allows one
    process per node and service, so a lease of this node with another uid has no holder.

    A caller that is cancelled leaves no lease behind: the server may have granted it before its answer arrives.
    """
    taking = asyncio.ensure_future(_acquire(bucket, key, node, uid))
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:
        with suppress(TimeoutError, Unavailable, NatsError):
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                if lease := await taking:
                    await lease.release()
        raise


async def _acquire(bucket: Bucket, key: str, node: str, uid: str) -> ClusterLease | None:
    value = LeaseValue(node=node, uid=uid)
    sent_s = time.monotonic()
    revision = await bucket.create(key, value, LEASE_TTL_S)
    if revision is None:
        entry = await bucket.get(key)
        if entry is None or decode(entry.value, LeaseValue).node != node:
            return None
        revision = await bucket.compare_and_set(key, value, entry.revision, LEASE_TTL_S)
        if revision is None:
            return None
    return ClusterLease(bucket, key, value, revision, sent_s)


@asynccontextmanager
async def hold(lease: ClusterLease) -> AsyncIterator[ClusterLease]:
    """Renew a lease while the body runs, and release it afterwards."""
    renewal = asyncio.create_task(lease.renew_until_lost())
    try:
        yield lease
    finally:
        lease.mark_lost()
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                # A renewal on its way is waited for, not cancelled: only the last revision can be released.
                await renewal
                await lease.release()
        except (TimeoutError, Unavailable, NatsError):
            log.warning("lease could not be released; it will expire", key=lease.key)
