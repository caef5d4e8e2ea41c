"""A node's downloads in one process: buckets in memory that can be cut off, and a storage that answers by hand.

Every download comes to a request that storage does not answer: it runs for as long as nobody stops it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx2

from shoal_common.bus.events import EventEmitter
from shoal_common.bus.keys import download_key
from shoal_common.bus.kv_bucket import Bucket, Buckets
from shoal_common.errors import NotFound, Unavailable
from shoal_common.identity.seals import SealKeeper
from shoal_common.messages import decode, encode
from shoal_common.messages.downloads import DownloadCommand, DownloadRequest, DownloadState
from shoal_common.messages.envelope import Empty
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.storage import GetManifest, Release, Reserve
from shoal_common.rpc.request_reply import RpcClient
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.downloads.blob_fetcher import BlobFetcher
from shoal_fetcher.downloads.manager import DownloadManager
from shoal_fetcher.downloads.model_fetch import DownloadContext, LeafListReader
from shoal_fetcher.downloads.request_store import DownloadRequests
from shoal_fetcher.hub.client import HubClient, HubSettings
from shoal_fetcher.hub.listings import HubListings
from shoal_fetcher.storage_client import StorageClient

T = TypeVar("T")
NODE = "a"
COMMIT = "c" * 40
TURNS = 60
"""Turns of the loop after which everything here has come to rest."""


def model(name: str) -> str:
    """Return a model, named by its commit: no hub is asked for it."""
    return f"org/{name}@{COMMIT}"


async def settle(turns: int = TURNS) -> None:
    """Let everything run that waits for nothing from outside."""
    for _ in range(turns):
        await asyncio.sleep(0)


class Outage:
    """NATS, which may be cut off: then a call waits, and fails when the outage is given up."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self._over.set()
        self._failed = False

    def begin(self) -> None:
        """Let calls wait from now on."""
        self._over.clear()

    def end(self, failed: bool) -> None:
        """Let calls pass from now on; those that wait fail, if `failed`, as after a long outage."""
        self._failed = failed
        self._over.set()

    async def wait(self) -> None:
        """Return when a call may pass. Raises Unavailable."""
        await asyncio.sleep(0)
        if not self._over.is_set():
            await self._over.wait()
            if self._failed:
                raise Unavailable("NATS has not answered for 60 s")


class MemoryBucket(Bucket):
    """A bucket in memory."""

    def __init__(self, outage: Outage) -> None:
        self.values: dict[str, bytes] = {}
        self._outage = outage

    async def put(self, key: str, value: object) -> int:
        """Write a value."""
        await self._outage.wait()
        self.values[key] = encode(value)
        await asyncio.sleep(0)
        return 1

    async def create(self, key: str, value: object, ttl_s: int | None = None) -> int | None:
        """Write a value, unless there is one."""
        await self._outage.wait()
        if key in self.values:
            return None
        return await self.put(key, value)

    async def get_as(self, key: str, kind: type[Any]) -> Any:
        """Return a value, or None."""
        await self._outage.wait()
        return decode(self.values[key], kind) if key in self.values else None

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Remove a key."""
        await self._outage.wait()
        return self.values.pop(key, None) is not None


class ManualStorage(RpcClient):
    """Answers what the fetcher asks of storage: `manifest` and `release` unless they hang, `reserve` never."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        """Unanswered requests of running downloads, by model."""
        self.hanging_manifests = False
        self.hanging_releases: set[str] = set()
        """Repositories whose release is not answered."""

    async def __call__(
        self,
        service: str,
        node: str,
        verb: str,
        request: object,
        reply_type: type[T],
        deadline_s: float = 0.0,
        restart_wait_s: float = 0.0,
    ) -> T:
        """Answer, as the class says."""
        return cast(T, await self._answer(verb, request))

    async def _answer(self, verb: str, request: object) -> object:
        await asyncio.sleep(0)
        match request:
            case GetManifest(model=name):
                if self.hanging_manifests:
                    await self._hang(name)
                repo, _at, commit = name.partition("@")
                return Manifest(
                    repo=repo, commit=commit, files=[ManifestFile(path="f", size_bytes=1, sha256="a" * 64)]
                )
            case Reserve(manifest=manifest):
                await self._hang(manifest.model)
            case Release(model=name):
                if name.partition("@")[0] in self.hanging_releases:
                    await asyncio.Event().wait()
                return Empty()
        raise NotFound(f"no {verb} here")

    async def _hang(self, name: str) -> None:
        self.asked[name] += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.asked[name] -= 1


class StillCluster(ClusterView):
    """A cluster in which nothing changes."""

    def __init__(self, state: MemoryBucket) -> None:
        self._bucket = state

    def own_downloads(self) -> dict[str, DownloadState | None]:
        """Return this node's download states."""
        states = [decode(value, DownloadState) for value in self._bucket.values.values()]
        return {state.model: state for state in states}

    async def wait_reply_lost(self, service: str) -> None:
        """No reply is ever lost."""
        await asyncio.Event().wait()


class Silence(EventEmitter):
    """Emits nothing."""

    def __init__(self) -> None:
        """Needs no NATS."""

    async def emit(self, name: str, **fields: object) -> None:
        """Let others run, as sending does."""
        await asyncio.sleep(0)


class Control:
    """One fetcher's downloads, and what can be seen of them from outside."""

    def __init__(self, manager: DownloadManager, buckets: Buckets, storage: ManualStorage, outage: Outage) -> None:
        self.manager, self.storage, self.outage, self._buckets = manager, storage, outage, buckets
        self._pulls: list[asyncio.Task[object]] = []

    async def download(self, name: str, layers: list[int] | None = None) -> None:
        """Start a download, and return when it runs."""
        command = DownloadCommand(model=model(name), layers=layers or [])
        pull = asyncio.create_task(self.manager.download(command, f"pull-{name}"))
        pull.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._pulls.append(pull)
        await settle()
        assert self.runs(name)

    def runs(self, name: str) -> bool:
        """Return whether exactly one download of the model runs."""
        assert self.storage.asked[model(name)] in (0, 1)
        return self.storage.asked[model(name)] == 1

    def request(self, name: str) -> DownloadRequest | None:
        """Return the stored request."""
        return _decoded(self._buckets.spec, name, DownloadRequest)

    def state(self, name: str) -> DownloadState | None:
        """Return the published state."""
        return _decoded(self._buckets.state, name, DownloadState)


def _decoded(bucket: Bucket, name: str, kind: type[T]) -> T | None:
    value = cast(MemoryBucket, bucket).values.get(download_key(NODE, model(name)))
    return decode(value, kind) if value is not None else None


@asynccontextmanager
async def downloads_of_a_node() -> AsyncIterator[Control]:
    """Run the downloads of a node until the body ends."""
    outage, storage = Outage(), ManualStorage()
    buckets = Buckets.__new__(Buckets)
    for name in ("live", "spec", "state", "lease", "done"):
        setattr(buckets, name, MemoryBucket(outage))

    cluster_view = StillCluster(cast(MemoryBucket, buckets.state))
    hub = HubClient(HubSettings(offline=True), httpx2.AsyncClient())
    context = DownloadContext(
        node=NODE,
        layout=StorePaths(Path("/nowhere")),
        buckets=buckets,
        rpc=storage,
        events=Silence(),
        storage=StorageClient(storage, NODE, cluster_view),
        hub=hub,
        cluster_view=cluster_view,
        blobs=cast(BlobFetcher, None),
        leaf_lists=cast(LeafListReader, None),
        seals=cast(SealKeeper, None),
        listings=HubListings(hub),
        requests=DownloadRequests(buckets, NODE, []),
    )
    try:
        async with asyncio.TaskGroup() as tasks:
            manager = DownloadManager(context, tasks)
            yield Control(manager, buckets, storage, outage)
            manager.stop()
    finally:
        outage.end(failed=True)
