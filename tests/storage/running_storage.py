"""The storage service as its clients see it: a real process on a real NATS, called as the fetcher calls it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from shoal_common.bus import subjects
from shoal_common.bus.keys import model_key, storage_key
from shoal_common.messages import decode, encode
from shoal_common.messages.downloads import StopDownloads
from shoal_common.messages.envelope import Command, Empty, Outcome
from shoal_common.messages.leases import AcquireLease, LeaseGrant, ReleaseLease
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import (
    CheckSpace,
    CommitBlob,
    CommittedBlob,
    Delete,
    EvictionPlan,
    ModelState,
    PlanEviction,
    RecordUse,
    Release,
    Reload,
    Reserve,
    ReserveResult,
    SealModel,
    SpaceCheck,
    StorageState,
)
from shoal_common.names import ModelId
from shoal_common.rpc.request_reply import RpcClient, RpcEndpoint, serve
from shoal_common.settings_file import change_settings
from shoal_common.store.store_paths import StorePaths
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.process import Process, node_environment, started
from tests.harness.waiting import eventually
from tests.storage.store_fixtures import Model, put

T = TypeVar("T")
WAIT_TIMEOUT_S = 45.0
ASK_DEADLINE_S = 45.0
DELETE_DEADLINE_S = 60.0


class Node:
    """A node under test: its directory, its NATS, and a client of its storage."""

    def __init__(self, here: Joined, server: NatsServer, home: Path, node: str) -> None:
        self.here, self.home, self.node, self._server = here, home, node, server
        self.layout = StorePaths(home / "store")
        self.withdrawn: list[StopDownloads] = []
        self._ask = RpcClient(here.nats)

    @asynccontextmanager
    async def storage(self, **environ: str) -> AsyncIterator[Process]:
        """Run the service while the body runs, then kill it."""
        limits = {"SHOAL_HEADROOM_BYTES": "0", **environ}
        environment = node_environment(self.home, self._server.url, **limits)
        async with started("-m", "shoal_storage", environment=environment) as process:
            await process.wait_ready()
            yield process

    @asynccontextmanager
    async def fetcher(self) -> AsyncIterator[None]:
        """Answer `withdraw` in place of the fetcher and record the requests."""

        async def withdraw(question: StopDownloads) -> Empty:
            self.withdrawn.append(question)
            return Empty()

        stopping = asyncio.Event()
        questions = {"stop_downloads": RpcEndpoint(StopDownloads, withdraw)}
        serving = asyncio.create_task(serve(self.here.nats, "fetcher", self.node, questions, stopping))
        try:
            yield
        finally:
            stopping.set()
            await serving

    async def ask(self, verb: str, question: object, kind: type[T]) -> T:
        """Send a request to storage."""
        return await self._ask("storage", self.node, verb, question, kind, ASK_DEADLINE_S, WAIT_TIMEOUT_S)

    async def reserve(self, manifest: Manifest) -> ReserveResult:
        """storage.reserve"""
        return await self.ask("reserve", Reserve(manifest=manifest), ReserveResult)

    async def release(self, manifest: Manifest) -> None:
        """storage.release"""
        await self.ask("release", Release(model=manifest.model, blobs=list(manifest.blob_sizes)), Empty)

    async def commit(self, blob: str, root: str = "") -> CommittedBlob:
        """storage.commit"""
        return await self.ask("commit", CommitBlob(blob=blob, leaf_list_digest=root), CommittedBlob)

    async def seal(self, manifest: Manifest) -> ModelState:
        """storage.seal"""
        return await self.ask("seal", SealModel(manifest=manifest), ModelState)

    async def fetch(self, model: Model) -> None:
        """Reserve, write and commit every missing blob."""
        for blob in (await self.reserve(model.manifest)).missing:
            put(self.layout, blob, model.blobs[blob])
            await self.commit(blob)

    async def bring_in(self, model: Model) -> ModelState:
        """Download and seal a model."""
        await self.fetch(model)
        return await self.seal(model.sealed)

    async def delete(self, model: str, identity: str = "") -> Outcome:
        """Send a delete with `nats req` and return its outcome."""
        headers = {"Nats-Msg-Id": identity} if identity else None
        subject = subjects.command("storage", self.node, "delete")
        body = encode(Delete(model=model))
        reply = await self.here.client.request(subject, body, timeout=DELETE_DEADLINE_S, headers=headers)
        return decode(reply.data, Outcome)

    async def command(self, verb: str, command: Command) -> Outcome:
        """Send a command with `nats req` and return its outcome."""
        subject = subjects.command("storage", self.node, verb)
        reply = await self.here.client.request(subject, encode(command), timeout=DELETE_DEADLINE_S)
        return decode(reply.data, Outcome)

    async def set_directories(self, **lists: Sequence[Path | str]) -> Outcome:
        """Set `libraries` or `volumes` as the node's owner does: in node.toml, which storage then reads again.

        A file that storage refuses is put back.
        """
        path = self.home / "node.toml"
        before = path.read_text()
        changes = {key: [str(directory) for directory in paths] or None for key, paths in lists.items()}
        change_settings(self.home, {"storage": changes}, lambda _: None)
        outcome = await self.command("reload", Reload())
        if not outcome.ok:
            path.write_text(before)
        return outcome

    async def plan(self, need_bytes: int) -> EvictionPlan:
        """storage.plan"""
        return await self.ask("plan", PlanEviction(need_bytes=need_bytes), EvictionPlan)

    async def ask_room(self, model: ModelId) -> SpaceCheck:
        """storage.room"""
        return await self.ask("check_space", CheckSpace(model=model), SpaceCheck)

    async def lease(self, model: str, holder: str = "a test", instance: str = "") -> LeaseGrant:
        """storage.lease"""
        return await self.ask("lease", AcquireLease(model=model, holder=holder, instance=instance), LeaseGrant)

    async def unlease(self, lease: str) -> None:
        """storage.unlease"""
        await self.ask("release_lease", ReleaseLease(id=lease), Empty)

    async def use(self, *models: Model) -> None:
        """storage.used"""
        await self.ask("record_use", RecordUse(models=[m.name for m in models]), Empty)

    async def model_state(self, model: Model) -> ModelState | None:
        """The published state of a model on this node."""
        return await self.here.buckets.state.get_as(model_key(self.node, model.name), ModelState)

    async def storage_state(self) -> StorageState:
        """The published state of the storage of this node."""
        state = await self.here.buckets.state.get_as(storage_key(self.node), StorageState)
        assert state is not None
        return state

    async def events(self) -> list[tuple[str, dict[str, Any]]]:
        """All events of this storage so far, oldest first."""
        subject, found, after = subjects.event("storage", self.node, "*"), [], 0
        count = (await self.here.js.stream_info("EVT", subjects_filter=subject)).state.subjects or {}
        for _ in range(sum(count.values())):
            message = await self.here.js.get_msg("EVT", seq=after + 1, subject=subject, next=True)
            after = message.seq or 0
            found.append((str(message.subject).rsplit(".", 1)[-1], decode(message.data or b"", dict[str, Any])))
        return found

    async def wait_events(self, *names: str) -> None:
        """Return once these are all events so far. An event may follow the state that it is about."""
        found: list[str] = []

        async def are_all() -> bool:
            found[:] = [name for name, _ in await self.events()]
            return found == list(names)

        await eventually(are_all, lambda: f"the events are {names}, not {found}", WAIT_TIMEOUT_S)


@asynccontextmanager
async def on_node(server: NatsServer, directory: Path, name: str) -> AsyncIterator[Node]:
    """A node with a home of its own; none of its services run yet."""
    home = directory / name
    home.mkdir(parents=True)
    (home / "node.toml").write_text(f'id = "{name}"\n')
    async with joined(server) as here:
        yield Node(here, server, home, name)
