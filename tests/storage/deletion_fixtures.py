"""A node whose models are deleted, and a model on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shoal_common.bus.keys import download_key, model_key, storage_key
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import ModelState, StorageState
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import Faults
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site
from tests.storage.store_fixtures import files_below

SERVICES = ("storage", "fetcher", "placement")


NODE = "deletes"


DEADLINE_S = 60.0


SLOWLY = Faults(bytes_per_s=LEAF_BYTES)


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
        return self.node.layout.view(manifest.model)

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


@asynccontextmanager
async def case_of(site: Site) -> AsyncIterator[DeletionCase]:
    async with site.join() as here:
        try:
            yield DeletionCase(site, here)
        except BaseException:
            print(site[NODE].log())
            raise


async def present(case: DeletionCase) -> None:
    """Complete."""
    await case.here.pull_ok(NODE)
