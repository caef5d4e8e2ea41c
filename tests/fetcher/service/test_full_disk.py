"""A full disk under a download: writers stop, durable leaves stay, it is reported, and the download resumes."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shoal_common.bus import subjects
from shoal_common.bus.keys import model_key, storage_key
from shoal_common.errors import DiskFull
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.storage import ModelState, StorageState
from shoal_common.names import model_id
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import Faults
from shoal_fetcher.partials import partial_blob
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site, check_store
from tests.fetcher.unit.test_partial_blob import claims_only_what_is_there, content, missing_runs, opened, reserved
from tests.fetcher.unit.test_partial_blob import fill as bring
from tests.harness.node import Node, running_nodes
from tests.harness.tiny_filesystem import fill, free_bytes, small_disk

LEAVES = 5
SLOW = Faults(bytes_per_s=3 * LEAF_BYTES)
DEADLINE_S = 40.0
_NO_STRACE = "no strace on this machine: refused writes of a real fetcher are NOT tested here"


# Every write call, refused


class Refusing:
    """Counts the calls that write a partial blob, and refuses the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuse: int = 0, number: int = 0) -> None:
        self.made: list[str] = []
        for holder, name in ((os, "pwrite"), (os, "fsync"), (Path, "write_bytes"), (Path, "replace")):
            monkeypatch.setattr(holder, name, self._counted(name, getattr(holder, name), refuse, number))

    def _counted(self, name: str, real: Callable[..., object], refuse: int, number: int) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            self.made.append(name)
            if len(self.made) == refuse:
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        return call


async def write_all(directory: Path, data: bytes) -> None:
    """Do what a download does with a partial blob, from any state. Every second leaf is a checkpoint."""
    async with opened(directory, len(data)) as partial:
        for start, end in missing_runs(partial):
            for turn, at in enumerate(range(start, end, LEAF_BYTES)):
                await bring(partial, data[at : min(at + LEAF_BYTES, end)], [LEAF_BYTES], begin=at)
                if turn % 2:
                    await partial.checkpoint()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_I6_a_refused_write_of_a_partial_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(partial_blob, "CHECKPOINT_INTERVAL_S", 1e9)
    data = content(LEAVES * LEAF_BYTES - 7)
    with monkeypatch.context() as patched:
        whole = Refusing(patched)
        await write_all(reserved(tmp_path / "whole"), data)
    # Each leaf, its hash and its ready bit; the bitmap of durable leaves after each fsync.
    assert whole.made.count("pwrite") == 3 * LEAVES + 3 and whole.made.count("fsync") == 3
    assert {"write_bytes", "replace"} < set(whole.made)
    for n in range(1, len(whole.made) + 1):
        directory = reserved(tmp_path / str(n))
        with monkeypatch.context() as patched:
            Refusing(patched, refuse=n, number=number)
            with pytest.raises(OSError if number == errno.EIO else DiskFull) as refused:
                await write_all(directory, data)
        if number != errno.EIO:
            assert "disk full: " in str(refused.value)
        before = claims_only_what_is_there(directory, data)
        # What was checkpointed before the refused call is claimed, whatever happened after it.
        checkpoints = sum(whole.made[at] == "fsync" for at in range(n - 1)) - (whole.made[n - 2 : n - 1] == ["fsync"])
        assert before.have_bytes >= min(checkpoints * 2 * LEAF_BYTES, len(data)), whole.made[n - 1]
        with monkeypatch.context() as patched:
            again = Refusing(patched)
            await write_all(directory, data)
        assert again.made.count("pwrite") < whole.made.count("pwrite") or not before.have_bytes
        assert claims_only_what_is_there(directory, data).complete
        assert (directory / "data").read_bytes() == data


async def test_a_cancelled_writer_stays_cancelled_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last leaves cannot be made durable; a cancelled download must not be blocked for that."""
    data, directory, written = content(2 * LEAF_BYTES), reserved(tmp_path), asyncio.Event()

    async def writing() -> None:
        async with opened(directory, len(data)) as partial:
            await bring(partial, data[:LEAF_BYTES], [LEAF_BYTES])
            written.set()
            await asyncio.Event().wait()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    task = asyncio.create_task(writing())
    await written.wait()
    monkeypatch.setattr(os, "fsync", full)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_disk_full_to_the_last_byte_still_takes_the_bitmap(tmp_path: Path) -> None:
    data = content(12 * LEAF_BYTES)
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        directory = reserved(disk)
        with pytest.raises(DiskFull):
            await write_all(directory, data)
        assert free_bytes(disk) == 0
        durable = claims_only_what_is_there(directory, data).have_bytes
        assert durable >= 7 * LEAF_BYTES, "what had been written was lost with the bitmap"


# Whole services


@asynccontextmanager
async def node_on(site: Site, disk: Path, name: str, **environment: str) -> AsyncIterator[Node]:
    """A node whose store is on its own disk."""
    usual = {"HF_ENDPOINT": site.hub.base_url, "SHOAL_HEADROOM_BYTES": "0", **environment}
    node = Node(disk, name, site.server.url, ("storage", "fetcher", "fileserver"), **usual)
    site.nodes[name] = node
    try:
        with running_nodes(node):
            async with site.join() as here:
                await node.ready(here.here)
            yield node
            check_store(node)
    finally:
        del site.nodes[name]


async def blocked(here: Pulls, node: str, model: str = "") -> DownloadState:
    """Wait until the download reports that the disk is full and how much is lacking."""
    state = await here.state(
        node, lambda s: s.phase == "blocked" and "more needed" in s.waiting_for, model, DEADLINE_S
    )
    assert state.waiting_for.startswith("disk full: ") and "the download resumes" in state.waiting_for
    assert state.error is not None and state.error.code == "disk_full"
    assert state.error.details["lacking_bytes"] > 0 and state.blocked_since_s > 0
    return state


async def test_a_pull_blocked_by_a_foreign_file_resumes_by_itself(
    site: Site, tmp_path: Path, fresh: Callable[[str], str]
) -> None:
    files = {"1.safetensors": noise(9 * LEAF_BYTES, site.repo), "2.safetensors": noise(6 * LEAF_BYTES, "2")}
    size = site.make(files)
    site.hub.set_faults(SLOW)
    name = fresh("node")
    home = tmp_path / name
    with small_disk(home / "store", 48 << 20) as disk:
        async with node_on(site, home, name) as node, site.join() as here:
            pull = await here.begin(name)
            await here.durable(name, 2 * LEAF_BYTES)
            ballast = fill(disk)
            stopped = await blocked(here, name)
            assert 2 * LEAF_BYTES <= stopped.done_bytes < size
            published = await here.buckets.state.get_as(storage_key(name), StorageState)
            assert published is not None and published.reserved_bytes >= size - stopped.done_bytes, (
                "the reservation stands"
            )

            # The death of either service changes nothing.
            await node.restart(here.here, "storage")
            await node.restart(here.here, "fetcher")
            again = await blocked(here, name)
            assert again.done_bytes >= stopped.done_bytes and again.blocked_since_s >= stopped.blocked_since_s

            site.hub.set_faults(Faults())
            ballast.unlink()
            ready = await here.state(name, lambda s: s.phase == "ready", deadline_s=DEADLINE_S)
            assert (ready.error, ready.waiting_for, ready.blocked_since_s) == (None, "", 0.0)
            assert ready.sources["hub"] - again.sources["hub"] == size - again.done_bytes, "fetched twice"
            await here.assert_complete(name, files)
            pull.cancel()


async def test_a_blocked_pull_can_be_cancelled_and_leaves_no_files(
    site: Site, tmp_path: Path, fresh: Callable[[str], str]
) -> None:
    site.make({"model.safetensors": noise(9 * LEAF_BYTES, site.repo)})
    site.hub.set_faults(SLOW)
    name = fresh("node")
    home = tmp_path / name
    with small_disk(home / "store", 32 << 20) as disk:
        async with node_on(site, home, name), site.join() as here:
            pull = await here.begin(name)
            await here.durable(name, LEAF_BYTES)
            fill(disk)
            await blocked(here, name)
            assert (await here.cancel(name)).result["cancelled"] is True
            outcome = await pull
            assert outcome.error is not None and outcome.error.code == "cancelled"
            await here.nothing_is_left(name)
            assert free_bytes(disk) > 0, "the bytes of the partial were given back"
            # A deletion cancels as well.
            (disk / "filler").unlink()
            pull = await here.begin(name)
            await here.durable(name, LEAF_BYTES)
            fill(disk)
            await blocked(here, name)
            assert (await here.delete(name)).ok
            await here.nothing_is_left(name)
            pull.cancel()


async def test_with_lru_a_blocked_pull_evicts_one_old_model_and_ends(
    site: Site, tmp_path: Path, fresh: Callable[[str], str]
) -> None:
    old = f"org/{fresh('old')}"
    site.make({"old.safetensors": noise(11 * LEAF_BYTES, old)}, old)
    size = site.make(files := {"model.safetensors": noise(9 * LEAF_BYTES, site.repo)})
    name = fresh("node")
    home = tmp_path / name
    with small_disk(home / "store", 48 << 20) as disk:
        async with node_on(site, home, name, SHOAL_EVICTION_POLICY="lru") as node, site.join() as here:
            commit = (await here.pull_ok(name, old)).commit
            evictions = await here.here.client.subscribe(subjects.event("storage", name, "evicted"))
            await here.here.client.flush()
            site.hub.set_faults(SLOW)
            pull = await here.begin(name)
            await here.durable(name, 2 * LEAF_BYTES)
            fill(disk)
            outcome = await pull
            assert outcome.ok, outcome.error
            assert 'msg="disk full, download blocked"' in node["fetcher"].log(), "it was never full"
            await here.assert_complete(name, files)
            await here.here.client.flush()
            assert evictions.pending_msgs == 1
            assert await here.buckets.state.get_as(model_key(name, model_id(old, commit)), ModelState) is None
            assert site.hub_bytes() < size + 2 * 9 * LEAF_BYTES


@pytest.mark.skipif(shutil.which("strace") is None, reason=_NO_STRACE)
async def test_a_disk_quota_blocks_the_fetcher_until_writes_succeed(
    site: Site,
) -> None:
    """There is free space: only a retry shows the quota."""
    size = site.make(files := {"model.safetensors": noise(8 * LEAF_BYTES, site.repo)})
    site.hub.set_faults(SLOW)
    async with site.join() as here:
        pull = await here.begin("a")
        await here.durable("a", 2 * LEAF_BYTES)
        strace = await asyncio.create_subprocess_exec(
            *("strace", "-f", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", "inject=pwrite64:error=EDQUOT"),
            *("-p", str(site["a"]["fetcher"].pid)),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            stopped = await here.state("a", lambda s: s.phase == "blocked", deadline_s=DEADLINE_S)
            assert stopped.error is not None and stopped.error.code == "disk_full"
            assert stopped.waiting_for.startswith("disk full: Disk quota exceeded")
        finally:
            if strace.returncode is None:
                strace.terminate()
            await strace.communicate()
        site.hub.set_faults(Faults())
        outcome = await pull
        assert outcome.ok, outcome.error
        await here.assert_complete("a", files)
        ready = await here.state_now("a")
        assert ready is not None and ready.phase == "ready" and ready.done_bytes == size
