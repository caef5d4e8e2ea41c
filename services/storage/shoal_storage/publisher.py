"""Publishes a node's disk: the only writer of `state` at `model.<node>.*`, `shard.<node>.*` and `storage.<node>`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shoal_common.bus.keys import model_key, shard_key, storage_key
from shoal_common.bus.kv_mirror import KvMirror, any_changed
from shoal_common.errors import ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages import encode
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import LibraryState, ModelState, ShardState, StorageState, VolumeState
from shoal_common.models.model_shape import read_model_shape
from shoal_common.names import DEFAULT_REVISION
from shoal_common.service import ServiceContext
from shoal_common.settings.node import PublishedSettings, StorageSettings
from shoal_common.settings.values import changeable, overridden_by_env
from shoal_storage.ledger.entries import Shard
from shoal_storage.ledger.lease import to_lease_states
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.library_model import LibraryModel
from shoal_storage.ledger.references import bytes_of_paused_models
from shoal_storage.store.commit import link_view
from shoal_storage.store.library_records import build_view
from shoal_storage.store.store import Store

log = StructuredLogger("storage")

MAX_FOREIGN_PATHS = 5


class StatePublisher:
    """Publishes the ledger when it differs from what was last published."""

    def __init__(
        self,
        context: ServiceContext,
        store: Store,
        ledger: Ledger,
        settings: StorageSettings,
        model_mirror: KvMirror,
        storage_mirror: KvMirror,
    ) -> None:
        self.node = self._node = context.node
        self._state = context.buckets.state
        self._store, self._ledger, self._settings = store, ledger, settings
        self._model_mirror, self._storage_mirror = model_mirror, storage_mirror
        self._revisions: dict[str, int] = {}
        self._overridden_by_env = overridden_by_env(changeable(StorageSettings), context.environ)
        self._publishing = asyncio.Lock()
        self._published: StorageState | None = None
        self.libraries: list[LibraryState] = []
        """The libraries, as `publish` reports them next."""
        self.volumes: Callable[[], list[VolumeState]] = list
        """Returns the volumes as `publish` reports them. Called in a thread."""

    def apply_settings(self, settings: StorageSettings) -> None:
        """Publish these settings from the next `publish` on."""
        self._settings = settings

    async def publish_all(self) -> None:
        """Publish everything the disk holds, and unpublish the rest. At start and after a reconnect."""
        current_keys: set[str] = set()
        self._revisions.clear()
        for manifest in list(self._ledger.manifests.values()) if not self._ledger.store_missing else []:
            try:
                await asyncio.to_thread(link_view, self._store, manifest)
                await self.publish_model(manifest)
            except OSError as e:
                log.warning("cannot build the view of a model; not published", model=manifest.model, reason=str(e))
                continue
            current_keys.add(model_key(self._node, manifest.model))
        for model, library_model in self._ledger.offered_library_models.items():
            if await self._publish_library_model(library_model):
                current_keys.add(model_key(self._node, model))
        for shard in list(self._ledger.shards.values()) if not self._ledger.store_missing else []:
            await self.publish_shard(shard)
            current_keys.add(shard_key(self._node, shard.manifest.model))
        published_keys = [k for k, _ in self._model_mirror.items("model.", ModelState)]
        published_keys += [k for k, _ in self._model_mirror.items("shard.", ShardState)]
        for key in published_keys:
            if key not in current_keys:
                await self._unpublish(key)
        self._published = None
        await self.publish_storage()

    async def publish_model(self, manifest: Manifest) -> ModelState:
        """Publish a model as ready. Returns its state."""
        paths = self._store.layout
        shape, shape_error = None, ""
        try:
            shape = await asyncio.to_thread(read_model_shape, paths.view(manifest.repo, manifest.commit))
        except ShoalError as e:
            shape_error = e.message
        offered = self._ledger.offered_library_models.get(manifest.model)
        path = (paths.library_model if offered else paths.manifest)(manifest.repo, manifest.commit)
        ready_at_s = (await asyncio.to_thread(path.stat)).st_mtime
        state = ModelState(
            node=self._node,
            repo=manifest.repo,
            commit=manifest.commit,
            size_bytes=manifest.size_bytes,
            file_count=len(manifest.files),
            # A snapshot that no ref names has only its commit as a name.
            revisions=manifest.revisions or ([] if offered else [DEFAULT_REVISION]),
            shape=shape,
            shape_error=shape_error,
            ready_at_s=round(ready_at_s, 3),
            library_directory=offered.directory if offered else "",
        )
        await self._put_if_changed(model_key(self._node, manifest.model), state)
        return state

    async def publish_shard(self, shard: Shard) -> None:
        """Publish a model's shard: which of its layers are here."""
        await self._put_if_changed(shard_key(self._node, shard.manifest.model), shard_state(self._node, shard))

    async def unpublish_shard(self, model: str) -> None:
        """Unpublish the shard of a model (`org/name@commit`)."""
        await self._unpublish(shard_key(self._node, model))

    async def unpublish_model(self, model: str) -> None:
        """Unpublish a model (`org/name@commit`); or, if a library has it too, publish that copy."""
        offered = self._ledger.offered_library_models.get(model)
        if offered and await self._publish_library_model(offered):
            return
        await self._unpublish(model_key(self._node, model))

    async def _publish_library_model(self, library_model: LibraryModel) -> bool:
        try:
            await asyncio.to_thread(build_view, self._store.layout, library_model)
            await self.publish_model(library_model.manifest)
        except OSError as e:
            log.warning(
                "cannot build the view of a model; not published", model=library_model.manifest.model, reason=str(e)
            )
            return False
        return True

    async def publish_storage(self) -> None:
        """Publish the state of the disk if it has changed."""
        # One at a time, each reading the ledger in its turn, so that an older state never follows a newer one.
        async with self._publishing:
            free = await asyncio.to_thread(self._store.free_bytes)
            ledger = self._ledger
            unverified = {b: s.size_bytes for b, s in ledger.unverified.items() if b not in ledger.corrupt}
            store_root, paths = self._store.layout.root, self._store.layout
            blob_paths = [paths.blob(b) for b in sorted(ledger.corrupt)[:MAX_FOREIGN_PATHS]]
            corrupt = [
                str(path.relative_to(store_root) if path.is_relative_to(store_root) else path) for path in blob_paths
            ]
            foreign = [*corrupt, *ledger.foreign.paths]
            state = StorageState(
                node=self._node,
                **{name: getattr(self._settings, name) for name in PublishedSettings.__struct_fields__},
                overridden_by_env=self._overridden_by_env,
                used_bytes=ledger.used_bytes,
                reserved_bytes=ledger.reserved_bytes,
                free_bytes=free,
                model_count=len(ledger.manifests),
                blob_count=len(ledger.blobs),
                quarantined=sorted(ledger.quarantined),
                pinned=sorted(ledger.uses.pinned & ledger.local_manifests.keys()),
                unverified_count=len(unverified),
                unverified_bytes=sum(unverified.values()),
                foreign_count=ledger.foreign.count + len(ledger.corrupt),
                foreign_bytes=ledger.foreign.size_bytes + sum(s.size_bytes for s in ledger.corrupt.values()),
                foreign_files=foreign[:MAX_FOREIGN_PATHS],
                store_missing=ledger.store_missing,
                leases=to_lease_states(ledger.uses.leases.values()),
                ended_downloads=sorted(ledger.arrivals.ended_reservations - ledger.local_manifests.keys()),
                ballast_bytes=self._store.ballast.held_bytes,
                paused_downloads=bytes_of_paused_models(ledger),
                libraries=self.libraries,
                volumes=await asyncio.to_thread(self.volumes),
            )
            if state != self._published:
                await self._put_if_changed(storage_key(self._node), state)
                self._published = state

    async def _put_if_changed(self, key: str, value: object) -> None:
        """Put a value unless the key already has it: a start that changes nothing writes nothing."""
        entry = await self._state.get(key)
        is_current = entry is not None and entry.value == encode(value)
        self._revisions[key] = entry.revision if entry and is_current else await self._state.put(key, value)

    async def _unpublish(self, key: str) -> None:
        self._revisions.pop(key, None)
        await self._state.delete(key)

    async def wait_key_removed(self) -> None:
        """Return once a published key has been removed by somebody else.

        A node retired while it was unreachable loses its keys.
        """
        mirrors = (self._model_mirror, self._storage_mirror)
        while True:
            seen = tuple(mirror.changes for mirror in mirrors)
            if any(self._is_missing(key, revision) for key, revision in self._revisions.items()):
                return
            await any_changed(mirrors, seen)

    def _is_missing(self, key: str, revision: int) -> bool:
        mirror = self._storage_mirror if key == storage_key(self._node) else self._model_mirror
        return mirror.revision >= revision and key not in mirror


def shard_state(node: str, shard: Shard) -> ShardState:
    """Return the published state of a shard."""
    manifest = shard.manifest
    return ShardState(
        node=node,
        repo=manifest.repo,
        commit=manifest.commit,
        layers=shard.layers,
        size_bytes=shard.size_bytes,
        total_bytes=manifest.size_bytes,
        revisions=manifest.revisions,
    )
