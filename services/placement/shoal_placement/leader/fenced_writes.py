"""A leader's writes, which NATS itself refuses once another service leads.

A leader that was stopped past its lease (SIGSTOP, a machine that slept) does not know so when it resumes, and earlier
writes of it may be on their way. So each leader first writes the key `leader.placement` to the buckets that it
writes, and every later write names that key's revision: another leader has another revision. The value is the lease's
revision, so that of two leaders that begin at the same time the later one wins.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn

from shoal_common.bus.cluster_lease import ClusterLease
from shoal_common.bus.keys import leader_key
from shoal_common.bus.kv_bucket import Bucket, Fence
from shoal_common.errors import Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages import WireStruct, decode

log = StructuredLogger("placement")


class LeaderMarker(WireStruct):
    """The value of `leader.placement` in `spec` and `state`."""

    lease_revision: int


class FencedBucket:
    """One bucket that only the current leader can write."""

    def __init__(self, bucket: Bucket, lease: ClusterLease) -> None:
        self._bucket, self._lease = bucket, lease
        self._fence = Fence(leader_key("placement"), 0)

    async def begin(self) -> bool:
        """Take over the bucket. Return False if a later leader has it."""
        marker = LeaderMarker(lease_revision=self._lease.revision)
        while True:
            entry = await self._bucket.get(self._fence.key)
            if entry is not None and decode(entry.value, LeaderMarker).lease_revision > marker.lease_revision:
                return False
            revision = await self._bucket.compare_and_set(self._fence.key, marker, entry.revision if entry else 0)
            if revision is not None:
                self._fence = Fence(self._fence.key, revision)
                return True

    async def put(self, key: str, value: object) -> int:
        """Write a key. Return the revision. Never returns if another service leads."""
        revision = await self._bucket.put_fenced(self._fence, key, value) if self._lease.is_held else None
        return await self._give_up(key) if revision is None else revision

    async def delete(self, key: str) -> bool:
        """Remove a key. Return False, and write nothing, if it is absent. Never returns if another service leads."""
        deleted = await self._bucket.delete_fenced(self._fence, key) if self._lease.is_held else None
        return await self._give_up(key) if deleted is None else deleted

    async def _give_up(self, key: str) -> NoReturn:
        """Give up the lease, and wait to be cancelled by whoever waits for it; commands go to the next leader."""
        log.warning("write refused: another placement service leads now", bucket=self._bucket.name, key=key)
        self._lease.mark_lost()
        while True:
            await asyncio.Event().wait()


class LeaderWrites:
    """The buckets that a leader writes, `spec` and `state`, for as long as it holds its lease."""

    def __init__(self, spec: Bucket, state: Bucket, lease: ClusterLease) -> None:
        self.spec, self.state = FencedBucket(spec, lease), FencedBucket(state, lease)

    async def begin(self) -> bool:
        """Take over both buckets. Return False if a later leader has one of them, or NATS is down."""
        try:
            return await self.spec.begin() and await self.state.begin()
        except Unavailable:
            return False
