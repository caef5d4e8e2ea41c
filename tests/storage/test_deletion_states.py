"""Deletes with whole services, whatever state a model is in: final, idempotent, and without a request to the hub.

The matrix: a row makes a state; then a delete is sent twice, and the services restart. Deletes that the disk refuses
and kills in the middle follow. What `storage` answers in detail is in `test_storage_deletes`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest

from shoal_common.bus import subjects
from shoal_common.bus.keys import download_key, instance_key, model_key, storage_key
from shoal_common.messages import encode
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.instances import InstanceSpec, StageSpec
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.placement import Forget
from shoal_common.messages.storage import Delete, ModelState, StorageState
from shoal_common.rpc.command_client import CommandClient, new_command_id
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.store_paths import StorePaths
from shoal_demo.faults import Faults
from shoal_demo.hub_server import running_hub
from shoal_demo.stats import RequestCounts
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site
from tests.harness.nats import NatsServer, joined
from tests.harness.node import Node, running_nodes
from tests.harness.waiting import eventually
from tests.storage.store_fixtures import files_below

Fresh = Callable[[str], str]
SERVICES = ("storage", "fetcher", "placement")
NODE = "deletes"
DEADLINE_S = 60.0
SLOWLY = Faults(bytes_per_s=LEAF_BYTES)
_NO_STRACE = "no strace on this machine: deletes that are killed or refused in the middle are NOT tested here"
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason=_NO_STRACE)


class DeletionCase:
    """A model of the hub, and the node it is deleted from."""

    def __init__(self, site: Site, here: Pulls) -> None:
        self.site, self.here, self.repo = site, here, site.repo
        self.node = site[NODE]
        site.make({path: self.bytes_of(path) for path in ("model.safetensors", "sub/config.json")})
        self.before = files_below(self.node.layout.root)
        self.stays: set[str] = set()
        """Foreign files, relative to the store, which must stay."""

    def bytes_of(self, path: str) -> bytes:
        """The content of such a file."""
        return noise(6 * LEAF_BYTES if path.endswith(".safetensors") else 100, self.site.repo + path)

    async def ask(self, verb: str, service: str = "fetcher", **body: object) -> Outcome:
        """Send a command about the model and return its outcome."""
        return await self.here.ask(NODE, verb, json.dumps({"model": self.repo, **body}).encode(), service=service)

    async def manifest(self) -> Manifest:
        """Its manifest, as on disk."""
        return await self.here.manifest(NODE)

    async def blob(self) -> Path:
        """The file of its largest blob, made writable."""
        largest = max((await self.manifest()).files, key=lambda f: f.size_bytes)
        path = self.node.layout.blob(largest.sha256)
        path.chmod(0o644)
        return path

    async def view(self) -> Path:
        """The directory of its view."""
        manifest = await self.manifest()
        return self.node.layout.view(manifest.repo, manifest.commit)

    async def is_published(self, manifest: Manifest) -> bool:
        """Whether the model is published for this node."""
        return await self.here.buckets.state.get_as(model_key(NODE, manifest.model), ModelState) is not None

    async def nothing_is_left(self) -> None:
        """What remains of it on disk, in `state` and in `spec`."""
        assert files_below(self.node.layout.root) == self.before | self.stays
        state = self.here.buckets.state
        info = await self.here.here.js.stream_info("KV_state", subjects_filter=f"$KV.state.model.{NODE}.>")
        for subject in info.state.subjects or {}:
            found = await state.get_as(subject.removeprefix("$KV.state."), ModelState)
            assert found is None or found.repo != self.repo
        assert await self.here.buckets.spec.get_as(download_key(NODE, self.repo), DownloadRequest) is None
        assert await state.get_as(download_key(NODE, self.repo), DownloadState) is None
        disk = await state.get_as(storage_key(NODE), StorageState)
        assert disk is not None and disk.reserved_bytes == 0

    async def restart_service(self) -> None:
        """Do now all that a service does when it starts and when NATS is back."""
        for service in ("storage", "fetcher"):
            await self.node.restart(self.here.here, service)
        reconnects = self.here.here.nats.reconnects
        seen = reconnects.count
        await asyncio.to_thread(self.site.server.restart)
        await reconnects.wait_after(seen)
        for service in SERVICES:
            await self.node.ready(self.here.here, service)


@pytest.fixture(scope="module")
def site_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One node with NATS and a hub, for all rows."""
    home = tmp_path_factory.mktemp("deletes")
    models = home / "models"
    models.mkdir()
    with NatsServer(home / "nats") as server, running_hub(models, process=True) as hub:
        usual = {"HF_ENDPOINT": hub.base_url, "SHOAL_HEADROOM_BYTES": "0"}
        with running_nodes(Node(home / NODE, NODE, server.url, SERVICES, **usual)) as (node,):
            asyncio.run(_ready(server, node))
            yield Site(server, hub, models, {NODE: node}, repo="")


async def _ready(server: NatsServer, node: Node) -> None:
    async with joined(server) as here:
        await node.ready(here)


@pytest.fixture
def site(site_of_all: Site, fresh: Fresh) -> Iterator[Site]:
    """The same, with a model of this test."""
    yield msgspec.structs.replace(site_of_all, repo=f"org/{fresh('deleted')}")
    site_of_all.hub.reset_faults()


@asynccontextmanager
async def case_of(site: Site) -> AsyncIterator[DeletionCase]:
    async with site.join() as here:
        try:
            yield DeletionCase(site, here)
        except BaseException:
            print(site[NODE].log())
            raise


# The states


async def absent(_: DeletionCase) -> None:
    """Never downloaded."""


async def present(case: DeletionCase) -> None:
    """Complete."""
    await case.here.pull_ok(NODE)


async def arriving(case: DeletionCase) -> None:
    """Half downloaded, and downloading."""
    case.site.hub.set_faults(SLOWLY)
    await case.here.begin(NODE)
    await case.here.durable(NODE, LEAF_BYTES)


async def paused(case: DeletionCase) -> None:
    """Paused."""
    await arriving(case)
    assert (await case.ask("pause")).ok


async def cancelled(case: DeletionCase) -> None:
    """Cancelled."""
    await arriving(case)
    assert (await case.ask("cancel")).ok


async def rejected(case: DeletionCase) -> None:
    """Refused for lack of space."""

    async def quota(quota_bytes: int | None) -> None:
        body = json.dumps({"max_storage_bytes": quota_bytes}).encode()
        assert (await case.here.ask(NODE, "configure", body, service="storage")).ok

    await quota(LEAF_BYTES)
    assert (await case.here.pull_fails(NODE))[0] == "quota_exceeded"
    await quota(None)


async def failed(case: DeletionCase) -> None:
    """The hub had no such revision."""
    case.repo += "@no-such-branch"
    assert (await case.here.pull_fails(NODE, case.repo))[0] == "not_found"


async def flipped(case: DeletionCase) -> None:
    """One byte is corrupt, and nobody has noticed."""
    await present(case)
    path = await case.blob()
    times = path.stat()
    with path.open("r+b") as f:
        f.write(b"\xff" if path.read_bytes()[:1] == b"\x00" else b"\x00")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


async def found_corrupt(case: DeletionCase) -> None:
    """The same, noticed: the blob is in quarantine."""
    await flipped(case)
    assert (await case.ask("verify", "storage")).ok
    assert list(case.node.layout.quarantine.iterdir())


async def truncated(case: DeletionCase) -> None:
    """A blob is truncated."""
    await present(case)
    os.truncate(await case.blob(), LEAF_BYTES + 1)


async def missing_blob(case: DeletionCase) -> None:
    """A blob is missing."""
    await present(case)
    (await case.blob()).unlink()


async def with_strangers(case: DeletionCase) -> None:
    """A person's own files are in its view."""
    await present(case)
    view = await case.view()
    for path in (view / "notes.txt", view / "sub" / "more" / "notes.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        case.stays.add(str(path.relative_to(case.node.layout.root)))


State = Callable[[DeletionCase], Awaitable[None]]
WAS_HERE: list[State] = [present, flipped, found_corrupt, truncated, missing_blob, with_strangers]
WAS_NOT: list[State] = [absent, arriving, paused, cancelled, rejected, failed]


@pytest.mark.parametrize("state", [*WAS_HERE, *WAS_NOT], ids=lambda state: state.__name__)
async def test_I5_a_delete_ends_with_no_files_from_any_state(site: Site, state: State) -> None:
    async with case_of(site) as case:
        await state(case)
        manifest = await case.manifest() if state in WAS_HERE else None
        site.hub.reset_faults()
        site.hub.reset_stats()
        outcome = await case.ask("delete", "storage")
        assert outcome.ok, outcome.error
        assert outcome.result["deleted"] == (state in WAS_HERE)
        assert outcome.result["models"] == ([manifest.model] if manifest else [])
        await case.nothing_is_left()
        # Again: nothing to do, nothing to publish.
        sequences = [await case.here.here.last_sequence(stream) for stream in ("EVT", "KV_spec")]
        again = await case.ask("delete", "storage")
        assert again.ok and not again.result["deleted"]
        assert sequences == [await case.here.here.last_sequence(stream) for stream in ("EVT", "KV_spec")]
        # Nothing starts again, whichever service starts and whatever comes back.
        await case.restart_service()
        await case.nothing_is_left()
        assert site.hub.stats().requests == RequestCounts(), "the hub was asked"


async def test_a_model_named_by_a_retired_node_is_deleted_after_forget(site: Site, fresh: Fresh) -> None:
    async with case_of(site) as case:
        await present(case)
        manifest = await case.manifest()
        stages = [
            StageSpec(rank=r, node=n, first_layer=r, last_layer=r + 1) for r, n in enumerate((NODE, "given-away"))
        ]
        name = fresh("instance")
        spec = InstanceSpec(id=name, repo=manifest.repo, commit=manifest.commit, stages=stages, context_tokens=1)
        await case.here.buckets.spec.put(instance_key(name), spec)
        refused = await case.ask("delete", "storage")
        assert refused.error is not None and refused.error.code == "in_use"
        assert await case.is_published(manifest)
        sender = CommandClient(case.here.here.nats, case.here.buckets)
        forget = Forget(node="given-away")
        forgotten = await sender.send("placement", "any", "forget", forget, new_command_id(), DEADLINE_S)
        assert forgotten.ok, forgotten.error
        assert (await case.ask("delete", "storage")).ok
        await case.nothing_is_left()


# Interrupted deletes


RENAME, UNLINK = "?rename,?renameat,?renameat2", "?unlink,?unlinkat"


def _tombstone(paths: StorePaths, manifest: Manifest) -> Path:
    path = paths.manifest(manifest.repo, manifest.commit)
    return paths.tombstones / f"{path.parent.name}@{path.name}"


STEPS: dict[str, tuple[str, Callable[[StorePaths, Manifest], Path]]] = {
    "the manifest leaves": (RENAME, lambda paths, m: paths.manifest(m.repo, m.commit)),
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
