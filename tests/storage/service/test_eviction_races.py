"""Changes between a plan and its steps: gates hold these moments open, in this process, on a real disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shoal_common.bus.keys import instance_key
from shoal_common.bus.kv_mirror import KvMirror, follow_forever
from shoal_common.config import Config
from shoal_common.errors import QuotaExceeded, Unavailable
from shoal_common.host.sd_notify import ServiceManagerNotifier
from shoal_common.liveness.liveness import Liveness
from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.storage import CommitBlob, EvictionPlan, Reserve, SealModel
from shoal_common.service import ServiceContext
from shoal_common.settings.node import StorageSettings
from shoal_storage.eviction import executor as room_module
from shoal_storage.handlers import deletion
from shoal_storage.handlers.fetch import FetchApi
from shoal_storage.leases import last_use as uses_module
from shoal_storage.publisher import StatePublisher
from shoal_storage.startup import recover_store
from shoal_storage.store.store import Store
from shoal_storage.store.tombstones import finish_delete
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined
from tests.storage.service.test_deletion import instance_of
from tests.storage.store_fixtures import Model, check_invariants, files_below, put

GATE_DEADLINE_S = 45.0


class GatedDisk(Store):
    """A disk that stops after it has deleted a model, and may hide the freed space."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.deleted, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.claims_free_bytes: int | None = None

    def free_bytes(self) -> int:
        """The free space that the test sets."""
        return super().free_bytes() if self.claims_free_bytes is None else self.claims_free_bytes


@pytest.fixture(autouse=True)
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a deletion from a gated store report its end, then wait at the gate."""

    def finish(store: Store, repo: str, commit: str, blobs: Iterable[str]) -> None:
        finish_delete(store, repo, commit, blobs)
        if isinstance(store, GatedDisk):
            store.deleted.set()
            assert store.gate.wait(GATE_DEADLINE_S)

    monkeypatch.setattr(deletion, "finish_delete", finish)


class Held:
    """A service that evicts, and its collaborators."""

    def __init__(self, here: Joined, home: Path, node: str, limits: StorageSettings) -> None:
        config = Config(service="storage", node=node, home=home, nats=[])
        context = ServiceContext(
            config, {}, here.nats, Liveness(here.buckets.live, node, "storage"), ServiceManagerNotifier({})
        )
        self.here, self.node = here, node
        self.disk = GatedDisk(config.store)
        self.disk.open()
        self.ledger, self.specs = recover_store(self.disk), KvMirror("spec")
        announcer = StatePublisher(context, self.disk, self.ledger, limits, KvMirror("state"), KvMirror("state"))
        self.guard = FetchApi(context, self.disk, self.ledger, limits, self.specs, announcer)

    async def bring_in(self, *models: Model) -> None:
        """Complete models, the first one least recently used."""
        for model in models:
            for blob in (await self.guard.reserve(Reserve(manifest=model.manifest))).missing:
                put(self.disk.layout, blob, model.blobs[blob])
                await self.guard.commit(CommitBlob(blob=blob))
            await self.guard.seal(SealModel(manifest=model.sealed))
            self.ledger.uses.record_use(model.name, float(len(self.ledger.manifests)))

    async def reserve(self, model: Model) -> EvictionPlan | None:
        """The models evicted so that a model may be admitted."""
        return (await self.guard.reserve(Reserve(manifest=model.manifest))).evicted


@asynccontextmanager
async def holding(server: NatsServer, home: Path, node: str, limits: StorageSettings) -> AsyncIterator[Held]:
    """The services of a node on a real NATS, which learns of instances as they are placed."""
    async with joined(server) as here:
        held = Held(here, home, node, limits)
        following = asyncio.create_task(follow_forever(here.nats, held.specs))
        await held.specs.wait_loaded(GATE_DEADLINE_S)
        try:
            yield held
        finally:
            held.disk.gate.set()
            following.cancel()
            check_invariants(held.disk.layout.root)


def model_of(name: str, size_bytes: int) -> Model:
    return Model(f"org/{name}", {"weights.bin": (name.encode() * size_bytes)[:size_bytes]})


A, B, C, NEW = model_of("aaa", 1000), model_of("bbb", 1000), model_of("ccc", 1000), model_of("new", 2000)


@pytest.mark.parametrize("others_suffice", [True, False])
async def test_I4_a_victim_used_between_plan_and_step_is_spared(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, others_suffice: bool
) -> None:
    limits = StorageSettings(3000, 0, "lru")
    async with holding(nats, tmp_path, fresh("storage"), limits) as held:
        await held.bring_in(*((A, B, C) if others_suffice else (A, B, model_of("pinned", 1000))))
        for pinned in [m for m in held.ledger.manifests if m.startswith("org/pinned@")]:
            held.ledger.uses.pin(pinned)
        held.disk.deleted.clear()
        held.disk.gate.clear()
        reserving = asyncio.create_task(held.reserve(NEW))  # its plan: A, then B
        assert await asyncio.to_thread(held.disk.deleted.wait, GATE_DEADLINE_S)
        name = fresh("instance")
        await held.here.buckets.spec.put(instance_key(name), instance_of(B, name, held.node))
        held.disk.gate.set()
        if others_suffice:
            went = await reserving
            assert went is not None and [v.model for v in went.victims] == [A.name, C.name]
            assert (went.required_bytes, went.freed_bytes, went.enough) == (2000, 2000, True)
            assert went.protected == {B.name: f"used by instance {name}"}
        else:
            with pytest.raises(QuotaExceeded, match="2 models are pinned or in use"):
                await reserving
            assert NEW.name not in held.ledger.arrivals.reservations and not held.ledger.arrivals.partials
        assert B.name in held.ledger.manifests and A.name not in held.ledger.manifests
        await held.here.buckets.spec.delete(instance_key(name))


async def test_I4_nothing_is_evicted_while_instances_are_unknown(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with holding(nats, tmp_path, fresh("storage"), StorageSettings(3000, 0, "lru")) as held:
        await held.bring_in(A, B, C)
        before, name = files_below(held.disk.layout.root), fresh("instance")
        monkeypatch.setattr(uses_module, "CATCH_UP_TIMEOUT_S", 0.3)
        held.guard.evictions._usage._specs = KvMirror("spec")  # a mirror that has received nothing
        spec = InstanceSpec(id=name, repo="org/x", commit="c" * 40, stages=[], context_tokens=1)
        await held.here.buckets.spec.put(instance_key(name), spec)
        with pytest.raises(Unavailable, match="nothing was removed, try again"):
            await held.reserve(NEW)
        assert files_below(held.disk.layout.root) == before and not held.ledger.arrivals.reservations
        await held.here.buckets.spec.delete(instance_key(name))


async def test_space_the_disk_does_not_free_costs_no_second_model(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "_FREED_DEADLINE_S", 0.3)
    async with holding(nats, tmp_path, fresh("storage"), StorageSettings(None, 0, "lru")) as held:
        await held.bring_in(A, B, C)
        held.disk.claims_free_bytes = 1500  # and no more, as long as somebody holds A's file open
        with pytest.raises(
            QuotaExceeded, match=r"1\.0 kB were evicted for it, but the disk has not released them"
        ) as e:
            await held.reserve(NEW)
        assert e.value.details["evicted"] == [A.name]
        assert held.ledger.manifests.keys() == {B.name, C.name}


async def test_changed_settings_apply_from_the_next_request_on(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with holding(nats, tmp_path, fresh("storage"), StorageSettings(3000, 0)) as held:
        await held.bring_in(A, B, C)
        with pytest.raises(QuotaExceeded):
            await held.reserve(NEW)
        held.guard.apply_settings(StorageSettings(4000, 0, "lru"))
        went = await held.reserve(NEW)
        assert went is not None and [v.model for v in went.victims] == [A.name]
