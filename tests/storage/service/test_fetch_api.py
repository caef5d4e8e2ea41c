"""The fetch API in this process, with gates that hold open the moments a race would need."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shoal_common.bus.keys import instance_key, model_key
from shoal_common.errors import BadInput, Corrupt, NotFound, Unavailable
from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.storage import CommitBlob, Delete, Release, Reserve, SealModel
from shoal_storage.admission.name_folding import NameFolding
from shoal_storage.files.hashing import FileHashes
from shoal_storage.handlers import fetch
from shoal_storage.leases import last_use as uses_module
from shoal_storage.store.commit import find_by_git_sha1
from shoal_storage.store.partials import verify_partial
from shoal_storage.store.store import Store
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer, joined
from tests.storage.storage_parts import GatedDisk, storage_parts
from tests.storage.store_fixtures import Model, files_below, put, sha256


@pytest.fixture(autouse=True)
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a verification of a gated store end at its gate, whatever the result."""

    def verify(store: Store, blob: str, size_bytes: int, leaf_list_digest: str = "") -> FileHashes:
        try:
            return verify_partial(store, blob, size_bytes, leaf_list_digest)
        finally:
            if isinstance(store, GatedDisk):
                store.pass_gate()

    monkeypatch.setattr(fetch, "verify_partial", verify)


@pytest.mark.parametrize("arrived", [b"w" * 3000, b"\0" * 3000])
async def test_I1_a_verified_partial_does_not_serve_a_new_reservation(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, arrived: bytes
) -> None:
    model = Model("org/model", {"weights.bin": b"w" * 3000})
    async with storage_parts(nats, tmp_path, fresh("storage"), with_specs=False) as parts:
        (blob,) = (await parts.fetch.reserve(Reserve(manifest=model.manifest))).missing
        put(parts.disk.layout, blob, arrived)
        parts.disk.close_gate()
        committing = asyncio.create_task(parts.fetch.commit(CommitBlob(blob=blob)))
        await parts.disk.wait_reached()
        await parts.fetch.release(Release(model=model.name, blobs=list(model.blobs)))
        await parts.fetch.reserve(Reserve(manifest=model.manifest))
        put(parts.disk.layout, blob, b"x" * 1000)
        parts.disk.gate.set()
        with pytest.raises(NotFound, match="was cancelled; reserve it again"):
            await committing
        assert (parts.disk.layout.partial(blob) / "data").read_bytes() == b"x" * 1000, "the new bytes were touched"
        with pytest.raises(Corrupt):
            await parts.fetch.commit(CommitBlob(blob=blob))


async def test_a_release_ends_a_reservation_that_is_still_being_made(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model("org/model", {"weights.bin": b"w" * 3000, "config.json": b"{}"}, by_git=("config.json",))
    async with storage_parts(nats, tmp_path, fresh("storage"), with_specs=False) as parts:

        def find(store: Store, blob: str, candidates: list[str]) -> str | None:
            parts.disk.pass_gate()
            return find_by_git_sha1(store, blob, candidates)

        monkeypatch.setattr(fetch, "find_by_git_sha1", find)
        parts.disk.close_gate()
        reserving = asyncio.create_task(parts.fetch.reserve(Reserve(manifest=model.manifest)))
        await parts.disk.wait_reached()
        releasing = asyncio.create_task(parts.fetch.release(Release(model=model.name, blobs=list(model.blobs))))
        parts.disk.gate.set()
        await releasing
        await reserving
        assert parts.ledger.reserved_bytes == 0
        assert not list(parts.disk.layout.partials.iterdir())


async def test_a_caller_that_gives_up_does_not_undo_a_commit(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    model = Model("org/model", {"weights.bin": b"w" * 3000})
    async with storage_parts(nats, tmp_path, fresh("storage"), with_specs=False) as parts:
        (blob,) = (await parts.fetch.reserve(Reserve(manifest=model.manifest))).missing
        put(parts.disk.layout, blob, b"w" * 3000)
        parts.disk.close_gate()
        first, second = (asyncio.create_task(parts.fetch.commit(CommitBlob(blob=blob))) for _ in range(2))
        await parts.disk.wait_reached()
        first.cancel()
        parts.disk.gate.set()
        assert (await second).sha256 == blob
        assert parts.ledger.reserved_bytes == 0 and parts.ledger.used_bytes == 3000


async def test_I4_nothing_is_deleted_while_instances_are_unknown(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uses_module, "CATCH_UP_TIMEOUT_S", 0.3)
    model, name = Model("org/model", {"weights.bin": b"w" * 3000}), fresh("instance")
    async with storage_parts(nats, tmp_path, fresh("storage"), with_specs=False) as parts, joined(nats) as here:
        await parts.fetch_blobs(model)
        parts.ledger.seal(model.sealed)
        before = files_below(parts.disk.layout.root)
        spec = InstanceSpec(id=name, repo="org/model", commit=model.manifest.commit, stages=[], context_tokens=1)
        await here.buckets.spec.put(instance_key(name), spec)  # and the mirror has not received it
        with pytest.raises(Unavailable, match="nothing was removed, try again"):
            await parts.delete_command.delete(Delete(model="org/model"), "id")
        assert files_below(parts.disk.layout.root) == before
        await here.buckets.spec.delete(instance_key(name))


async def test_I2_blobs_found_missing_at_a_seal_unpublish_models(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    shared = b"w" * 3000
    first, second = Model("org/first", {"w.bin": shared}), Model("org/second", {"w.bin": shared, "own.bin": b"own"})
    async with storage_parts(nats, tmp_path, fresh("storage")) as parts, joined(nats) as here:
        await parts.bring_in(first)
        await parts.fetch_blobs(second)
        key = model_key(parts.node, first.name)
        assert await here.buckets.state.get(key) is not None
        parts.disk.layout.blob(sha256(shared)).unlink()
        with pytest.raises(NotFound, match="is missing"):
            await parts.fetch.seal(SealModel(manifest=second.sealed))
        assert await here.buckets.state.get(key) is None
        assert parts.ledger.incomplete.keys() == {first.name} and not parts.ledger.manifests
        parts.disk.layout.manifest(first.manifest.model).unlink()  # for the check of I2


async def test_twins_are_refused_before_a_byte_where_names_fold(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    twins = Model("org/twins", {"README.md": b"one", "readme.md": b"other"})
    async with storage_parts(nats, tmp_path, fresh("storage"), with_specs=False) as parts:
        parts.disk.name_folding = NameFolding(case=True, forms=True)
        with pytest.raises(BadInput, match=r"'README\.md' and 'readme\.md'"):
            await parts.fetch.reserve(Reserve(manifest=twins.manifest))
        assert files_below(parts.disk.layout.root) == set()
        parts.disk.name_folding = NameFolding()
        assert len((await parts.fetch.reserve(Reserve(manifest=twins.manifest))).missing) == 2
