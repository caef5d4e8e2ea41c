"""Deletes that the disk refuses or a kill interrupts: the next start or the next delete finishes them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from shoal_common.bus import subjects
from shoal_common.messages import encode
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import Delete
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.store_paths import StorePaths
from tests.fetcher.pull_site import Site
from tests.harness.waiting import eventually
from tests.storage.deletion_fixtures import NODE, DeletionCase, case_of, present

_NO_STRACE = "no strace on this machine: deletes that are killed or refused in the middle are NOT tested here"


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason=_NO_STRACE)


# Interrupted deletes


RENAME, UNLINK = "?rename,?renameat,?renameat2", "?unlink,?unlinkat"


def _tombstone(paths: StorePaths, manifest: Manifest) -> Path:
    path = paths.manifest(manifest.model)
    return paths.tombstones / f"{path.parent.name}@{path.name}"


STEPS: dict[str, tuple[str, Callable[[StorePaths, Manifest], Path]]] = {
    "the manifest leaves": (RENAME, lambda paths, m: paths.manifest(m.model)),
    "its tombstone is durable": ("fsync", lambda paths, _: paths.tombstones),
    "a file of the view goes": (UNLINK, lambda paths, m: paths.view_file(m, m.files[0].path)),
    "the first blob goes": (UNLINK, lambda paths, m: paths.blob(min(m.blob_sizes))),
    "its leaves go": (UNLINK, lambda paths, m: paths.leaf_list(min(m.blob_sizes))),
    "the last blob goes": (UNLINK, lambda paths, m: paths.blob(max(m.blob_sizes))),
    "that is durable": ("fsync", lambda paths, m: paths.blob(max(m.blob_sizes)).parent),
    "the tombstone goes": (UNLINK, _tombstone),
}
"""The calls that a delete makes on the disk, in order, with their paths."""


@asynccontextmanager
async def meeting(case: DeletionCase, what: str, step: str, manifest: Manifest) -> AsyncIterator[None]:
    """Storage gets this error at a step of its deletes, until `let_go`."""
    calls, path = STEPS[step]
    storage = case.node["storage"]
    only = (
        "-P",
        str(path(case.node.layout, manifest)),
        "-e",
        f"trace={calls}",
        "-e",
        f"inject={calls}:{what}",
    )
    storage.within = ("strace", "-D", "-I2", "-f", "-qq", "-o", "/dev/null", *only)
    try:
        await case.node.restart(case.here.here, "storage")
    finally:
        storage.within = ()
    try:
        yield
    finally:
        await case.node.restart(case.here.here, "storage")


async def stop_tracing(pid: int) -> None:
    """End the tracing of a process, which goes on running."""

    def tracer() -> int:
        return int(Path(f"/proc/{pid}/status").read_text().partition("TracerPid:")[2].split()[0])

    os.kill(tracer(), signal.SIGTERM)

    async def free() -> bool:
        return not tracer()

    await eventually(free, "nobody traces it")


@needs_strace
@pytest.mark.parametrize("step", STEPS)
async def test_published_models_are_complete_if_a_delete_fails_midway(site: Site, step: str) -> None:
    async with case_of(site) as case:
        await present(case)
        manifest = await case.manifest()
        async with meeting(case, "error=EIO", step, manifest):
            refused = await case.ask("delete", "storage")
            assert refused.error is not None and refused.error.code == "failed", refused
            begun = step != "the manifest leaves"
            assert ("not all of its files are gone" in refused.error.message) == begun
            assert "Input/output error" in refused.error.message
            if begun:
                assert not await case.is_published(manifest)
            else:
                assert await case.is_published(manifest)
                await case.here.assert_complete(
                    NODE, {path.path: case.bytes_of(path.path) for path in manifest.files}
                )
            await stop_tracing(case.node["storage"].pid)
            again = await case.ask("delete", "storage")
            assert again.ok and again.result["models"] == [manifest.model]
            await case.nothing_is_left()
        await case.nothing_is_left()


@needs_strace
@pytest.mark.parametrize("step", STEPS)
async def test_I6_a_delete_killed_at_any_step_ends_at_the_next_start(site: Site, step: str) -> None:
    async with case_of(site) as case:
        await present(case)
        manifest = await case.manifest()
        async with meeting(case, "signal=SIGKILL", step, manifest):
            subject = subjects.command("storage", NODE, "delete")
            await case.here.here.client.publish(subject, encode(Delete(model=case.repo)))
            assert await asyncio.to_thread(case.node["storage"].wait_exit) == -signal.SIGKILL
        if step != "the manifest leaves":
            await case.nothing_is_left()
        # The queue redelivers the killed command to the new process, sooner or later.
        assert (await case.ask("delete", "storage")).ok
        await case.nothing_is_left()


@contextmanager
def immutable(directory: Path) -> Iterator[None]:
    """Nothing in a directory can be deleted, not even by root. Skips where that is not possible."""
    done = subprocess.run(["chattr", "+i", str(directory)], capture_output=True, check=False) if _CHATTR else None
    if done is None or done.returncode:
        pytest.skip("only root with chattr can make a directory immutable: a refused delete is NOT tested here so")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(directory)], check=True)


_CHATTR = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("chattr") is not None


async def test_a_start_survives_undeletable_files_and_a_delete_ends_it(site: Site) -> None:
    async with case_of(site) as case:
        await present(case)
        manifest, blob = await case.manifest(), await case.blob()
        with immutable(blob.parent):
            for _ in range(2):
                refused = await case.ask("delete", "storage")
                assert refused.error is not None and str(blob) in refused.error.message
                assert not await case.is_published(manifest) and blob.exists()
                await case.restart_service()
                assert not await case.is_published(manifest) and blob.exists()
        ended = await case.ask("delete", "storage")
        assert ended.ok and ended.result["models"] == [manifest.model]
        assert ended.result["freed_bytes"] >= 6 * LEAF_BYTES
        await case.nothing_is_left()


async def test_garbage_collection_finishes_a_delete_that_failed_midway(site: Site) -> None:
    async with case_of(site) as case:
        await present(case)
        with immutable(await case.view()):
            assert not (await case.ask("delete", "storage")).ok
            collected = await case.ask("gc", "storage")
            assert collected.ok, "what stays does not keep the rest from going"
        collected = await case.ask("gc", "storage")
        assert collected.ok
        await case.nothing_is_left()


async def test_a_model_whose_delete_failed_midway_comes_back_complete(site: Site) -> None:
    async with case_of(site) as case:
        await present(case)
        blob = await case.blob()
        with immutable(blob.parent):
            assert not (await case.ask("delete", "storage")).ok
        await present(case)
        await case.restart_service()
        await case.here.assert_complete(NODE, {f.path: case.bytes_of(f.path) for f in (await case.manifest()).files})
        assert (await case.ask("delete", "storage")).result["deleted"]
        await case.nothing_is_left()


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """A directory is a read-only mount of itself. Skips where that is not possible."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount: a delete in a read-only store is NOT tested here")
    made = subprocess.run(["mount", "--bind", str(directory), str(directory)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"nothing can be mounted, a delete in a read-only store is NOT tested here: {made.stderr!r}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(directory)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


async def test_a_store_that_became_read_only_keeps_its_model_complete(site: Site) -> None:
    async with case_of(site) as case:
        await present(case)
        manifest = await case.manifest()
        with read_only(case.node.layout.root):
            refused = await case.ask("delete", "storage")
            assert refused.error is not None and "Read-only file system" in refused.error.message
            assert "was not deleted" in refused.error.message
            assert await case.is_published(manifest)
        await case.here.assert_complete(NODE, {f.path: case.bytes_of(f.path) for f in manifest.files})
        assert (await case.ask("delete", "storage")).result["deleted"]
        await case.nothing_is_left()
