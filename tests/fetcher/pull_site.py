"""Helpers of whole-service tests: send commands as `nats req` does, inspect stores, states and the hub's counters."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from shoal_common.bus import subjects
from shoal_common.bus.keys import download_key, model_key, storage_key
from shoal_common.messages import decode
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import ModelState, StorageState
from shoal_common.names import ModelRef
from shoal_demo.hub_server import RunningHub
from shoal_storage.store.partials import PartialMeta
from tests.fetcher.hub_repos import make_model
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.node import Node, restore
from tests.harness.waiting import eventually

PULL_DEADLINE_S = 45.0


class Site(msgspec.Struct):
    """Everything a test works with."""

    server: NatsServer
    hub: RunningHub
    hub_root: Path
    nodes: dict[str, Node]
    repo: str
    """The name of this test's model."""

    def __getitem__(self, node: str) -> Node:
        return self.nodes[node]

    def make(self, files: dict[str, bytes], repo: str = "") -> int:
        """Put this test's model on the hub. Returns its size in bytes."""
        return make_model(self.hub_root, repo or self.repo, files)

    def hub_bytes(self, repo: str = "") -> int:
        """Return the bytes of the model's files that the hub has sent."""
        prefix = (repo or self.repo) + "/"
        return sum(f.bytes for name, f in self.hub.stats().files.items() if name.startswith(prefix))

    def gets(self, path: str, repo: str = "") -> int:
        """Return how often a file's content was requested from the hub."""
        found = self.hub.stats().files.get(f"{repo or self.repo}/{path}")
        return found.gets if found else 0

    @asynccontextmanager
    async def join(self) -> AsyncIterator[Pulls]:
        """Open this test's own connection."""
        async with joined(self.server) as here:
            yield Pulls(here, self)


@contextmanager
def site_of_a_test(site: Site) -> Iterator[Site]:
    """Lend shared nodes to a test, as healthy as they began. Afterwards every store is checked (I1, I2).

    A test that leaves a partial blob fails; the next one finds none.
    """
    restore(site.server, *site.nodes.values())
    asyncio.run(_delete_partials(site))
    site.hub.reset_faults()
    site.hub.reset_stats()
    yield site
    site.hub.reset_faults()
    for node in site.nodes.values():
        check_store(node)
    asyncio.run(_require_no_partial(site))


async def _delete_partials(site: Site) -> None:
    """Delete what a failed test has left."""
    for node in site.nodes.values():
        models = {ModelRef.parse(model).repo for meta in _partial_metas(node) for model in meta.models}
        async with site.join() as here:
            for model in models:
                await here.delete(node.id, model)


async def _require_no_partial(site: Site) -> None:
    async def gone() -> bool:
        return not any(partials(node) for node in site.nodes.values())

    def left() -> str:
        return f"no partial blob is left: { {n.id: (partials(n), _partial_metas(n)) for n in site.nodes.values()} }"

    await eventually(gone, left, PULL_DEADLINE_S)


def _partial_metas(node: Node) -> list[PartialMeta]:
    return [decode(p.read_bytes(), PartialMeta) for p in node.layout.partials.glob("*/meta.json")]


class Pulls:
    """Commands and queries over a connection."""

    def __init__(self, here: Joined, site: Site) -> None:
        self.here, self.site, self.buckets = here, site, here.buckets

    async def ask(self, node: str, verb: str, body: bytes, identity: str = "", service: str = "fetcher") -> Outcome:
        """Send a command like `nats req`: a core request on its subject. The first reply is the outcome."""
        headers = {"Nats-Msg-Id": identity} if identity else None
        subject = subjects.command(service, node, verb)
        reply = await self.here.client.request(subject, body, timeout=PULL_DEADLINE_S, headers=headers)
        return decode(reply.data, Outcome)

    async def pull(self, node: str, model: str = "", identity: str = "") -> Outcome:
        """Pull a model on a node. Returns the outcome."""
        return await self.ask(node, "download", _model(model or self.site.repo), identity)

    async def pull_ok(self, node: str, model: str = "") -> DownloadState:
        """Pull, require success, and return the resulting state."""
        outcome = await self.pull(node, model)
        assert outcome.ok, outcome.error
        return msgspec.convert(outcome.result, DownloadState)

    async def pull_fails(self, node: str, model: str = "") -> tuple[str, str]:
        """Pull, require failure, and return the error's code and message, which is one line."""
        outcome = await self.pull(node, model)
        assert not outcome.ok and outcome.error is not None
        assert "\n" not in outcome.error.message and "Traceback" not in outcome.error.message
        return outcome.error.code, outcome.error.message

    async def begin(self, node: str, model: str = "") -> asyncio.Task[Outcome]:
        """Start a pull and return its task, once the download has a state."""
        task = asyncio.create_task(self.pull(node, model))
        await self.state(node, lambda s: True, model)
        return task

    async def cancel(self, node: str, model: str = "") -> Outcome:
        """Cancel a download."""
        return await self.ask(node, "cancel", _model(model or self.site.repo))

    async def delete(self, node: str, model: str = "") -> Outcome:
        """Delete a model from a node."""
        return await self.ask(node, "delete", _model(model or self.site.repo), service="storage")

    async def state_now(self, node: str, model: str = "") -> DownloadState | None:
        """Return the published state of a download, or None."""
        return await self.buckets.state.get_as(download_key(node, model or self.site.repo), DownloadState)

    async def state(
        self, node: str, wanted: Callable[[DownloadState], bool], model: str = "", deadline_s: float = 15.0
    ) -> DownloadState:
        """Wait for a state of a download that satisfies `wanted`."""

        async def matching_state() -> DownloadState | None:
            found = await self.state_now(node, model)
            return found if found is not None and wanted(found) else None

        return await eventually(matching_state, f"the download on {node} is as wanted", deadline_s)

    async def durable(self, node: str, size_bytes: int = 1, model: str = "") -> DownloadState:
        """Wait until a download is fetching and has at least so many durable bytes."""
        return await self.state(node, lambda s: s.phase == "fetching" and s.done_bytes >= size_bytes, model)

    async def nothing_is_left(self, node: str, model: str = "") -> None:
        """Require no request, no partial blob, no reservation, and no blob that no model on the node needs."""
        name = model or self.site.repo
        assert await self.buckets.spec.get_as(download_key(node, name), DownloadRequest) is None
        assert partials(self.site[node]) == []
        assert stray_blobs(self.site[node]) == set()
        storage = await self.buckets.state.get_as(storage_key(node), StorageState)
        assert storage is not None and storage.reserved_bytes == 0

    async def no_lease_is_left(self) -> None:
        """Wait until all origin leases are released."""

        held: list[str] = []

        async def none() -> bool:
            keys = await self.here.js.streams_info()
            assert keys
            info = await self.here.js.stream_info("KV_lease", subjects_filter=">")
            held.clear()
            for subject in info.state.subjects or {}:
                if entry := await self.buckets.lease.get(subject.removeprefix("$KV.lease.")):
                    held.append(f"{subject} {entry.value!r} {entry.revision}")
            return not held

        await eventually(none, lambda: f"no lease is held: {held}")

    async def manifest(self, node: str, model: str = "") -> Manifest:
        """Return the manifest of a ready model, from the disk."""
        for path in self.site[node].layout.manifests.glob("*/*.json"):
            found = decode(path.read_bytes(), Manifest)
            if found.repo == (model or self.site.repo):
                return found
        raise AssertionError(f"{model or self.site.repo} has no manifest on {node}")

    async def assert_complete(self, node: str, files: dict[str, bytes], model: str = "") -> None:
        """Require that each file is in the view with its bytes, and that the node has published the model."""
        manifest = await self.manifest(node, model)
        assert {f.path for f in manifest.files} == set(files)
        assert manifest.sealed
        for path, content in files.items():
            assert self.site[node].layout.view_file(manifest, path).read_bytes() == content, path
        assert await self.buckets.state.get_as(model_key(node, manifest.model), ModelState) is not None
        assert partials(self.site[node]) == []


def _model(name: str) -> bytes:
    return json.dumps({"model": name}).encode()


def partials(node: Node) -> list[str]:
    """Return the names of the partial blobs on the disk."""
    return sorted(p.name for p in node.layout.partials.iterdir())


def blobs(node: Node) -> dict[str, Path]:
    """Return every blob on a node's disk."""
    return {p.name: p for p in node.layout.blobs.glob("*/*")}


def manifests(node: Node) -> list[Manifest]:
    """Return every manifest on a node's disk."""
    return [decode(p.read_bytes(), Manifest) for p in node.layout.manifests.glob("*/*.json")]


def stray_blobs(node: Node) -> set[str]:
    """Return the blobs that no manifest names."""
    return set(blobs(node)) - {f.sha256 for m in manifests(node) for f in m.files}


_checked: set[Path] = set()


def check_store(node: Node) -> None:
    """I1: a blob hashes to its name. I2: all blobs of a manifest are present. Each blob is hashed once per run."""
    for sha256, path in blobs(node).items():
        if path not in _checked:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, f"I1: {path}"
            _checked.add(path)
    here = blobs(node)
    for manifest in manifests(node):
        for f in manifest.files:
            assert f.sha256 in here and here[f.sha256].stat().st_size == f.size_bytes, (
                f"I2: {manifest.model} {f.path}"
            )
