"""Liveness: one process is a node's service, all see which one, and a dead one blocks nobody."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common import VERSION
from shoal_common.bus.keys import liveness_key
from shoal_common.bus.streams import LIVE_TTL_S
from shoal_common.errors import AlreadyRunning
from shoal_common.host.process_identity import host_id, is_dead, this_process
from shoal_common.liveness import liveness as module
from shoal_common.liveness.liveness import RENEW_INTERVAL_S, Liveness, next_beat_in_s
from shoal_common.messages.liveness import LivenessRecord, NodeAddress, NodeFacts, ProcessIdentity
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.process import node_environment, started
from tests.harness.waiting import eventually

TOY = str(Path(__file__).parents[1] / "toy_service.py")


async def live(here: Joined, node: str, service: str = "storage") -> LivenessRecord | None:
    return await here.buckets.live.get_as(liveness_key(node, service), LivenessRecord)


async def test_a_claimed_key_names_its_process(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        own = Liveness(here.buckets.live, node := fresh("node"), "storage")
        await own.claim()
        there = await live(here, node)
        assert there is not None
        assert (there.holder.uid, there.holder.pid) == (own.uid, os.getpid())
        await own.remove_key()
        assert await live(here, node) is None


async def test_a_second_claim_is_refused_naming_the_living_holder(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        node = fresh("node")
        first, second = (Liveness(here.buckets.live, node, "storage") for _ in range(2))
        await first.claim()
        with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"):
            await second.claim()
        await second.remove_key()  # the key was never its own
        there = await live(here, node)
        assert there is not None and there.holder.uid == first.uid
        await first.remove_key()


async def test_I6_a_holder_killed_on_this_machine_is_succeeded_at_once(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    (tmp_path / "node.toml").write_text(f'id = "{(node := fresh("node"))}"\n')
    async with joined(nats) as here:
        async with started(TOY, environment=node_environment(tmp_path, nats.url)) as toy:
            await toy.wait_ready()
            dead = await live(here, node)
            assert dead is not None and dead.holder.pid == toy.pid
            await toy.kill()
        assert await live(here, node) == dead  # it had no time to remove its key
        successor = Liveness(here.buckets.live, node, "storage")
        async with asyncio.timeout(module._CLAIM_POLL_S):
            await successor.claim()
        await successor.remove_key()


async def test_a_holder_on_another_machine_keeps_its_claim_while_alive(
    nats: NatsServer, fresh: Fresh, caplog: pytest.LogCaptureFixture
) -> None:
    async with joined(nats) as here:
        key = liveness_key(node := fresh("node"), "storage")
        elsewhere = LivenessRecord(
            holder=ProcessIdentity(uid="theirs", host="elsewhere/boot/ns", pid=1), version=VERSION
        )
        await here.buckets.live.put(key, elsewhere)
        own = Liveness(here.buckets.live, node, "storage")
        claiming = asyncio.create_task(own.claim())

        async def waiting() -> bool:
            return "waiting for another host's key" in caplog.text

        await eventually(waiting, "the claim has seen the holder")
        await here.buckets.live.put(key, elsewhere)  # a renewal
        with pytest.raises(AlreadyRunning, match="elsewhere"):
            await asyncio.wait_for(claiming, 5)


async def test_facts_with_new_addresses_are_published_at_once(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        own = Liveness(here.buckets.live, node := fresh("node"), "storage")
        await own.claim()
        beating = asyncio.create_task(own.renew_forever())
        own.set_facts(NodeFacts(addresses=["127.0.0.1:7000"], disk_free_bytes=5))

        async def published() -> bool:
            there = await live(here, node)
            return there is not None and there.facts.disk_free_bytes == 5

        await eventually(published, "the new address is told", module.RENEW_INTERVAL_S / 2)
        beating.cancel()
        await own.remove_key()


async def test_interface_changes_are_published_with_the_beats_only(
    nats: NatsServer, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_INTERVAL_S", 0.05)
    lo = NodeAddress(address="127.0.0.1:7000", kind="loopback")
    eth = NodeAddress(address="10.0.0.5:7000", interface="eth0", kind="ethernet")
    wifi = NodeAddress(address="192.168.2.5:7000", interface="wlan0", kind="wifi")
    now, polls = [eth, lo], 0

    def read_links() -> list[NodeAddress]:
        nonlocal polls
        polls += 1
        return list(now)

    async with joined(nats) as here:
        own = Liveness(here.buckets.live, node := fresh("node"), "storage")
        await own.claim()
        own.track_addresses(read_links)
        own.set_facts(NodeFacts(memory_total_bytes=7))
        beating = asyncio.create_task(own.renew_forever())

        async def published(links: list[NodeAddress]) -> bool:
            there = await live(here, node)
            return there is not None and there.facts.links == links

        await eventually(lambda: published([eth, lo]), "the first links are told")
        now[:] = [lo]  # the cable is pulled
        await eventually(lambda: published([lo]), "one is gone")
        now[:] = [wifi, lo]
        await eventually(lambda: published([wifi, lo]), "another is there")
        there = await live(here, node)
        assert there is not None and there.facts.memory_total_bytes == 7
        assert there.facts.addresses == [wifi.address]  # loopback is for the same machine only
        before, polls_before = await here.last_sequence("KV_live"), polls

        async def read_again() -> bool:
            return polls >= polls_before + 5

        await eventually(read_again, "it looks on")
        beats = await here.last_sequence("KV_live") - before
        assert beats <= polls - polls_before + 1  # one write for each reading of the addresses: the renewal itself
        beating.cancel()
        await own.remove_key()


async def test_an_unacknowledged_beat_is_not_taken_for_another_process(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        own = Liveness(here.buckets.live, node := fresh("node"), "storage")
        await own.claim()
        # NATS stored this renewal just before it was away for longer than a write is retried.
        there = await live(here, node)
        assert there is not None
        await here.buckets.live.put(liveness_key(node, "storage"), there)
        own.set_facts(NodeFacts(addresses=["127.0.0.1:7001"]))
        beating = asyncio.create_task(own.renew_forever())

        async def published() -> bool:
            now = await live(here, node)
            return beating.done() or (now is not None and bool(now.facts.addresses))

        await eventually(published, "it beats on")
        assert not beating.done(), beating.exception()
        beating.cancel()
        await own.remove_key()
        assert await live(here, node) is None


async def test_a_beat_survives_restarts_of_nats_and_a_lost_store(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        own = Liveness(here.buckets.live, "node-a", "storage")
        await own.claim()
        beating = asyncio.create_task(own.renew_forever())
        for round_number, again in enumerate((own_nats.restart, own_nats.wipe), start=1):
            again()
            async with joined(own_nats):  # the first one to connect creates the streams again
                pass
            own.set_facts(NodeFacts(addresses=[f"127.0.0.1:{round_number}"]))

            async def published(port: int = round_number) -> bool:
                there = await live(here, "node-a")
                return there is not None and there.facts.addresses == [f"127.0.0.1:{port}"]

            await eventually(published, "it beats again")
        assert not beating.done()
        beating.cancel()
        await own.remove_key()


async def test_unpublishing_works_in_the_middle_of_a_beat(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        for _ in range(5):
            own = Liveness(here.buckets.live, node := fresh("node"), "storage")
            await own.claim()
            beating = asyncio.create_task(own.renew_forever())
            own.set_facts(NodeFacts(addresses=["127.0.0.1:7000"]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # the renewal is sent, its ack has not arrived
            beating.cancel()
            await own.remove_key()
            assert await live(here, node) is None


async def test_only_a_process_of_this_machine_can_be_known_to_be_dead(tmp_path: Path) -> None:
    me = this_process()
    assert not is_dead(me, host_id())
    async with started("-c", "print('here', flush=True); input()", environment={}) as child:
        await child.wait_exit()
        dead = ProcessIdentity(uid="x", host=host_id(), pid=child.pid, pid_started_s=me.pid_started_s)
    assert is_dead(dead, host_id())
    assert not is_dead(dead, "another/boot/ns")
    # A later process that got the same pid is not the holder.
    assert is_dead(
        ProcessIdentity(uid="x", host=host_id(), pid=me.pid, pid_started_s=me.pid_started_s - 60), host_id()
    )


async def test_a_paused_holder_is_alive(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(f'id = "{(node := fresh("node"))}"\n')
    async with joined(nats) as here, started(TOY, environment=node_environment(tmp_path, nats.url)) as toy:
        await toy.wait_ready()
        toy.send(signal.SIGSTOP)
        with pytest.raises(AlreadyRunning, match=f"pid {toy.pid}"):
            await Liveness(here.buckets.live, node, "storage").claim()


@given(st.text("abc-", min_size=1), st.floats(0, 1e8))
def test_a_nodes_services_beat_together_and_die_after_two_misses(node: str, now_s: float) -> None:
    left_s = next_beat_in_s(node, now_s)
    assert 0 < left_s < RENEW_INTERVAL_S + 0.2
    # Another process of the node that asks a moment later, before the renewal, gets the same instant.
    later_s = now_s + left_s / 2
    assert next_beat_in_s(node, later_s) == pytest.approx(left_s / 2, abs=1e-3) or left_s / 2 < 0.2
    assert 3 * RENEW_INTERVAL_S < LIVE_TTL_S
