"""The watcher of a store: foreign files, scans, notifications that fail, a store that is moved away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from shoal_common.messages.storage import CollectGarbage, Pin, Verify
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.process import Process, node_environment, started
from tests.storage.running_storage import on_node
from tests.storage.service.test_manual_changes import (
    LARGE,
    WEIGHTS,
    wait_published,
    wait_storage_state,
    wait_unpublished,
)
from tests.storage.store_fixtures import Model, files_below, files_of


async def test_foreign_files_are_counted_and_survive_everything(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.fetcher():
        paths = node.layout
        strange = [
            paths.root / "index.db",
            paths.blobs / "ab" / "notes.txt",
            paths.blobs / "zz" / ("ab" * 32),
            paths.manifests / "org--large" / "readme.json",
            paths.view(LARGE.sealed.model) / "mine.txt",
            paths.views / "org--large" / ("e" * 40) / "mine.txt",
        ]

        def all_there() -> bool:
            return all(p.read_bytes() == b"mine" for p in strange)

        quota = str(LARGE.sealed.size_bytes + 100)
        async with node.storage(SHOAL_MAX_STORAGE_BYTES=quota, SHOAL_EVICTION_POLICY="lru") as process:
            await node.bring_in(LARGE)
            for path in strange:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"mine")
            # The top of the store is not watched: the next scan counts it with the others.
            state = await wait_storage_state(node, "they are counted", lambda s: s.foreign_count == len(strange))
            assert state.foreign_bytes == 4 * len(strange) and len(state.foreign_files) == 5
            assert await node.model_state(LARGE)
            assert (await node.command("verify", Verify())).ok and all_there()
            await node.bring_in(apples)  # by evicting the other
            assert await node.model_state(LARGE) is None and await node.model_state(apples)
            assert (await node.command("gc", CollectGarbage())).ok and all_there()
            await process.kill()
        async with node.storage():
            assert all_there() and (await node.storage_state()).foreign_count == len(strange)
            assert (await node.delete("org/apples")).ok and all_there()
            for path in strange[1:]:
                path.unlink()
            await wait_storage_state(node, "one is left", lambda s: s.foreign_files == ["index.db"])


async def test_an_index_full_of_noise_changes_nothing(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        async with node.storage() as process:
            before = await node.bring_in(LARGE)
            assert (await node.command("pin", Pin(model="org/large"))).ok
            await node.use(LARGE)
            process.send(signal.SIGTERM)
            assert await process.wait_exit() == 0
        used = node.layout.use(LARGE.sealed.model).stat().st_mtime_ns
        (node.layout.root / "index.db").write_bytes(os.urandom(100_000))
        async with node.storage():
            assert await node.model_state(LARGE) == before
            state = await node.storage_state()
            assert state.pinned == [LARGE.name] and (state.foreign_files, state.foreign_bytes) == (
                ["index.db"],
                100_000,
            )
            assert node.layout.use(LARGE.sealed.model).stat().st_mtime_ns == used
            assert (await node.plan(1 << 60)).protected == {LARGE.name: "pinned"}


def scans_of(process: Process) -> int:
    """How often a storage that logs at debug level has scanned its store."""
    return len([line for line in process.lines if "store scanned" in line])


async def test_storages_own_changes_cause_no_scan_and_idle_is_silent(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    models = [
        Model(f"org/model-{n}", {"a": bytes([n]) * 5000, "b/c": b"%d" % n, "shared": b"x" * 99}) for n in range(8)
    ]
    async with (
        on_node(nats, tmp_path, fresh("storage")) as node,
        node.storage(SHOAL_LOG="debug") as process,
        node.fetcher(),
    ):
        await process.wait_line("store scanned")
        for number, model in enumerate(models):
            await node.bring_in(model)
            if number % 2:
                assert (await node.delete(model.name)).ok
        # A foreign file written after all of storage's own writes is the first change worth a scan.
        for number in (1, 2):
            own = node.layout.manifests / f"mine-{number}"
            own.write_text("mine")
            await wait_storage_state(node, "it is counted", lambda s, n=number: s.foreign_count == n)  # type: ignore[misc]
            written = await node.here.last_sequence("KV_state"), await node.here.last_sequence("EVT")
            assert scans_of(process) <= 2 + 2 * number, process.output
        for number, model in enumerate(models):
            assert bool(await node.model_state(model)) == (number % 2 == 0)
        await node.plan(1)
        assert written == (await node.here.last_sequence("KV_state"), await node.here.last_sequence("EVT"))
        assert files_below(node.layout.root) >= files_of(*models[::2])


async def test_changes_while_nats_is_down_are_published_afterwards(
    own_nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    async with on_node(own_nats, tmp_path, fresh("storage")) as node, node.storage() as process:
        await node.bring_in(LARGE)
        await node.bring_in(apples)
        aside = tmp_path / "aside"
        shutil.move(node.layout.manifest(apples.sealed.model), aside)
        await wait_unpublished(node, apples)
        # All of it is published: what is half published when NATS goes down waits for it, and so does the next scan.
        await wait_storage_state(node, "one model is left", lambda s: s.model_count == 1)
        own_nats.kill()
        node.layout.blob(WEIGHTS).unlink()
        shutil.move(aside, node.layout.manifest(apples.sealed.model))
        await process.wait_line("store changed on disk", LARGE.name)
        own_nats.start()
        await wait_unpublished(node, LARGE)
        await wait_published(node, apples)
        assert process.running


async def test_a_store_that_is_moved_away_and_back_is_offered_again(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage() as process, node.fetcher():
        await node.bring_in(LARGE)
        root, aside = node.layout.root, tmp_path / "aside"
        root.rename(aside)
        root.mkdir()  # as a mount point stays when its disk is gone
        await wait_unpublished(node, LARGE)
        state = await wait_storage_state(node, "the store is missed", lambda s: s.store_missing)
        assert (state.model_count, state.blob_count) == (1, 3), "and nothing is concluded"
        assert (await node.command("verify", Verify())).ok
        assert not (await node.delete("org/large")).ok
        with pytest.raises(Exception, match="store"):
            await node.seal(LARGE.sealed)
        root.rmdir()
        aside.rename(root)
        await wait_published(node, LARGE)
        state = await wait_storage_state(node, "it is back", lambda s: not s.store_missing)
        assert (state.blob_count, state.unverified_count) == (3, 0)
        assert [name for name, _ in await node.events()] == ["model_ready"], "nothing was lost, hashed or found"
        node.layout.blob(WEIGHTS).unlink()
        await wait_unpublished(node, LARGE)
        assert process.running
        await node.bring_in(apples)


_WITHOUT_NOTICES = """
import sys
from shoal_common.service import main
from shoal_storage.scan import watcher as watching
from shoal_storage.service import run
watching.FALLBACK_INTERVAL_S = watching.PRESENCE_CHECK_INTERVAL_S = 0.5
sys.exit(main("storage", run))
"""


_LIMITED = ["unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"', "sh"]
"""Run a test where the kernel sends no notifications."""


@pytest.fixture
def limited() -> list[str]:
    """The same, where the machine can do it."""
    if (
        not shutil.which("unshare")
        or subprocess.run([*_LIMITED, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no user namespaces on this machine: a storage without notices is NOT tested here")
    return _LIMITED


async def test_without_inotify_the_disk_is_polled(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, limited: list[str]
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        script = tmp_path / "storage.py"
        script.write_text(
            f"import os, sys\nos.execvp('unshare', {limited!r} + [sys.executable, '-c', {_WITHOUT_NOTICES!r}])\n"
        )
        environment = node_environment(node.home, nats.url, SHOAL_HEADROOM_BYTES="0")
        async with started(str(script), environment=environment) as process:
            await process.wait_ready()
            await process.wait_line("no change notifications")
            await node.bring_in(LARGE)
            path, aside = node.layout.blob(WEIGHTS), tmp_path / "aside"
            shutil.copy2(path, aside)
            path.unlink()
            await wait_unpublished(node, LARGE)
            shutil.copy2(aside, path)
            await wait_published(node, LARGE)
            assert len([line for line in process.lines if "no change notifications" in line]) == 1


async def test_a_stop_does_not_wait_for_the_watcher(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage() as process:
        process.send(signal.SIGTERM)
        assert await process.wait_exit(deadline_s=9) == 0, "before what is left is cancelled"
