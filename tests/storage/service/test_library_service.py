"""Models of libraries: hashed, offered and served in place, unpublished when they change, never touched."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import (
    CollectGarbage,
    Configure,
    GetManifest,
    LibraryState,
    Pin,
    Verify,
)
from shoal_common.names import model_id
from shoal_common.settings.node import StorageSettings
from shoal_common.store.store_paths import StorePaths
from shoal_storage.libraries import service as library_service
from shoal_storage.libraries.recognize import LibraryListing
from shoal_storage.libraries.scanner import list_library
from shoal_storage.libraries.service import LibraryService
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.storage.library_fixtures import (
    FILES,
    OURS,
    THEIRS,
    WEIGHTS,
    cached,
    hashed,
    is_served,
    listening,
    mounted_read_only,
    on_node_with,
    set_libraries,
    snapshot_tree,
    wait_library_state,
    wait_published,
    wait_unpublished,
)
from tests.storage.running_storage import on_node
from tests.storage.service.test_verifier import fileserver_of
from tests.storage.storage_parts import GATE_DEADLINE_S, storage_parts
from tests.storage.store_fixtures import Model, StoreFixture, files_below, git_sha1, sha256


async def test_I4_a_library_is_offered_and_served_and_never_written(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    cache = tmp_path / "hub"
    snapshot = cached(cache, "org/theirs", THEIRS.manifest.commit, FILES)
    before = snapshot_tree(cache)
    with mounted_read_only(cache) as root:
        async with (
            on_node_with(nats, tmp_path, fresh("node"), root) as node,
            node.fetcher(),
            listening(node) as process,
            fileserver_of(node, nats) as fileserver,
        ):
            state = await wait_published(node, THEIRS.name)
            assert state.library_directory == str(root / snapshot.relative_to(cache))
            assert (state.revisions, state.size_bytes, state.file_count) == (
                ["main"],
                sum(map(len, FILES.values())),
                3,
            )
            assert all([await is_served(fileserver, data) for data in FILES.values()])
            ranged = await fileserver.ask(f"/v1/blobs/{sha256(WEIGHTS)}", {"Range": "bytes=1000-1009"})
            assert (ranged.status, ranged.body) == (206, WEIGHTS[1000:1010])
            view = node.layout.view(model_id("org/theirs", THEIRS.manifest.commit))
            assert {p: (view / p).read_bytes() for p in FILES} == FILES
            manifest = await node.ask("manifest", GetManifest(model="org/theirs"), Manifest)
            assert sorted(f.path for f in manifest.files) == sorted(FILES) and manifest.sealed

            await wait_library_state(node, lambda r: r.model_count == 1)
            disk = await node.storage_state()
            assert (disk.used_bytes, disk.blob_count, disk.model_count) == (0, 0, 0), "nothing of it is the store's"
            assert disk.libraries == [LibraryState(path=str(root), model_count=1)]
            await node.wait_events("library_model_found")

            reserved = await node.reserve(THEIRS.manifest)
            assert (
                reserved.missing == []
                and (await node.seal(THEIRS.sealed)).library_directory == state.library_directory
            )
            assert list(node.layout.manifests.iterdir()) == [], "a pull of a library model leaves it where it is"
            refused = await node.delete("org/theirs")
            assert refused.error is not None and refused.error.code == "refused"
            assert "remove it there" in refused.error.message and str(root) in refused.error.message
            pinned = await node.command("pin", Pin(model="org/theirs"))
            assert pinned.error is not None and pinned.error.code == "refused"
            await node.command("configure", Configure(eviction_policy="lru", max_storage_bytes=1))
            plan = await node.plan(10**9)
            assert not plan.enough and plan.evictable_bytes == 0
            assert (await node.command("gc", CollectGarbage())).result == {"freed_bytes": 0, "blobs": 0}
            verified = (await node.command("verify", Verify(model="org/theirs"))).result
            assert (verified["checked"], verified["corrupt"], verified["missing"]) == (3, [], [])
            assert (await node.command("verify", Verify())).result["checked"] == 3
            assert len(hashed(process)) == 1
            assert await wait_published(node, THEIRS.name) == state
    assert snapshot_tree(cache) == before


async def test_a_model_sharing_files_with_a_library_fetches_the_rest(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    cache = tmp_path / "hub"
    cached(cache, "org/theirs", THEIRS.manifest.commit, FILES)
    before = snapshot_tree(cache)
    async with (
        on_node_with(nats, tmp_path, fresh("node"), cache) as node,
        node.fetcher(),
        listening(node, SHOAL_MAX_STORAGE_BYTES="1000") as process,
    ):
        await wait_published(node, THEIRS.name)
        by_git = Model("org/by-git", {"config.json": FILES["config.json"]}, by_git=("config.json",))
        reserved = await node.reserve(by_git.manifest)
        sha = sha256(FILES["config.json"])
        assert (reserved.missing, reserved.sha256_by_git_name) == ([], {f"git-{git_sha1(FILES['config.json'])}": sha})
        await node.release(by_git.manifest)

        assert (await node.reserve(OURS.manifest)).missing == [sha256(OURS.bytes["own.bin"])]
        await node.bring_in(OURS)
        view = node.layout.view(model_id("org/ours", OURS.manifest.commit))
        assert {p: (view / p).read_bytes() for p in OURS.bytes} == OURS.bytes
        assert (await node.storage_state()).used_bytes == 300
        await process.kill()
        async with listening(node) as again:
            assert await node.model_state(OURS) is not None, "not unpublished by a start"
            assert hashed(again) == []
            await set_libraries(node)
            assert await node.model_state(THEIRS) is None and await node.model_state(OURS) is None
            assert "org/ours" in await again.wait_line("model is incomplete, it used files of a library")
            assert (await node.reserve(OURS.manifest)).missing == [sha256(WEIGHTS)]
            await node.release(OURS.manifest)
            await set_libraries(node, cache)
            await wait_published(node, OURS.name)
            assert {p: (view / p).read_bytes() for p in OURS.bytes} == OURS.bytes
            assert (await node.delete("org/ours")).result["freed_bytes"] == 300
            await wait_published(node, THEIRS.name)
    assert snapshot_tree(cache) == before


async def test_removing_a_library_removes_our_records_and_no_files(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    cache = tmp_path / "hub"
    cached(cache, "org/theirs", THEIRS.manifest.commit, FILES)
    before = snapshot_tree(cache)
    async with (
        on_node_with(nats, tmp_path, fresh("node"), cache) as node,
        listening(node),
        fileserver_of(node, nats) as fileserver,
    ):
        await wait_published(node, THEIRS.name)
        await set_libraries(node)
        assert await node.model_state(THEIRS) is None
        assert not await is_served(fileserver, WEIGHTS)
        assert {p.partition("/")[0] for p in files_below(node.layout.root)} == {"libraries"}
        assert files_below(node.layout.root) == {"libraries/verified.json"}
        text = (node.home / "node.toml").read_text()
        assert "# mine" in text and "# theirs" in text and "# the NAS" in text and "libraries" not in text
        await node.wait_events("library_model_found", "library_model_removed", "settings_changed")
    assert snapshot_tree(cache) == before


async def test_another_store_is_a_library_like_any_other(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model, pears: Model
) -> None:
    theirs = StoreFixture(tmp_path / "theirs")
    for model in (apples, pears):
        theirs.bring_in(model)
    before = snapshot_tree(theirs.root)
    async with (
        on_node_with(nats, tmp_path, fresh("node"), theirs.root) as node,
        node.fetcher(),
        listening(node),
        fileserver_of(node, nats) as fileserver,
    ):
        for model in (apples, pears):
            await wait_published(node, model.name)
            view = node.layout.view(model.manifest.model)
            assert {p: (view / p).read_bytes() for p in model.bytes} == model.bytes
            assert all([await is_served(fileserver, data) for data in model.bytes.values()])
        assert not (await node.delete("org/apples")).ok
    assert snapshot_tree(theirs.root) == before


async def test_a_missing_library_is_reported_and_prevents_no_start(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    root = tmp_path / "nas"
    cached(root, "org/theirs", THEIRS.manifest.commit, FILES)
    async with on_node_with(nats, tmp_path, fresh("node"), root, tmp_path / "never") as node:
        async with listening(node) as process:
            await wait_published(node, THEIRS.name)
            await wait_library_state(node, lambda r: r.model_count == 1)
            states = (await node.storage_state()).libraries
            assert [(s.error, s.model_count) for s in states] == [("", 1), ("No such file or directory", 0)]
            await process.wait_line("library cannot be scanned", "never")
            root.rename(tmp_path / "unmounted")
            await set_libraries(node, root, tmp_path / "never")
            await wait_unpublished(node, THEIRS.name)
        async with listening(node) as process:
            assert (await node.storage_state()).libraries[0].error == "No such file or directory"
            (tmp_path / "unmounted").rename(root)
            await set_libraries(node, root, tmp_path / "never")
            await wait_published(node, THEIRS.name)
            assert hashed(process) == [], "what was hashed before it went away still counts"


async def test_library_settings_follow_the_environment_and_are_checked(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    cached(one, "org/theirs", THEIRS.manifest.commit, FILES)
    two.mkdir()
    async with on_node_with(nats, tmp_path, fresh("node"), tmp_path / "file") as node:
        async with listening(node, SHOAL_LIBRARIES=os.pathsep.join([str(one), str(two)])):
            await wait_published(node, THEIRS.name)
            state = await node.storage_state()
            assert [r.path for r in state.libraries] == [str(one), str(two)]
            assert "libraries" in state.overridden_by_env
            applied = await node.set_directories(libraries=[two])
            assert applied.ok and applied.result["libraries"] == [str(one), str(two)]
            assert "libraries" in applied.result["overridden_by_env"]
            await node.set_directories(libraries=[])
        async with listening(node):
            assert await node.model_state(THEIRS) is None
            text = (node.home / "node.toml").read_text()
            for bad in (["relative"], [str(node.layout.root)], [str(tmp_path)], ["/x\n"]):
                outcome = await node.set_directories(libraries=bad)
                assert outcome.error is not None and outcome.error.code == "bad_input", bad
            assert (node.home / "node.toml").read_text() == text


async def test_an_eviction_spares_libraries_and_offers_their_copies(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, pears: Model
) -> None:
    cache = tmp_path / "hub"
    async with on_node(nats, tmp_path, fresh("node")) as node, node.fetcher(), listening(node):
        await node.bring_in(THEIRS)
        cached(cache, "org/theirs", THEIRS.manifest.commit, FILES)
        before = snapshot_tree(cache)
        await set_libraries(node, cache)
        await wait_library_state(node, lambda r: r.model_count == 1)
        own = await node.model_state(THEIRS)
        assert own is not None and own.library_directory == "", "what the store has is the store's"
        quota = own.size_bytes + 10
        await node.command("configure", Configure(eviction_policy="lru", max_storage_bytes=quota))
        await node.bring_in(pears)
        state = await node.model_state(THEIRS)
        assert state is not None and state.library_directory.startswith(str(cache))
        view = node.layout.view(model_id("org/theirs", THEIRS.manifest.commit))
        assert {p: (view / p).read_bytes() for p in FILES} == FILES
        assert (await node.storage_state()).used_bytes == pears.manifest.size_bytes
        assert snapshot_tree(cache) == before


def test_library_records_have_paths_of_their_own() -> None:
    paths = StorePaths(Path("/s"))
    assert paths.library_blob("a" * 64) == Path("/s/libraries/blobs/aa") / ("a" * 64)
    assert (
        paths.library_model(model_id("org/name", "c" * 40)) == Path("/s/libraries/models") / f"org--name@{'c' * 40}"
    )


async def test_a_setting_changed_during_a_scan_mixes_up_no_libraries(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    cached(first, "org/theirs", THEIRS.manifest.commit, FILES)
    second.mkdir()
    settings = StorageSettings(None, 0, libraries=(str(first),))
    async with storage_parts(nats, tmp_path, fresh("storage"), settings) as parts:
        libraries = LibraryService(parts.context)
        reached, gate = threading.Event(), threading.Event()

        def gated(library: str, check_stopping: Callable[[], None]) -> LibraryListing:
            listing = list_library(library, check_stopping)
            reached.set()
            assert gate.wait(GATE_DEADLINE_S)
            return listing

        monkeypatch.setattr(library_service, "list_library", gated)
        scanning = asyncio.create_task(libraries.refresh())
        assert await asyncio.to_thread(reached.wait, GATE_DEADLINE_S)
        await libraries.use_libraries([str(second), str(first)])
        gate.set()
        await scanning
        assert [(s.path, s.unhashed_count, s.error) for s in libraries.states()] == [
            (str(second), 0, "it has not been scanned yet"),
            (str(first), 1, ""),
        ]
