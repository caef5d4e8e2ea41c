"""Cluster leases: one holder, which notices in time when it has lost the lease."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shoal_common.bus import cluster_lease
from shoal_common.bus.cluster_lease import ClusterLease, acquire, hold
from shoal_common.bus.connection import connected
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.concurrency.cancellation import cancel_and_wait
from tests.harness.delayed_nats_proxy import Held, delayed_nats_proxy
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer, joined
from tests.harness.waiting import eventually


@pytest.fixture(autouse=True)
def short_ttl(monkeypatch: pytest.MonkeyPatch) -> float:
    """Shorten leases to 4 s: the same rules with less waiting."""
    monkeypatch.setattr(cluster_lease, "LEASE_TTL_S", 4)
    return 4.0


async def test_of_twenty_racers_one_gets_the_lease(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        key = fresh("raced")
        racers = [acquire(here.buckets.lease, key, f"node-{i}", f"uid-{i}") for i in range(20)]
        won = [lease for lease in await asyncio.gather(*racers) if lease]
        assert len(won) == 1
        assert won[0].is_held


async def test_a_holder_that_stops_renewing_knows_before_any_successor(
    nats: NatsServer, fresh: Fresh, short_ttl: float
) -> None:
    async with joined(nats) as here:
        key = fresh("expiring")
        silent = await acquire(here.buckets.lease, key, "node-a", "uid-a")
        assert silent is not None
        asked_s = time.monotonic()
        assert await acquire(here.buckets.lease, key, "node-b", "uid-b") is None
        held_until_s = 0.0

        async def taken_over() -> ClusterLease | None:
            nonlocal held_until_s
            if silent.is_held:
                held_until_s = time.monotonic()
            return await acquire(here.buckets.lease, key, "node-b", "uid-b")

        successor = await eventually(taken_over, "the lease expires")
        assert successor.is_held and not silent.is_held
        assert held_until_s - asked_s < short_ttl - 0.5
        assert time.monotonic() - held_until_s > 0.5
        # Its late release and renewal do not affect the successor.
        await silent.release()
        assert await acquire(here.buckets.lease, key, "node-c", "uid-c") is None


async def test_a_lease_given_back_is_free_at_once(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        key = fresh("returned")
        lease = await acquire(here.buckets.lease, key, "node-a", "uid-a")
        assert lease is not None
        async with hold(lease):
            assert await acquire(here.buckets.lease, key, "node-b", "uid-b") is None
        assert not lease.is_held
        await asyncio.wait_for(lease.wait_lost(), 30)
        assert await acquire(here.buckets.lease, key, "node-b", "uid-b") is not None


@asynccontextmanager
async def held_over_a_slow_network(server: NatsServer, key: str) -> AsyncIterator[tuple[Held, asyncio.Task[None]]]:
    """Yield a task that holds the lease, and the proxy between it and NATS."""
    async with delayed_nats_proxy(server.url) as network, connected([network.url], "slow") as slow:
        lease = await acquire(Buckets(slow.js).lease, key, "node-a", "uid-a")
        assert lease is not None
        holding = asyncio.Event()

        async def hold_until_cancelled() -> None:
            async with hold(lease):
                holding.set()
                await asyncio.Event().wait()

        holder = asyncio.create_task(hold_until_cancelled())
        await holding.wait()
        yield network, holder


async def test_a_taker_cancelled_before_the_answer_leaves_no_lease(nats: NatsServer, fresh: Fresh) -> None:
    key = fresh("taken")
    async with (
        joined(nats) as here,
        delayed_nats_proxy(nats.url) as network,
        connected([network.url], "slow") as slow,
    ):
        network.answers.clear()
        taker = asyncio.create_task(acquire(Buckets(slow.js).lease, key, "node-a", "uid-a"))
        await eventually(lambda: here.buckets.lease.get(key), "the lease is granted")
        ending = asyncio.create_task(cancel_and_wait(taker))
        network.answers.set()
        await ending
        assert taker.cancelled()
        assert await here.buckets.lease.get(key) is None


async def test_a_cancelled_holder_releases_over_a_slow_network(nats: NatsServer, fresh: Fresh) -> None:
    key = fresh("slow")
    async with joined(nats) as here, held_over_a_slow_network(nats, key) as (network, holder):
        network.flows.clear()
        ending = asyncio.create_task(cancel_and_wait(holder))
        await eventually(lambda: network.holds(b"$KV.lease"), "the holder asks for its key")
        await asyncio.sleep(1.0)  # the network's delay, longer than the old rule's second cancellation
        network.flows.set()
        await ending
        assert await acquire(here.buckets.lease, key, "node-b", "uid-b") is not None


async def test_a_lease_whose_renewal_is_under_way_is_released(nats: NatsServer, fresh: Fresh) -> None:
    key = fresh("renewing")
    async with joined(nats) as here, held_over_a_slow_network(nats, key) as (network, holder):
        network.flows.clear()
        await eventually(lambda: network.holds(f"$KV.lease.{key}".encode()), "the lease is being renewed")
        ending = asyncio.create_task(cancel_and_wait(holder))
        await asyncio.sleep(0)
        network.flows.set()
        await ending
        assert await acquire(here.buckets.lease, key, "node-b", "uid-b") is not None


async def test_a_successor_on_the_node_takes_over_and_fences_the_old(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        key = fresh("succeeded")
        old = await acquire(here.buckets.lease, key, "node-a", "uid-1")
        new = await acquire(here.buckets.lease, key, "node-a", "uid-2")
        assert old is not None and new is not None
        async with hold(old):
            await asyncio.wait_for(old.wait_lost(), 30)
        assert not old.is_held and new.is_held
        assert await here.buckets.lease.get_as(key, type(new.value)) == new.value


async def test_a_lease_outlives_an_outage_and_its_ttl_while_renewed(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        lease = await acquire(here.buckets.lease, "kept", "node-a", "uid-a")
        assert lease is not None
        first = lease.revision
        async with hold(lease):
            own_nats.restart()
            await eventually(lambda: renewed(lease, first), "the lease is renewed after the restart")
            assert lease.is_held
            assert await acquire(here.buckets.lease, "kept", "node-b", "uid-b") is None


async def renewed(lease: ClusterLease, first: int) -> bool:
    return lease.revision > first


async def test_a_holder_cut_off_from_nats_gives_up_in_time(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        lease = await acquire(here.buckets.lease, "cut-off", "node-a", "uid-a")
        assert lease is not None
        renewal = asyncio.create_task(lease.renew_until_lost())
        own_nats.kill()
        await asyncio.wait_for(lease.wait_lost(), 30)
        assert not lease.is_held
        await renewal
