"""What the cluster is told of a node's disk: the only writer of `state` at `model.<node>.*` and `storage.<node>`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shoal_common.buckets import model_key, part_key, storage_key
from shoal_common.errors import ShoalError
from shoal_common.logs import Log
from shoal_common.messages import encode
from shoal_common.messages.records import (
    FurtherRootState,
    Manifest,
    ModelState,
    PartState,
    RootState,
    StorageState,
)
from shoal_common.names import DEFAULT_REVISION
from shoal_common.service import Context
from shoal_common.shape import read_shape
from shoal_common.watch import View, any_changed
from shoal_storage.adopted import Adopted
from shoal_storage.decide import Ledger, Limits, Part, paused_bytes
from shoal_storage.disk import Disk
from shoal_storage.leases import told
from shoal_storage.limits import overridden
from shoal_storage.links import show

log = Log("storage")

UNKNOWN_NAMED_AT_MOST = 5


class Announcer:
    """Says what the ledger holds, when that differs from what was said."""

    def __init__(
        self, context: Context, disk: Disk, ledger: Ledger, limits: Limits, announced: View, of_the_disk: View
    ) -> None:
        self.node = self._node = context.node
        self._state = context.buckets.state
        self._disk, self._ledger, self._limits = disk, ledger, limits
        self._announced, self._of_the_disk = announced, of_the_disk
        self._said: dict[str, int] = {}
        self._from_environment = overridden(context.environ)
        self._publishing = asyncio.Lock()
        self._published: StorageState | None = None
        self.roots: list[RootState] = []
        """What the next `publish` says of the read-only roots."""
        self.further: Callable[[], list[FurtherRootState]] = list
        """What `publish` says of the further roots. Called in a thread."""

    def use_limits(self, limits: Limits) -> None:
        """Say these limits from the next time on."""
        self._limits = limits

    async def announce_all(self) -> None:
        """At start and after a reconnection: say what the disk holds, and take back what it no longer does."""
        held: set[str] = set()
        self._said.clear()
        for manifest in list(self._ledger.manifests.values()) if not self._ledger.away else []:
            try:
                await asyncio.to_thread(self._disk.build_view, manifest)
                await self.announce(manifest)
            except OSError as e:
                log.warning("a model cannot be opened; not announced", model=manifest.model, why=str(e))
                continue
            held.add(model_key(self._node, manifest.model))
        for model, adopted in self._ledger.offered.items():
            if await self._offer(adopted):
                held.add(model_key(self._node, model))
        for part in list(self._ledger.parts.values()) if not self._ledger.away else []:
            await self.announce_part(part)
            held.add(part_key(self._node, part.manifest.model))
        told = [k for k, _ in self._announced.items("model.", ModelState)]
        told += [k for k, _ in self._announced.items("part.", PartState)]
        for key in told:
            if key not in held:
                await self._take_back(key)
        self._published = None
        await self.publish()

    async def announce(self, manifest: Manifest) -> ModelState:
        """Say that a model is ready. Returns what is said of it."""
        lay = self._disk.layout
        shape, why = None, ""
        try:
            shape = await asyncio.to_thread(read_shape, lay.view(manifest.repo, manifest.commit))
        except ShoalError as e:
            why = e.message
        offered = self._ledger.offered.get(manifest.model)
        path = (lay.adopted_model if offered else lay.manifest)(manifest.repo, manifest.commit)
        ready_at_s = (await asyncio.to_thread(path.stat)).st_mtime
        state = ModelState(
            node=self._node,
            repo=manifest.repo,
            commit=manifest.commit,
            size_bytes=manifest.size_bytes,
            file_count=len(manifest.files),
            # A snapshot that no ref names has its commit and no other name.
            revisions=manifest.revisions or ([] if offered else [DEFAULT_REVISION]),
            shape=shape,
            shape_error=why,
            ready_at_s=round(ready_at_s, 3),
            adopted_from=offered.directory if offered else "",
        )
        await self._say(model_key(self._node, manifest.model), state)
        return state

    async def announce_part(self, part: Part) -> None:
        """Say which layers of a model are here."""
        await self._say(part_key(self._node, part.manifest.model), part_state(self._node, part))

    async def take_back_part(self, model: str) -> None:
        """Say that no part of a model (`org/name@commit`) is here any more."""
        await self._take_back(part_key(self._node, model))

    async def take_back(self, model: str) -> None:
        """Say that a model (`org/name@commit`) is here no more; or, where a read-only root has it too, is there."""
        offered = self._ledger.offered.get(model)
        if offered and await self._offer(offered):
            return
        await self._take_back(model_key(self._node, model))

    async def _offer(self, adopted: Adopted) -> bool:
        try:
            await asyncio.to_thread(show, self._disk.layout, adopted)
            await self.announce(adopted.manifest)
        except OSError as e:
            log.warning("a model cannot be opened; not announced", model=adopted.manifest.model, why=str(e))
            return False
        return True

    async def publish(self) -> None:
        """Say how the disk stands, when that has changed."""
        # One at a time, each reading the ledger in its turn: an older picture never follows a newer one.
        async with self._publishing:
            free = await asyncio.to_thread(self._disk.free_bytes)
            ledger = self._ledger
            unproven = {b: s.size_bytes for b, s in ledger.unproven.items() if b not in ledger.wrong}
            at, lay = self._disk.layout.root, self._disk.layout
            paths = [lay.blob(b) for b in sorted(ledger.wrong)[:UNKNOWN_NAMED_AT_MOST]]
            wrong = [str(path.relative_to(at) if path.is_relative_to(at) else path) for path in paths]
            unknown = [*wrong, *ledger.unknown.paths]
            state = StorageState(
                node=self._node,
                quota_bytes=self._limits.quota_bytes,
                headroom_bytes=self._limits.headroom_bytes,
                eviction_policy=self._limits.eviction_policy,
                partial_retention_s=self._limits.partial_retention_s,
                from_environment=self._from_environment,
                used_bytes=ledger.used_bytes,
                reserved_bytes=ledger.reserved_bytes,
                free_bytes=free,
                model_count=len(ledger.manifests),
                blob_count=len(ledger.blobs),
                quarantined=sorted(ledger.quarantined),
                pinned=sorted(ledger.pinned & ledger.here.keys()),
                unproven_count=len(unproven),
                unproven_bytes=sum(unproven.values()),
                unknown_count=ledger.unknown.count + len(ledger.wrong),
                unknown_bytes=ledger.unknown.size_bytes + sum(s.size_bytes for s in ledger.wrong.values()),
                unknown=unknown[:UNKNOWN_NAMED_AT_MOST],
                store_away=ledger.away,
                leases=told(ledger.leases.values()),
                unfinished=sorted(ledger.ended - ledger.here.keys()),
                reserve_bytes=self._disk.reserve.held_bytes,
                paused=paused_bytes(ledger),
                read_only_roots=self.roots,
                max_upload_bytes_per_s=self._limits.transfer.max_upload_bytes_per_s,
                max_hub_bytes_per_s=self._limits.transfer.max_hub_bytes_per_s,
                max_peer_bytes_per_s=self._limits.transfer.max_peer_bytes_per_s,
                roots=await asyncio.to_thread(self.further),
            )
            if state != self._published:
                await self._say(storage_key(self._node), state)
                self._published = state

    async def _say(self, key: str, value: object) -> None:
        """Write unless exactly this stands there: a start that changes nothing writes nothing."""
        entry = await self._state.get(key)
        stands = entry is not None and entry.value == encode(value)
        self._said[key] = entry.revision if entry and stands else await self._state.put(key, value)

    async def _take_back(self, key: str) -> None:
        self._said.pop(key, None)
        await self._state.delete(key)

    async def taken(self) -> None:
        """Return once something that was said does not stand there any more.

        Whoever retired this node while it could not be heard has removed it.
        """
        views = (self._announced, self._of_the_disk)
        while True:
            seen = tuple(view.changes for view in views)
            if any(self._is_missing(key, revision) for key, revision in self._said.items()):
                return
            await any_changed(views, seen)

    def _is_missing(self, key: str, revision: int) -> bool:
        view = self._of_the_disk if key == storage_key(self._node) else self._announced
        return view.revision >= revision and key not in view


def part_state(node: str, part: Part) -> PartState:
    """What the cluster is told of a part."""
    manifest = part.manifest
    return PartState(
        node=node,
        repo=manifest.repo,
        commit=manifest.commit,
        layers=part.layers,
        size_bytes=part.size_bytes,
        model_bytes=manifest.size_bytes,
        revisions=manifest.revisions,
    )
