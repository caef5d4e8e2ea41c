"""NATS itself refuses the writes of a former leader."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from shoal_common.bus.cluster_lease import ClusterLease, acquire
from shoal_common.bus.keys import leader_key
from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_placement.leader.fenced_writes import LeaderWrites
from tests.harness.nats import Joined, NatsServer, joined


async def leads(here: Joined, node: str) -> tuple[ClusterLease, LeaderWrites]:
    """Take the lease for a node without its predecessor noticing."""
    await here.buckets.lease.delete(leader_key("placement"))
    lease = await acquire(here.buckets.lease, leader_key("placement"), node, node)
    assert lease is not None
    return lease, LeaderWrites(here.buckets.spec, here.buckets.state, lease)


async def refused(lease: ClusterLease, write: Coroutine[Any, Any, object]) -> None:
    """Return once a refused write has made its leader give up the lease."""
    assert lease.is_held, "its own clock would let it write"
    writing = asyncio.ensure_future(write)
    await lease.wait_lost()
    assert not writing.done()
    await cancel_and_wait(writing)


async def test_a_former_leader_cannot_write_after_another_began(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        old_lease, old = await leads(here, "a")
        assert await old.begin()
        await old.state.put("instance.x", {"by": "old"})
        await old.spec.put("instance.x", {"by": "old"})
        new_lease, new = await leads(here, "b")
        assert await new.begin()
        await new.state.put("instance.x", {"by": "new"})
        written = [await here.last_sequence(f"KV_{bucket}") for bucket in ("spec", "state")]
        await refused(old_lease, old.state.put("instance.x", {"by": "old"}))
        for lost, write in (
            (await leads(here, "a"), old.spec.delete("instance.x")),
            (await leads(here, "a"), old.state.put("instance.y", {"by": "old"})),
        ):
            old.spec._lease = old.state._lease = lost[0]  # by its own clock it still leads
            await refused(lost[0], write)
        assert [await here.last_sequence(f"KV_{bucket}") for bucket in ("spec", "state")] == written
        assert new_lease.is_held
        assert await new.spec.delete("instance.x") and not await new.spec.delete("instance.x")


async def test_of_two_leaders_at_their_beginning_the_later_one_wins(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        _, first = await leads(here, "a")
        _, second = await leads(here, "b")
        assert await second.begin()
        assert not await first.begin(), "it was stopped between taking its lease and saying so"
        await second.state.put("instance.x", {})


async def test_after_nats_lost_its_store_an_old_leader_writes_nothing(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        lease, writes = await leads(here, "a")
        assert await writes.begin()
        seen = here.nats.reconnects.count
        await asyncio.to_thread(own_nats.wipe)
        await here.nats.reconnects.wait_after(seen)
        async with joined(own_nats) as again:  # the first connection creates the streams again
            assert await again.key_count("state") == 0
            writing = asyncio.ensure_future(writes.state.put("instance.x", {}))
            await lease.wait_lost()
            await cancel_and_wait(writing)
            assert await again.key_count("state") == 0
