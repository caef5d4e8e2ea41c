"""The fetch API in this process, with gates that hold open the moments a race would need."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shoal_common.bus.keys import instance_key, model_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.config import Config
from shoal_common.errors import Corrupt, NotFound, Unavailable
from shoal_common.host.sd_notify import ServiceManagerNotifier
from shoal_common.liveness.liveness import Liveness
from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.storage import CommitBlob, Delete, Release, Reserve, SealModel
from shoal_common.service import ServiceContext
from shoal_common.settings.node import StorageSettings
from shoal_storage.files.hashing import FileHashes
from shoal_storage.handlers import fetch
from shoal_storage.handlers.fetch import FetchApi
from shoal_storage.leases import last_use as uses_module
from shoal_storage.publisher import StatePublisher
from shoal_storage.startup import recover_store
from shoal_storage.store.partials import verify_partial
from shoal_storage.store.store import Store
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined
from tests.storage.store_fixtures import Model, check_invariants, files_below, put, sha256

GATE_DEADLINE_S = 45.0


class GatedDisk(Store):
    """A disk that stops between verifying a partial blob and returning, until the gate opens."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.verified, self.gate = threading.Event(), threading.Event()


@pytest.fixture(autouse=True)
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a verification of a gated store end at its gate, whatever the result."""

    def verify(store: Store, blob: str, size_bytes: int, leaf_list_digest: str = "") -> FileHashes:
        try:
            return verify_partial(store, blob, size_bytes, leaf_list_digest)
        finally:
            if isinstance(store, GatedDisk):
                store.verified.set()
                assert store.gate.wait(GATE_DEADLINE_S)

    monkeypatch.setattr(fetch, "verify_partial", verify)


class Held:
    """The service under test, and its collaborators."""

    def __init__(self, here: Joined, home: Path, node: str) -> None:
        config = Config(service="storage", node=node, home=home, nats=[])
        liveness = Liveness(here.buckets.live, node, "storage")
        context = ServiceContext(config, {}, here.nats, liveness, ServiceManagerNotifier({}))
        limits = StorageSettings(quota_bytes=None, headroom_bytes=0)
        self.node, self.disk = node, GatedDisk(config.store)
        self.disk.open()
        self.ledger = recover_store(self.disk)
        self.specs = KvMirror("spec")
        announcer = StatePublisher(context, self.disk, self.ledger, limits, KvMirror("state"), KvMirror("state"))
        self.guard = FetchApi(context, self.disk, self.ledger, limits, self.specs, announcer)


@asynccontextmanager
async def holding(server: NatsServer, home: Path, node: str) -> AsyncIterator[Held]:
    """The services of a node, on a real NATS."""
    async with joined(server) as here:
        held = Held(here, home, node)
        try:
            yield held
        finally:
            held.disk.gate.set()
            check_invariants(held.disk.layout.root)


@pytest.mark.parametrize("arrived", [b"w" * 3000, b"\0" * 3000])
async def test_I1_a_verified_partial_does_not_serve_a_new_reservation(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, arrived: bytes
) -> None:
    model = Model("org/model", {"weights.bin": b"w" * 3000})
    async with holding(nats, tmp_path, fresh("guard")) as held:
        (blob,) = (await held.guard.reserve(Reserve(manifest=model.manifest))).missing
        put(held.disk.layout, blob, arrived)
        committing = asyncio.create_task(held.guard.commit(CommitBlob(blob=blob)))
        assert await asyncio.to_thread(held.disk.verified.wait, GATE_DEADLINE_S)
        await held.guard.release(Release(model=model.name))
        await held.guard.reserve(Reserve(manifest=model.manifest))
        put(held.disk.layout, blob, b"x" * 1000)
        held.disk.gate.set()
        with pytest.raises(NotFound, match="was cancelled; reserve it again"):
            await committing
        assert (held.disk.layout.partial(blob) / "data").read_bytes() == b"x" * 1000, "the new bytes were touched"
        with pytest.raises(Corrupt):
            await held.guard.commit(CommitBlob(blob=blob))


async def test_a_caller_that_gives_up_does_not_undo_a_commit(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    model = Model("org/model", {"weights.bin": b"w" * 3000})
    async with holding(nats, tmp_path, fresh("guard")) as held:
        (blob,) = (await held.guard.reserve(Reserve(manifest=model.manifest))).missing
        put(held.disk.layout, blob, b"w" * 3000)
        first, second = (asyncio.create_task(held.guard.commit(CommitBlob(blob=blob))) for _ in range(2))
        assert await asyncio.to_thread(held.disk.verified.wait, GATE_DEADLINE_S)
        first.cancel()
        held.disk.gate.set()
        assert (await second).sha256 == blob
        assert held.ledger.reserved_bytes == 0 and held.ledger.used_bytes == 3000


async def test_I4_nothing_is_deleted_while_instances_are_unknown(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uses_module, "CATCH_UP_TIMEOUT_S", 0.3)
    model, name = Model("org/model", {"weights.bin": b"w" * 3000}), fresh("instance")
    async with holding(nats, tmp_path, fresh("guard")) as held, joined(nats) as here:
        held.disk.gate.set()
        for blob in (await held.guard.reserve(Reserve(manifest=model.manifest))).missing:
            put(held.disk.layout, blob, model.blobs[blob])
            await held.guard.commit(CommitBlob(blob=blob))
        held.ledger.seal(model.sealed)
        before = files_below(held.disk.layout.root)
        spec = InstanceSpec(id=name, repo="org/model", commit=model.manifest.commit, stages=[], context_tokens=1)
        await here.buckets.spec.put(instance_key(name), spec)  # and the mirror has not received it
        with pytest.raises(Unavailable, match="nothing was removed, try again"):
            await held.guard.deletions.delete(Delete(model="org/model"), "id")
        assert files_below(held.disk.layout.root) == before
        await here.buckets.spec.delete(instance_key(name))


async def test_I2_blobs_found_missing_at_a_seal_unpublish_models(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    shared = b"w" * 3000
    first, second = Model("org/first", {"w.bin": shared}), Model("org/second", {"w.bin": shared, "own.bin": b"own"})
    async with holding(nats, tmp_path, fresh("guard")) as held, joined(nats) as here:
        held.disk.gate.set()
        for model in (first, second):
            for blob in (await held.guard.reserve(Reserve(manifest=model.manifest))).missing:
                put(held.disk.layout, blob, model.blobs[blob])
                await held.guard.commit(CommitBlob(blob=blob))
            if model is first:
                await held.guard.seal(SealModel(manifest=model.sealed))
        key = model_key(held.node, first.name)
        assert await here.buckets.state.get(key) is not None
        held.disk.layout.blob(sha256(shared)).unlink()
        with pytest.raises(NotFound, match="is missing"):
            await held.guard.seal(SealModel(manifest=second.sealed))
        assert await here.buckets.state.get(key) is None
        assert held.ledger.incomplete.keys() == {first.name} and not held.ledger.manifests
        held.disk.layout.manifest(first.manifest.repo, first.manifest.commit).unlink()  # for the check of I2
