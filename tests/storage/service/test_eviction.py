"""Eviction by the service: a real process on a real NATS, called as its clients call it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from shoal_common.bus.keys import instance_key
from shoal_common.errors import BadInput, QuotaExceeded
from shoal_common.messages.storage import CollectGarbage, EvictionPlan, Pin, ReserveResult
from shoal_common.store.verification_stamp import write_stamp
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.tiny_filesystem import fill, small_disk
from tests.storage.running_storage import Node, on_node
from tests.storage.service.test_deletion import instance_of
from tests.storage.store_fixtures import Model, check_invariants, files_below, files_of, put, sha256

LRU = {"SHOAL_EVICTION_POLICY": "lru"}


def model_of(name: str, size_bytes: int) -> Model:
    """A model of one file with bytes of its own."""
    return Model(f"org/{name}", {"weights.bin": (name.encode() * size_bytes)[:size_bytes]})


ONE, TWO, SIXTY, FIFTY = (
    model_of(n, size) for n, size in (("one", 100), ("two", 200), ("sixty", 6000), ("fifty", 5000))
)


async def hold(node: Node, *models: Model) -> None:
    """Download models and use them, the first one least recently."""
    for model in models:
        await node.bring_in(model)
        await node.use(model)


async def events_named(node: Node, name: str) -> list[dict[str, object]]:
    return [body for event, body in await node.events() if event == name]


async def test_of_1_2_and_60_only_the_60_is_evicted_as_planned(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(SHOAL_MAX_STORAGE_BYTES="7000", **LRU):
        await hold(node, ONE, TWO, SIXTY)
        dry = await node.plan(5000)
        assert (dry.required_bytes, dry.freed_bytes, dry.evictable_bytes, dry.enough) == (4300, 6000, 6300, True)
        assert [v.model for v in dry.victims] == [SIXTY.name]
        assert files_below(node.layout.root) >= files_of(ONE, TWO, SIXTY), "a dry run does nothing"
        assert await node.plan(5000) == dry
        reserved = await node.reserve(FIFTY.manifest)
        assert reserved.evicted == dry, "the dry run and the real thing are one"
        assert (await node.reserve(FIFTY.manifest)).evicted is None, "asked again, the room is there"
        assert await node.model_state(SIXTY) is None and await node.model_state(TWO) is not None
        (event,) = await events_named(node, "evicted")
        assert (event["model"], event["freed_bytes"]) == (SIXTY.name, 6000)
        await node.bring_in(FIFTY)
        state = await node.storage_state()
        assert (state.used_bytes, state.reserved_bytes, state.eviction_policy) == (5300, 0, "lru")
        check_invariants(node.layout.root)


async def test_the_manual_policy_refuses_and_lists_what_could_go(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(SHOAL_MAX_STORAGE_BYTES="7000"):
        await hold(node, ONE, TWO, SIXTY)
        before = files_below(node.layout.root)
        with pytest.raises(
            QuotaExceeded, match=r"evicting 1 model would free 6\.0 kB: set eviction_policy to lru"
        ) as e:
            await node.reserve(FIFTY.manifest)
        figures = {
            k: e.value.details[k] for k in ("needed_bytes", "quota_bytes", "shortfall_bytes", "evictable_bytes")
        }
        assert figures == {
            "needed_bytes": 5000,
            "quota_bytes": 7000,
            "shortfall_bytes": 4300,
            "evictable_bytes": 6300,
        }
        assert (e.value.details["would_evict"], e.value.details["would_free_bytes"]) == ([SIXTY.name], 6000)
        assert files_below(node.layout.root) == before and not await events_named(node, "evicted")
        assert (await node.storage_state()).reserved_bytes == 0
        with pytest.raises(BadInput, match="need_bytes is -1"):
            await node.plan(-1)


async def test_I4_pinned_used_and_arriving_models_are_not_evicted(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    name, coming = fresh("instance"), Model("org/coming", {"a": b"a" * 300, "b": b"b" * 300})
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(SHOAL_MAX_STORAGE_BYTES="7000", **LRU):
        await hold(node, ONE, TWO, SIXTY)
        await node.reserve(coming.manifest)
        arrived = sha256(b"a" * 300)
        put(node.layout, arrived, b"a" * 300)
        await node.commit(arrived)
        assert (await node.command("pin", Pin(model="org/sixty"))).result == {"models": [SIXTY.name], "pinned": True}
        spec = node.here.buckets.spec
        await spec.put(instance_key(name), instance_of(TWO, name, node.node))
        assert (await node.storage_state()).pinned == [SIXTY.name]
        before = files_below(node.layout.root)
        with pytest.raises(QuotaExceeded, match=r"100 B evictable, .* needed; 2 models are pinned or in use") as e:
            await node.reserve(FIFTY.manifest)
        assert e.value.details["evictable_bytes"] == 100
        assert files_below(node.layout.root) == before, "not enough: nothing goes"
        plan = await node.plan(5000)
        assert plan == EvictionPlan(required_bytes=4900, evictable_bytes=100, protected=plan.protected)
        assert plan.protected == {
            SIXTY.name: "pinned",
            TWO.name: f"used by instance {name}",
            coming.name: "being fetched",
        }
        await spec.delete(instance_key(name))
        assert (await node.command("pin", Pin(model="org/sixty", pinned=False))).ok
        assert [v.model for v in (await node.plan(5000)).victims] == [SIXTY.name]
        await node.bring_in(coming)
        check_invariants(node.layout.root)


async def test_I4_a_pinned_model_is_not_deleted_across_a_restart(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.fetcher():
        async with node.storage() as process:
            await node.bring_in(ONE)
            missing = await node.command("pin", Pin(model="org/never-was"))
            assert missing.error is not None and missing.error.code == "not_found"
            assert (await node.command("pin", Pin(model=ONE.name))).ok
            await process.kill()  # acknowledged, so durable
        async with node.storage():
            refused = await node.delete("org/one")
            assert refused.error is not None and refused.error.code == "in_use"
            assert f"`shoal storage unpin {ONE.name}`" in refused.error.message
            assert node.withdrawn == [] and await node.model_state(ONE) is not None
            assert (await node.command("pin", Pin(model="org/one", pinned=False))).ok
            assert (await node.storage_state()).pinned == []
            assert (await node.delete("org/one")).ok
            assert files_below(node.layout.root) == set()


async def test_last_uses_survive_a_restart_and_order_the_victims(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    models = [model_of(name, 1000) for name in ("aaa", "bbb", "ccc")]
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        async with node.storage() as process:
            for model in models:
                await node.bring_in(model)
            await node.use(models[1])
            await node.use(models[0])
            process.send(signal.SIGTERM)
            assert await process.wait_exit() == 0
        uses = {p.name.partition("@")[0]: p.stat().st_mtime for p in node.layout.uses.iterdir()}
        assert uses.keys() == {"org--aaa", "org--bbb"} and uses["org--aaa"] > uses["org--bbb"]
        # Never used: its download, long ago, counts.
        manifest = node.layout.manifest(models[2].manifest.model)
        os.utime(manifest, (1.0, 1.0))
        async with node.storage(SHOAL_MAX_STORAGE_BYTES="3000", **LRU):
            plan = await node.plan(3000)
            assert [v.model for v in plan.victims] == [models[n].name for n in (2, 1, 0)]
            assert plan.victims[0].last_use_s == 1.0
            assert abs(plan.victims[1].last_use_s - uses["org--bbb"]) < 0.001
            reserved = await node.reserve(model_of("ddd", 1500).manifest)
            assert reserved.evicted is not None
            assert [v.model for v in reserved.evicted.victims] == [models[2].name, models[1].name]
            assert {p.name.partition("@")[0] for p in node.layout.uses.iterdir()} == {"org--aaa"}


async def test_I3_concurrent_reservations_never_exceed_the_quota(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    old = [model_of(f"old-{n}", 1000) for n in range(5)]
    new = [model_of(f"new-{n}", 2000) for n in range(4)]
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(SHOAL_MAX_STORAGE_BYTES="5500", **LRU):
        await hold(node, *old)
        answers = await asyncio.gather(*(node.reserve(m.manifest) for m in new), return_exceptions=True)
        approved = [a for a in answers if isinstance(a, ReserveResult)]
        assert len(approved) == 2 and all(isinstance(a, ReserveResult | QuotaExceeded) for a in answers)
        state = await node.storage_state()
        assert state.reserved_bytes == 4000 and state.used_bytes + state.reserved_bytes <= 5500
        freed = sum(a.evicted.freed_bytes for a in approved if a.evicted)
        assert freed == 5000 - state.used_bytes == 4000
        assert len(await events_named(node, "evicted")) == 4
        check_invariants(node.layout.root)


async def test_garbage_goes_first_and_by_itself_when_asked(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    garbage = b"nobody refers to this" * 50
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        path = node.layout.blob(sha256(garbage))
        for quota in ("5600", "100000"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(garbage)
            assert write_stamp(path.name, path)
            async with node.storage(SHOAL_MAX_STORAGE_BYTES=quota, **LRU):
                await hold(node, ONE)
                if quota == "5600":
                    reserved = await node.reserve(FIFTY.manifest)
                    assert reserved.evicted is not None and reserved.evicted.garbage == [sha256(garbage)]
                    assert reserved.evicted.victims == [] and await node.model_state(ONE) is not None
                    await node.release(FIFTY.manifest)
                else:
                    outcome = await node.command("gc", CollectGarbage())
                    assert outcome.result == {"freed_bytes": len(garbage), "blobs": 1}
                    assert (await node.command("gc", CollectGarbage())).result == {"freed_bytes": 0, "blobs": 0}
                assert not path.exists()


async def test_I4_after_a_restart_committed_blobs_are_no_garbage(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        async with node.storage() as process:
            first, *rest = (await node.reserve(apples.manifest)).missing
            for blob in (first, *rest):
                put(node.layout, blob, apples.blobs[blob])
            await node.commit(first)
            await process.kill()
        async with node.storage():
            assert (await node.command("gc", CollectGarbage())).result == {"freed_bytes": 0, "blobs": 0}
            for blob in rest:
                await node.commit(blob)
            assert (await node.command("gc", CollectGarbage())).result["blobs"] == 0
            await node.seal(apples.sealed)
            assert files_below(node.layout.root) == files_of(apples)


async def test_a_models_own_blobs_are_not_evicted_for_its_rest(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    shared = b"in the old one and the new one" * 100
    old = Model("org/old", {"shared": shared, "own": b"o" * 1000})
    new = Model("org/new", {"shared": shared, "own": b"n" * 900})
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(SHOAL_MAX_STORAGE_BYTES="4500", **LRU):
        await hold(node, old)
        reserved = await node.reserve(new.manifest)
        assert reserved.present == [sha256(shared)] and reserved.evicted is not None
        assert [(v.model, v.freed_bytes) for v in reserved.evicted.victims] == [(old.name, 1000)]
        await node.bring_in(new)
        assert files_below(node.layout.root) == files_of(new)
        check_invariants(node.layout.root)


async def test_at_0_bytes_free_an_eviction_lets_the_next_model_in(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    old, new = model_of("old", 2 << 20), model_of("new", 1 << 20)
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        with small_disk(node.layout.root, 8 << 20) as disk:
            async with node.storage(**LRU) as process:
                await hold(node, old)
                fill(disk)
                reserved = await node.reserve(new.manifest)
                assert reserved.evicted is not None and [v.model for v in reserved.evicted.victims] == [old.name]
                await node.bring_in(new)
                check_invariants(disk)
                await process.kill()
