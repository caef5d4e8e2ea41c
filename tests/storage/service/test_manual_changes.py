"""The disk is right while storage runs: files that people delete, replace or copy in are noticed, never trusted."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal_common.messages.storage import CollectGarbage, StorageState, Verify
from shoal_storage.files.blob_stat import stat_blob
from shoal_storage.scan import unverified
from tests.fileserver.running_fileserver import Fileserver
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.storage.running_storage import Node, on_node
from tests.storage.service.test_verifier import fileserver_of
from tests.storage.store_fixtures import Model, StoreFixture, check_invariants, files_below, files_of, sha256

WAIT_TIMEOUT_S = 40.0


LARGE = Model("org/large", {"weights.bin": bytes(range(256)) * 12000, "config.json": b"{}", "own.bin": b"own"})


WEIGHTS = sha256(LARGE.bytes["weights.bin"])


async def wait_published(node: Node, model: Model) -> None:
    """Return once a model of this node is published."""
    await eventually(lambda: node.model_state(model), f"{model.name} is announced", WAIT_TIMEOUT_S)


async def wait_unpublished(node: Node, model: Model) -> None:
    """Return once it is unpublished."""

    async def unpublished() -> bool:
        return await node.model_state(model) is None

    await eventually(unpublished, f"{model.name} is unpublished", WAIT_TIMEOUT_S)


async def wait_storage_state(node: Node, what: str, holds: Callable[[StorageState], bool]) -> StorageState:
    """Return the published state of the storage, once the condition holds."""

    async def asked() -> StorageState | None:
        state = await node.storage_state()
        return state if holds(state) else None

    return await eventually(asked, what, WAIT_TIMEOUT_S)


def store_elsewhere(directory: Path, *models: Model) -> StoreFixture:
    """Another store with models, as a person may have one on a disk."""
    store = StoreFixture(directory / "elsewhere")
    for model in models:
        store.bring_in(model)
    return store


def copied(source: StoreFixture, node: Node, path: Path, like: Callable[[Path, Path], object] = shutil.copy2) -> Path:
    """Copy a file of another store to its place in this one."""
    target = node.layout.root / path.relative_to(source.root)
    target.parent.mkdir(parents=True, exist_ok=True)
    like(path, target)
    return target


def manifest_path(store: StoreFixture, model: Model) -> Path:
    """The path of a model's manifest in a store."""
    return store.layout.manifest(model.sealed.model)


async def test_a_model_goes_with_a_removed_blob_and_returns_with_it(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    async with (
        on_node(nats, tmp_path, fresh("storage")) as node,
        node.storage(),
        fileserver_of(node, nats) as fileserver,
    ):
        await node.bring_in(LARGE)
        await node.bring_in(apples)
        path, aside = node.layout.blob(WEIGHTS), tmp_path / "aside"
        shutil.copy2(path, aside)
        path.unlink()
        await wait_unpublished(node, LARGE)
        await wait_storage_state(node, "one model is left", lambda s: s.model_count == 1)
        assert await node.model_state(apples)
        assert (await node.reserve(LARGE.manifest)).missing == [WEIGHTS]
        await node.release(LARGE.manifest)
        shutil.copy2(aside, path)
        await wait_published(node, LARGE)
        assert (await fileserver.blob(WEIGHTS)).body == LARGE.bytes["weights.bin"]
        assert path.stat().st_mode & 0o777 == 0o444
        assert files_below(node.layout.root) == files_of(LARGE, apples)
        await node.wait_events("model_ready", "model_ready", "model_lost", "model_found")
        events = [(name, event.get("models") or event.get("model")) for name, event in await node.events()]
        assert events[-2:] == [("model_lost", [LARGE.name]), ("model_found", LARGE.name)]


async def test_a_model_goes_with_its_manifest_and_no_blob_is_deleted(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage():
        await node.bring_in(LARGE)
        path, aside = node.layout.manifest(LARGE.sealed.model), tmp_path / "aside"
        shutil.move(path, aside)
        await wait_unpublished(node, LARGE)
        state = await wait_storage_state(node, "the manifest is missed", lambda s: s.model_count == 0)
        assert (state.blob_count, state.foreign_count) == (3, 0)
        assert all(node.layout.blob(b).exists() for b in LARGE.sealed.blob_sizes)
        shutil.move(aside, path)
        await wait_published(node, LARGE)
        path.unlink()
        await wait_unpublished(node, LARGE)
        collected = await node.command("gc", CollectGarbage())
        assert collected.ok and collected.result["blobs"] == 3, "what no manifest names is garbage"


@pytest.mark.parametrize(
    "order", ["manifest first", "manifest last", "manifest between", "blob slowly, manifest first"]
)
@pytest.mark.parametrize("like", [shutil.copy2, shutil.copyfile, os.link])
async def test_I1_a_copied_model_is_offered_once_complete_and_verified(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, order: str, like: Callable[[Path, Path], object]
) -> None:
    source = store_elsewhere(tmp_path, LARGE)
    manifest = manifest_path(source, LARGE)
    weights, *others = [source.layout.blob(b) for b in (WEIGHTS, *sorted(LARGE.sealed.blob_sizes.keys() - {WEIGHTS}))]
    async with (
        on_node(nats, tmp_path, fresh("storage")) as node,
        node.storage() as process,
        fileserver_of(node, nats) as fileserver,
    ):
        for path in {
            "manifest first": [manifest, *others],
            "manifest last": others,
            "manifest between": [others[0], manifest, *others[1:]],
            "blob slowly, manifest first": [manifest, *others],
        }[order]:
            copied(source, node, path, like)
        if order == "blob slowly, manifest first":
            await in_pieces(node, fileserver, weights)
        else:
            process.send(signal.SIGSTOP)
            copied(source, node, weights, like)
            # Before storage has seen any of it: blobs that carry another storage's stamp are verified.
            assert (await fileserver.blob(WEIGHTS)).status == (200 if like is os.link else 404)
            process.send(signal.SIGCONT)
        if order == "manifest last":
            await wait_storage_state(node, "the blobs are verified", lambda s: s.blob_count == 3)
            assert await node.model_state(LARGE) is None
            copied(source, node, manifest, like)
        await wait_published(node, LARGE)
        assert (await fileserver.blob(WEIGHTS)).body == LARGE.bytes["weights.bin"]
        view = node.layout.view(LARGE.sealed.model)
        assert {p: (view / p).read_bytes() for p in LARGE.bytes} == LARGE.bytes
        state = await wait_storage_state(node, "all is verified", lambda s: s.blob_count == 3)
        assert (state.unverified_count, state.foreign_count) == (0, 0)
        assert state.used_bytes == LARGE.sealed.size_bytes
        assert files_below(node.layout.root) == files_of(LARGE)
        assert {p.stat().st_mode & 0o777 for p in node.layout.blobs.glob("*/*")} == {0o444}
        await node.wait_events("model_found")


async def in_pieces(node: Node, fileserver: Fileserver, source: Path) -> None:
    """Copy a blob so slowly that storage notices each piece before the next; it is never offered meanwhile."""
    target = node.layout.blob(source.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = LARGE.bytes["weights.bin"]
    step = len(data) // 3 + 1
    for at in range(0, len(data), step):
        assert await node.model_state(LARGE) is None
        with target.open("ab") as f:
            f.write(data[at : at + step])
        if at + step < len(data):
            target.chmod(0o444)  # as `cp` from another store has it from the first byte on
            expected = sum(len(d) for name, d in LARGE.bytes.items() if name != "weights.bin") + at + step
            await wait_storage_state(node, "the piece is noticed", lambda s, e=expected: s.used_bytes == e)  # type: ignore[misc]
            assert (await fileserver.blob(source.name)).status == 404
            target.chmod(0o644)


@pytest.mark.parametrize("when", ["clear_stamp", "fsync_path"])
def test_a_file_written_while_found_corrupt_is_hashed_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    store = StoreFixture(root)
    path = store.layout.blob(WEIGHTS)
    path.parent.mkdir(parents=True)
    path.write_bytes(LARGE.bytes["weights.bin"][:1000])
    hashed = stat_blob(store.layout, path)
    assert hashed is not None
    step = getattr(unverified, when)

    def written_meanwhile(*arguments: object) -> None:
        step(*arguments)
        with path.open("ab") as f:
            f.write(LARGE.bytes["weights.bin"][1000:])

    monkeypatch.setattr(unverified, when, written_meanwhile)
    corrupt, now = unverified.mark_corrupt(store.disk, WEIGHTS, hashed), stat_blob(store.layout, path)
    assert now is not None and (corrupt is None or not corrupt.same_file(now)), "the whole file is taken for the part"


async def test_I1_a_copy_with_a_wrong_byte_is_never_offered_or_deleted(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    source = store_elsewhere(tmp_path, LARGE)
    right = LARGE.bytes["weights.bin"]
    wrong = right[:-1] + b"?"
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.fetcher():
        async with node.storage() as process, fileserver_of(node, nats) as fileserver:
            for blob in LARGE.sealed.blob_sizes.keys() - {WEIGHTS}:
                copied(source, node, source.layout.blob(blob))
            copied(source, node, manifest_path(source, LARGE))
            path = node.layout.blob(WEIGHTS)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(wrong)
            path.chmod(0o444)
            state = await wait_storage_state(
                node, "it is judged", lambda s: s.foreign_count == 1 and s.blob_count == 2
            )
            assert (state.unverified_count, state.foreign_bytes) == (0, len(wrong))
            assert state.foreign_files == [str(path.relative_to(node.layout.root))]
            assert state.used_bytes == LARGE.sealed.size_bytes
            assert state.incomplete == [LARGE.name], "it stays in sight"
            await process.wait_line("copied-in file is corrupt; left in place", WEIGHTS)
            assert (await fileserver.blob(WEIGHTS)).status == 404
            assert (await node.command("gc", CollectGarbage())).ok
            assert (await node.command("verify", Verify())).ok
            assert path.read_bytes() == wrong and await node.model_state(LARGE) is None
            await process.kill()
        async with node.storage(), fileserver_of(node, nats) as fileserver:
            state = await wait_storage_state(node, "it is judged again", lambda s: s.foreign_count == 1)
            assert path.read_bytes() == wrong and await node.model_state(LARGE) is None
            assert (await fileserver.blob(WEIGHTS)).status == 404
            # A file that somebody repairs is hashed again.
            with path.open("r+b") as f:
                f.seek(len(right) - 1)
                f.write(right[-1:])
            await wait_published(node, LARGE)
            assert (await fileserver.blob(WEIGHTS)).body == right
            await wait_storage_state(node, "nothing is unknown", lambda s: s.foreign_count == 0)


async def test_I1_a_blob_written_in_place_loses_its_models_until_pull(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with (
        on_node(nats, tmp_path, fresh("storage")) as node,
        node.storage(),
        fileserver_of(node, nats) as fileserver,
    ):
        await node.bring_in(LARGE)
        in_view = node.layout.view_file(LARGE.sealed, "weights.bin")
        in_view.chmod(0o644)
        with in_view.open("r+b") as f:
            f.write(b"?????")
        assert (await fileserver.blob(WEIGHTS)).status == 404, "from that very moment on"
        await wait_unpublished(node, LARGE)
        await wait_storage_state(node, "it is judged", lambda s: s.foreign_count == 1)
        assert not in_view.exists(), "nothing loads it"
        await node.bring_in(LARGE)
        assert await node.model_state(LARGE)
        assert (await fileserver.blob(WEIGHTS)).body == LARGE.bytes["weights.bin"]
        state = await node.storage_state()
        assert (state.foreign_count, state.unverified_count) == (0, 0)
        check_invariants(node.layout.root)


async def test_removed_or_replaced_files_of_a_view_are_linked_again(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage():
        await node.bring_in(LARGE)
        config = node.layout.view_file(LARGE.sealed, "config.json")

        async def linked() -> bool:
            return all(
                node.layout.view_file(LARGE.sealed, f.path).exists()
                and node.layout.view_file(LARGE.sealed, f.path).samefile(node.layout.blob(f.sha256))
                for f in LARGE.sealed.files
            )

        config.unlink()
        await eventually(linked, "a removed file is back", WAIT_TIMEOUT_S)
        config.unlink()
        config.write_text("my own")
        await eventually(linked, "a replaced file is the blob", WAIT_TIMEOUT_S)
        shutil.rmtree(node.layout.views / "org--large")
        await eventually(linked, "a removed view is back", WAIT_TIMEOUT_S)
        assert await node.model_state(LARGE)
