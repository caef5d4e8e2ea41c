"""Integrity of libraries: a file that is corrupt or changes is not offered, and a restart hashes nothing again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from shoal_common.bus.keys import model_key
from shoal_common.errors import NotFound
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import (
    GetManifest,
    Verify,
)
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.storage.library_fixtures import (
    FILES,
    THEIRS,
    WEIGHTS,
    cached,
    config,
    hashed,
    is_served,
    listening,
    on_node_with,
    plain,
    safetensors,
    set_libraries,
    snapshot_tree,
    wait_library_state,
    wait_unpublished,
)
from tests.storage.service.test_verifier import fileserver_of, flip
from tests.storage.store_fixtures import sha256


async def test_I1_a_byte_flipped_before_the_scan_is_never_offered(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    cache = tmp_path / "hub"
    snapshot = cached(cache, "org/theirs", THEIRS.manifest.commit, FILES)
    small = cached(cache, "org/small", "b" * 40, {**FILES, "config.json": b'{"a": 1}'})
    flip((snapshot / "model.safetensors").resolve(), 70_000)
    flip((small / "config.json").resolve(), 3)
    before = snapshot_tree(cache)
    async with (
        on_node_with(nats, tmp_path, fresh("node"), cache) as node,
        listening(node) as process,
        fileserver_of(node, nats) as fileserver,
    ):
        state = await wait_library_state(node, lambda r: r.rejected_count == 2 and not r.unhashed_count)
        assert state.model_count == 0
        assert "model.safetensors is corrupt" in state.rejected[str(snapshot)]
        assert "config.json is corrupt" in state.rejected[str(small)]
        await node.wait_events("library_model_corrupt", "library_model_corrupt")
        await process.wait_line("is corrupt", sha256(WEIGHTS))
        assert await node.model_state(THEIRS) is None
        assert not any([await is_served(fileserver, data) for data in (*FILES.values(), b'{"a": 1}')])
        await process.kill()
        async with listening(node) as again:
            assert (await wait_library_state(node, lambda r: r.rejected_count == 2)).unhashed_count == 0
            assert hashed(again) == [] and await node.model_state(THEIRS) is None
        assert len(await node.events()) == 2, "told once"
    assert snapshot_tree(cache) == before


@pytest.mark.parametrize("how", ["changed", "removed", "replaced by a link"])
async def test_I1_a_library_file_that_changes_is_no_longer_served(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, how: str
) -> None:
    root = tmp_path / "models"
    weights = plain(root, "me/tuned", FILES) / "model.safetensors"
    kept = plain(root, "me/kept", {"config.json": config(), "model.safetensors": safetensors(b"kept")})
    async with (
        on_node_with(nats, tmp_path, fresh("node"), root) as node,
        listening(node),
        fileserver_of(node, nats) as fileserver,
    ):
        await wait_library_state(node, lambda r: r.model_count == 2)
        tuned = (await node.ask("manifest", GetManifest(model="me/tuned@local"), Manifest)).model
        assert await is_served(fileserver, WEIGHTS)
        if how == "changed":
            weights.write_bytes(safetensors(b"new"))
        elif how == "removed":
            weights.unlink()
        else:
            weights.rename(tmp_path / "elsewhere")
            weights.symlink_to(tmp_path / "elsewhere")
        assert not await is_served(fileserver, WEIGHTS), "before storage has looked"
        await set_libraries(node, root)
        await wait_unpublished(node, tuned)
        view = node.layout.view(tuned)

        async def view_gone() -> bool:
            return not view.exists()

        await eventually(view_gone, "its view goes after its announcement")
        assert await is_served(fileserver, safetensors(b"kept")) and kept.exists()
        if how == "changed":

            async def accepted_again() -> Manifest | None:
                with suppress(NotFound):
                    return await node.ask("manifest", GetManifest(model="me/tuned@local"), Manifest)
                return None

            assert (await eventually(accepted_again, "it is accepted as it is now")).model != tuned
            assert await is_served(fileserver, safetensors(b"new"))


async def test_I1_verify_finds_corrupt_library_files_and_moves_nothing(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    weights = plain(root, "me/tuned", FILES) / "model.safetensors"
    async with (
        on_node_with(nats, tmp_path, fresh("node"), root) as node,
        listening(node) as process,
        fileserver_of(node, nats) as fileserver,
    ):
        await wait_library_state(node, lambda r: r.model_count == 1)
        tuned = (await node.ask("manifest", GetManifest(model="me/tuned@local"), Manifest)).model
        flip(weights, 12_345)
        before = snapshot_tree(root)
        result = (await node.command("verify", Verify())).result
        # In order of hashes; the rest of a model that is no longer offered is not looked at.
        checked_count = sorted(map(sha256, FILES.values())).index(sha256(WEIGHTS)) + 1
        assert (result["checked"], result["corrupt"], result["models"]) == (checked_count, [sha256(WEIGHTS)], [tuned])
        assert await node.here.buckets.state.get(model_key(node.node, tuned)) is None
        assert not await is_served(fileserver, WEIGHTS)
        assert (await wait_library_state(node, lambda r: r.rejected_count == 1)).model_count == 0
        assert ("library_model_corrupt", str(weights)) in [(n, e.get("path")) for n, e in await node.events()]
        await process.kill()
        async with listening(node) as again:
            assert (await wait_library_state(node, lambda r: r.rejected_count == 1)).model_count == 0
            assert hashed(again) == [], "what rotted is not taken for something new"
        assert snapshot_tree(root) == before and not list(node.layout.quarantine.iterdir())


async def test_a_restart_hashes_nothing_again_and_changed_files_only(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    directory = plain(root, "me/tuned", FILES)
    plain(root, "me/other", {**FILES, "model.safetensors": safetensors(b"other")})
    async with on_node_with(nats, tmp_path, fresh("node"), root) as node:
        async with listening(node) as process:
            await wait_library_state(node, lambda r: r.model_count == 2)
            assert sum(int(line.split("files=")[1].split()[0]) for line in hashed(process)) == 6
            await process.kill()
        async with listening(node) as process:
            await wait_library_state(node, lambda r: r.model_count == 2)
            assert hashed(process) == []
            await process.kill()
        os.utime(directory / "config.json", ns=(1, 1))
        async with listening(node) as process:
            await process.wait_line("library model hashed", "files=1")
            await wait_library_state(node, lambda r: r.model_count == 2)
            assert len(hashed(process)) == 1
        assert [name for name, _ in await node.events()][:2] == ["library_model_found"] * 2
