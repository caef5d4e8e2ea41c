"""Changes between a plan and its steps: gates hold these moments open, in this process, on a real disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path

import pytest

from shoal_common.bus.keys import instance_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.errors import QuotaExceeded, Unavailable
from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.leases import AcquireLease
from shoal_common.messages.storage import Pin
from shoal_common.names import ModelId
from shoal_common.settings.node import StorageSettings
from shoal_storage.eviction import executor as room_module
from shoal_storage.eviction import model_deleter
from shoal_storage.leases import last_use as uses_module
from shoal_storage.store.store import Store
from shoal_storage.store.tombstones import finish_delete
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.storage.service.test_deletion import instance_of
from tests.storage.storage_parts import GatedDisk, StorageParts, storage_parts
from tests.storage.store_fixtures import Model, files_below


@pytest.fixture(autouse=True)
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a deletion from a gated store report its end, then wait at the gate."""

    def finish(store: Store, model: ModelId, blobs: Iterable[str]) -> None:
        finish_delete(store, model, blobs)
        if isinstance(store, GatedDisk):
            store.pass_gate()

    monkeypatch.setattr(model_deleter, "finish_delete", finish)


def model_of(name: str, size_bytes: int) -> Model:
    return Model(f"org/{name}", {"weights.bin": (name.encode() * size_bytes)[:size_bytes]})


A, B, C, NEW = model_of("aaa", 1000), model_of("bbb", 1000), model_of("ccc", 1000), model_of("new", 2000)


@pytest.mark.parametrize("others_suffice", [True, False])
async def test_I4_a_victim_used_between_plan_and_step_is_spared(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, others_suffice: bool
) -> None:
    limits = StorageSettings(3000, 0, "lru")
    async with storage_parts(nats, tmp_path, fresh("storage"), limits) as parts:
        await parts.bring_in(*((A, B, C) if others_suffice else (A, B, model_of("pinned", 1000))))
        for pinned in [m for m in parts.ledger.manifests if m.startswith("org/pinned@")]:
            parts.ledger.uses.pin(pinned)
        parts.disk.close_gate()
        reserving = asyncio.create_task(parts.reserve(NEW))  # its plan: A, then B
        await parts.disk.wait_reached()
        name = fresh("instance")
        await parts.here.buckets.spec.put(instance_key(name), instance_of(B, name, parts.node))
        parts.disk.gate.set()
        if others_suffice:
            went = await reserving
            assert went is not None and [v.model for v in went.victims] == [A.name, C.name]
            assert (went.required_bytes, went.freed_bytes, went.enough) == (2000, 2000, True)
            assert went.protected == {B.name: f"used by instance {name}"}
        else:
            with pytest.raises(QuotaExceeded, match="2 models are pinned or in use"):
                await reserving
            assert NEW.name not in parts.ledger.arrivals.reservations and not parts.ledger.arrivals.partials
        assert B.name in parts.ledger.manifests and A.name not in parts.ledger.manifests
        await parts.here.buckets.spec.delete(instance_key(name))


async def pin_b(parts: StorageParts) -> None:
    await parts.maintenance.pin(Pin(model="org/bbb"), "")


async def lease_b(parts: StorageParts) -> None:
    await parts.leases.lease(AcquireLease(model="org/bbb", holder="a test"))


async def delete_b(parts: StorageParts) -> None:
    async with parts.context.section as held:
        await parts.deleter.delete_model(held, B.name)


@pytest.mark.parametrize(("meanwhile", "goes"), [(pin_b, C), (lease_b, C), (delete_b, B)])
async def test_I4_a_victim_is_decided_again_before_its_step(
    nats: NatsServer,
    fresh: Fresh,
    tmp_path: Path,
    meanwhile: Callable[[StorageParts], Coroutine[None, None, None]],
    goes: Model,
) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage"), StorageSettings(3000, 0, "lru")) as parts:
        await parts.bring_in(A, B, C)
        parts.disk.close_gate()
        reserving = asyncio.create_task(parts.reserve(NEW))  # its plan: A, then B
        await parts.disk.wait_reached()
        other = asyncio.create_task(meanwhile(parts))
        await asyncio.sleep(0)  # it waits for the section, which the deletion of A holds
        parts.disk.gate.set()
        went = await reserving
        await other
        assert went is not None and went.enough
        assert [v.model for v in went.victims] == [A.name, goes.name]
        assert parts.ledger.manifests.keys() == {B.name, C.name} - {goes.name}


async def test_I4_nothing_is_evicted_while_instances_are_unknown(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage"), StorageSettings(3000, 0, "lru")) as parts:
        await parts.bring_in(A, B, C)
        before, name = files_below(parts.disk.layout.root), fresh("instance")
        monkeypatch.setattr(uses_module, "CATCH_UP_TIMEOUT_S", 0.3)
        parts.context.specs = KvMirror("spec")  # a mirror that has received nothing
        spec = InstanceSpec(id=name, repo="org/x", commit="c" * 40, stages=[], context_tokens=1)
        await parts.here.buckets.spec.put(instance_key(name), spec)
        with pytest.raises(Unavailable, match="nothing was removed, try again"):
            await parts.reserve(NEW)
        assert files_below(parts.disk.layout.root) == before and not parts.ledger.arrivals.reservations
        await parts.here.buckets.spec.delete(instance_key(name))


async def test_space_the_disk_does_not_free_costs_no_second_model(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "_FREED_DEADLINE_S", 0.3)
    async with storage_parts(nats, tmp_path, fresh("storage"), StorageSettings(None, 0, "lru")) as parts:
        await parts.bring_in(A, B, C)
        parts.disk.claims_free_bytes = 1500  # and no more, as long as somebody holds A's file open
        with pytest.raises(
            QuotaExceeded, match=r"1\.0 kB were evicted for it, but the disk has not released them"
        ) as e:
            await parts.reserve(NEW)
        assert e.value.details["evicted"] == [A.name]
        assert parts.ledger.manifests.keys() == {B.name, C.name}


async def test_changed_settings_apply_from_the_next_request_on(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage"), StorageSettings(3000, 0)) as parts:
        await parts.bring_in(A, B, C)
        with pytest.raises(QuotaExceeded):
            await parts.reserve(NEW)
        parts.context.settings = StorageSettings(4000, 0, "lru")
        went = await parts.reserve(NEW)
        assert went is not None and [v.model for v in went.victims] == [A.name]
