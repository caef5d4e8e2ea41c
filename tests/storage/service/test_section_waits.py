"""Nobody waits in storage's critical section: what a request waits for holds up no other request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.streams import stream_configs
from shoal_common.errors import QuotaExceeded
from shoal_common.messages.downloads import StopDownloads
from shoal_common.messages.envelope import Empty
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import CheckSpace, GetManifest, Pin, PlanEviction, Release, StorageState
from shoal_common.settings.node import StorageSettings
from shoal_storage.eviction import executor
from shoal_storage.files.volume_paths import VolumePaths
from shoal_storage.leases import last_use
from shoal_storage.scan import reconciler
from shoal_storage.scan.scanner import StoreScan, scan_store
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.tiny_filesystem import small_disk
from tests.harness.waiting import eventually
from tests.storage.running_storage import Node, on_node
from tests.storage.service.test_eviction_races import A, B, C, model_of
from tests.storage.storage_parts import GATE_DEADLINE_S, StorageParts, storage_parts
from tests.storage.store_fixtures import Model


async def test_nats_cannot_be_used_inside_and_can_outside(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage")) as parts:
        service = parts.context.service
        uses: list[Callable[[], Awaitable[object]]] = [
            lambda: service.buckets.state.get("storage.nobody"),
            lambda: service.events.emit("rejected"),
            lambda: service.rpc("fetcher", parts.node, "stop_downloads", StopDownloads(repo="org/a"), Empty),
            parts.usage.catch_up,
            parts.context.publishing.publish,
        ]
        for use in uses:
            async with parts.context.section:
                with pytest.raises(AssertionError, match="NATS is used where this task must not wait"):
                    await use()
        await service.buckets.state.get("storage.nobody")
        async with parts.context.section:
            await asyncio.create_task(service.buckets.state.get("storage.nobody"))  # another task is free to


@asynccontextmanager
async def refusing(node: Node) -> AsyncIterator[None]:
    """Let NATS refuse every write of `state` while the body runs, as if it were full. All else works."""
    (wanted,) = [c for c in stream_configs(1) if c.name == "KV_state"]
    usual, wanted.max_bytes = wanted.max_bytes, 1
    await node.here.js.update_stream(wanted)
    try:
        yield
    finally:
        wanted.max_bytes = usual
        await node.here.js.update_stream(wanted)


async def while_waiting(waiting: asyncio.Task[object], *requests: Awaitable[object]) -> None:
    """Carry out requests, each of which must end before the task that waits does."""
    for request in requests:
        async with asyncio.timeout(GATE_DEADLINE_S):
            await request
        assert not waiting.done(), "a request had to wait for what another one waits for"


async def test_requests_are_answered_while_nats_refuses_the_state(
    own_nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model, pears: Model
) -> None:
    async with on_node(own_nats, tmp_path, fresh("storage")) as node, node.storage():
        await node.bring_in(pears)
        await node.fetch(apples)
        async with refusing(node):
            sealing = asyncio.create_task(node.seal(apples.sealed))
            path = node.layout.manifest(apples.manifest.model)

            async def sealed() -> bool:
                return path.exists()

            await eventually(sealed, "it is sealed, and is being published")
            await while_waiting(
                sealing,
                node.ask("manifest", GetManifest(model="org/pears"), Manifest),
                node.reserve(model_of("other", 500).manifest),
                node.command("pin", Pin(model="org/pears")),
                node.lease("org/pears"),
            )
        assert (await sealing).repo == "org/apples"
        assert await node.model_state(apples) is not None, "a seal is answered once the model is published"

        async def latest() -> StorageState | None:
            state = await node.storage_state()
            return state if state.pinned == [pears.name] and state.leases and state.reserved_bytes else None

        await eventually(latest, "what changed meanwhile is published")


async def test_requests_are_answered_while_a_disk_keeps_deleted_files(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage"), StorageSettings(None, 0, "lru")) as parts:
        await parts.bring_in(A, B, C)
        comes = model_of("comes", 700)
        await parts.reserve(comes)
        parts.disk.claims_free_bytes = 100  # as long as somebody holds what is evicted open
        polled = asyncio.Event()
        wait = parts.evictions.wait_space_released

        async def waits(suffices: Callable[[], Awaitable[bool]]) -> bool:
            polled.set()
            return await wait(suffices)

        monkeypatch.setattr(parts.evictions, "wait_space_released", waits)
        monkeypatch.setattr(executor, "_FREED_DEADLINE_S", GATE_DEADLINE_S)
        checking = asyncio.create_task(parts.disk_full.check_space(CheckSpace(model=comes.name)))
        await polled.wait()
        pinning = parts.maintenance.pin(Pin(model="org/bbb"), "")
        await while_waiting(checking, pinning, parts.reserve(comes))
        parts.disk.claims_free_bytes = 10_000
        assert (await checking).enough


async def test_requests_are_answered_while_an_eviction_waits(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    """The same in a process: a reader has the evicted file open, and its space comes back with the reader's end."""
    old, kept = model_of("old", 2 << 20), model_of("kept", 1000)
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        with small_disk(node.layout.root, 8 << 20, 128):
            environ = {"SHOAL_EVICTION_POLICY": "lru", "SHOAL_BALLAST_BYTES": "0"}
            async with node.storage(**environ) as process:
                await node.bring_in(old)
                await node.bring_in(kept)
                await node.use(kept)
                with node.layout.blob(next(iter(old.blobs))).open("rb"):
                    reserving = asyncio.create_task(node.reserve(model_of("new", 7 << 20).manifest))

                    async def evicted() -> bool:
                        return await node.model_state(old) is None

                    await process.wait_line("model evicted")
                    await while_waiting(reserving, node.command("pin", Pin(model="org/kept")), node.lease("org/kept"))
                    with pytest.raises(QuotaExceeded, match="the disk has not released"):
                        await reserving
                    await eventually(evicted, "it is unpublished")
                await process.kill()


async def test_requests_are_answered_while_instances_are_unknown(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_use, "CATCH_UP_TIMEOUT_S", GATE_DEADLINE_S)
    async with storage_parts(nats, tmp_path, fresh("storage"), StorageSettings(3000, 0)) as parts:
        await parts.bring_in(A, B)
        parts.context.specs = behind = KvMirror("spec")  # it has received nothing yet
        await parts.here.buckets.spec.put(f"test.{parts.node}", "x")
        planning = asyncio.create_task(parts.maintenance.plan(PlanEviction(need_bytes=5000)))
        await asyncio.sleep(0)
        await while_waiting(
            planning, parts.maintenance.pin(Pin(model="org/aaa"), ""), parts.fetch_blobs(model_of("small", 100))
        )
        behind.replace({}, await parts.here.last_sequence("KV_spec"))
        assert (await planning).protected.keys() >= {A.name}
        await parts.here.buckets.spec.delete(f"test.{parts.node}")


# A scan, which takes as long as the store is large


class GatedScan:
    """A scan of the store that stops once it has read all of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.gate = threading.Event(), threading.Event()
        monkeypatch.setattr(reconciler, "scan_store", self._scan)

    def _scan(self, layout: VolumePaths) -> StoreScan:
        scan = scan_store(layout)
        self.reached.set()
        assert self.gate.wait(GATE_DEADLINE_S)
        return scan

    @asynccontextmanager
    async def running(self, parts: StorageParts) -> AsyncIterator[asyncio.Task[None]]:
        """Scan; the scan has read the store when the body begins, and applies what it has seen after it."""
        self.reached.clear()
        self.gate.clear()
        scanning = asyncio.create_task(parts.reconciler.scan())
        try:
            assert await asyncio.to_thread(self.reached.wait, GATE_DEADLINE_S)
            yield scanning
        finally:
            self.gate.set()
        await scanning


async def test_requests_are_answered_while_a_store_is_scanned(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage")) as parts:
        await parts.bring_in(A)
        async with GatedScan(monkeypatch).running(parts) as scanning:
            await while_waiting(
                scanning,
                parts.maintenance.pin(Pin(model="org/aaa"), ""),
                parts.bring_in(B),
                parts.maintenance.plan(PlanEviction(need_bytes=1)),
            )


async def test_a_scan_undoes_nothing_that_storage_did_during_it(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apples: Model, pears: Model
) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage")) as parts:
        ledger, gated, lost = parts.ledger, GatedScan(monkeypatch), parts.disk.layout.blob(next(iter(A.blobs)))
        await parts.bring_in(A, pears)
        await parts.fetch_blobs(C)
        async with gated.running(parts):
            await parts.bring_in(apples)  # shares a blob with the model that is deleted
            async with parts.context.section as held:
                await parts.deleter.delete_model(held, pears.name)
            await parts.fetch.release(Release(model=C.name, blobs=list(C.blobs)))
            lost.unlink()  # by hand, and after the scan has seen it
            await parts.fetch_blobs(B)
        assert ledger.manifests.keys() == {A.name, apples.name}
        assert not ledger.unverified and not ledger.incomplete and not ledger.foreign.count
        assert ledger.blobs.keys() == {*apples.sealed.blob_sizes, *B.sealed.blob_sizes, *A.sealed.blob_sizes}
        await parts.reconciler.scan()  # nothing else runs: this one sees the store as it is
        assert ledger.incomplete.keys() == {A.name} and not parts.reconciler.is_scan_due
        assert ledger.blobs.keys() == {*apples.sealed.blob_sizes, *B.sealed.blob_sizes}
        lost.write_bytes(A.bytes["weights.bin"])


async def test_foreign_files_are_counted_by_the_next_quiet_scan(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage")) as parts:
        (parts.disk.layout.root / "theirs.txt").write_text("theirs")
        async with GatedScan(monkeypatch).running(parts):
            await parts.bring_in(A)
        assert parts.reconciler.is_scan_due and not parts.ledger.foreign.count
        await parts.reconciler.scan()
        assert not parts.reconciler.is_scan_due and parts.ledger.foreign.paths == ("theirs.txt",)
