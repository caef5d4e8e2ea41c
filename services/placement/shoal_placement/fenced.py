"""A leader's writes, which NATS itself refuses once another leads.

A leader that was stopped (SIGSTOP, a machine that slept) past its lease does not know it yet when it goes on, and
what it had decided is on its way. So each leader first writes a key of its own, `leader.placement`, to the buckets
that it writes, and whatever it writes after that names this key's revision: another leader's is another revision. The
key holds the revision of the lease, so that of two who are at the beginning the later one wins.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn

from shoal_common.buckets import Bucket, Fence, leader_key
from shoal_common.errors import Unavailable
from shoal_common.leases import Lease
from shoal_common.logs import Log
from shoal_common.messages import Message, decode

log = Log("placement")


class Led(Message):
    """The value of `leader.placement` in `spec` and `state`."""

    lease_revision: int


class Fenced:
    """One bucket as its leader writes it."""

    def __init__(self, bucket: Bucket, lease: Lease) -> None:
        self._bucket, self._lease = bucket, lease
        self._fence = Fence(leader_key("placement"), 0)

    async def begin(self) -> bool:
        """Make the bucket ours. False when a later leader has it."""
        mine = Led(lease_revision=self._lease.revision)
        while True:
            entry = await self._bucket.get(self._fence.key)
            if entry is not None and decode(entry.value, Led).lease_revision > mine.lease_revision:
                return False
            revision = await self._bucket.swap(self._fence.key, mine, entry.revision if entry else 0)
            if revision is not None:
                self._fence = Fence(self._fence.key, revision)
                return True

    async def put(self, key: str, value: object) -> int:
        """Say what is. Returns the revision."""
        revision = await self._bucket.put_behind(self._fence, key, value) if self._lease.held else None
        return await self._give_up(key) if revision is None else revision

    async def delete(self, key: str) -> bool:
        """Remove a key. Absent already: False, and nothing is written."""
        deleted = await self._bucket.delete_behind(self._fence, key) if self._lease.held else None
        return await self._give_up(key) if deleted is None else deleted

    async def _give_up(self, key: str) -> NoReturn:
        """Another leads. Whoever waits for the lease cancels what we do, and commands go to the next leader."""
        log.warning("not written: this placement leads no more", bucket=self._bucket.name, key=key)
        self._lease.lose()
        while True:
            await asyncio.Event().wait()


class Writes:
    """What a leader writes: `spec` and `state`, from the beginning of its lease to the end of it."""

    def __init__(self, spec: Bucket, state: Bucket, lease: Lease) -> None:
        self.spec, self.state = Fenced(spec, lease), Fenced(state, lease)

    async def begin(self) -> bool:
        """Make both ours. False when a later leader has one of them, or NATS is away."""
        try:
            return await self.spec.begin() and await self.state.begin()
        except Unavailable:
            return False
