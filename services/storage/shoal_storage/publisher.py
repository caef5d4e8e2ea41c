"""Publishes a node's disk: the only writer of `state` at `model.<node>.*`, `shard.<node>.*` and `storage.<node>`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from nats.errors import Error as NatsError

from shoal_common.bus.keys import model_key, shard_key, storage_key
from shoal_common.bus.kv_mirror import KvMirror, any_changed
from shoal_common.concurrency.threads import DaemonCalls
from shoal_common.errors import ShoalError, Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages import encode
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import LibraryState, ModelState, ShardState, StorageState, VolumeState
from shoal_common.models.model_shape import read_model_shape
from shoal_common.names import DEFAULT_REVISION, ModelId
from shoal_common.settings.node import PublishedSettings, StorageSettings
from shoal_common.settings.values import changeable, overridden_by_env
from shoal_storage.context import StorageContext
from shoal_storage.ledger.entries import Shard
from shoal_storage.ledger.lease import to_lease_states
from shoal_storage.ledger.references import bytes_of_paused_models, damaged_models
from shoal_storage.publish_queue import PublishBatch
from shoal_storage.section import Held
from shoal_storage.store.commit import link_view
from shoal_storage.store.library_records import build_view

log = StructuredLogger("storage")

MAX_FOREIGN_PATHS = 5
RETRY_INTERVAL_S = 5.0
"""Between a pass that failed and the next one."""
_VOLUMES_DEADLINE_S = 10.0


class StatePublisher:
    """Publishes what the queue names, as the ledger has it, when it differs from what is in `state`.

    `libraries` and `volumes` return their published states; `volumes` is called in a thread.
    """

    def __init__(
        self,
        context: StorageContext,
        model_mirror: KvMirror,
        storage_mirror: KvMirror,
        libraries: Callable[[], list[LibraryState]],
        volumes: Callable[[], list[VolumeState]],
    ) -> None:
        self._context, self._node = context, context.node
        self._state = context.service.buckets.state
        self._model_mirror, self._storage_mirror = model_mirror, storage_mirror
        self._libraries, self._volumes = libraries, volumes
        self._calls, self._volume_states = DaemonCalls(), list[VolumeState]()
        self._revisions: dict[str, int] = {}
        self._overridden_by_env = overridden_by_env(changeable(StorageSettings), context.service.environ)
        self._published: StorageState | None = None

    # Background tasks

    async def publish_forever(self) -> None:
        """Publish what is asked for, forever. What NATS does not take is published later, as it is by then."""
        queue = self._context.publishing
        while True:
            batch = await queue.take()
            try:
                await self._publish(batch)
            except (NatsError, ShoalError, OSError) as e:
                reason = e.message if isinstance(e, ShoalError) else str(e) or type(e).__name__
                queue.fail(
                    batch, e if isinstance(e, ShoalError) else Unavailable(f"NATS refuses the state: {reason}")
                )
                log.warning("cannot publish the state of the disk; retrying", reason=reason)
                await asyncio.sleep(RETRY_INTERVAL_S)
            except BaseException:
                queue.fail(batch, Unavailable("storage is stopping; its state is published when it is back"))
                raise
            else:
                queue.end(batch)

    async def republish_after_reconnects(self) -> None:
        """Publish everything again after each reconnect: a NATS that comes back may have lost its store."""
        reconnects = self._context.service.nats.reconnects
        seen = reconnects.count
        while True:
            seen = await reconnects.wait_after(seen)
            self._context.publishing.notify_all()

    async def republish_removed_keys(self) -> None:
        """Publish everything again whenever a published key is removed, as for a node retired while it lived."""
        while True:
            await self._wait_key_removed()
            log.warning("published state of this disk was removed; publishing again")
            try:
                await self._context.publishing.publish_all()
            except ShoalError:
                await asyncio.sleep(RETRY_INTERVAL_S)

    # One pass

    async def _publish(self, batch: PublishBatch) -> None:
        models = set(batch.models)
        if batch.everything:
            ledger = self._context.ledger
            self._revisions.clear()
            self._published = None
            models |= {*ledger.manifests, *ledger.libraries.models, *ledger.shards}
            models |= {m.model for _, m in self._model_mirror.items("model.", ModelState)}
            models |= {m.model for _, m in self._model_mirror.items("shard.", ShardState)}
        for model in sorted(models):
            async with self._context.section as held:
                model_state, shard_state = await asyncio.to_thread(self._read, held, model)
            await self._put_or_delete(model_key(self._node, model), model_state)
            await self._put_or_delete(shard_key(self._node, model), shard_state)
        await self._publish_storage()

    def _read(self, held: Held, model: ModelId) -> tuple[ModelState | None, ShardState | None]:
        """Return what to publish of a model (`org/name@commit`), once its view is there. Blocking."""
        held.require()
        ledger, paths = self._context.ledger, self._context.store.layout
        manifest = None if ledger.store_missing else ledger.manifests.get(model)
        offered = ledger.offered_library_models.get(model)
        shard = None if ledger.store_missing else ledger.shards.get(model)
        state = None
        try:
            if manifest is not None:
                link_view(self._context.store, manifest)
                state = read_model_state(self._context, manifest)
            elif offered is not None:
                build_view(paths, offered)
                state = read_model_state(self._context, offered.manifest)
        except OSError as e:
            log.warning("cannot build the view of a model; not published", model=model, reason=str(e))
        return state, shard_state(self._node, shard) if shard else None

    async def _publish_storage(self) -> None:
        free = await asyncio.to_thread(self._context.store.free_bytes)
        distrusted = sorted(await asyncio.to_thread(self._context.seals.distrusted))
        with suppress(TimeoutError):  # a disk does not answer: as it was, until its volume is detached
            self._volume_states = await self._calls.run("volumes", self._volumes, _VOLUMES_DEADLINE_S)
        volumes = self._volume_states
        state = self._storage_state(free, volumes, distrusted)
        if state != self._published:
            await self._put_or_delete(storage_key(self._node), state)
            self._published = state

    def _storage_state(
        self, free_bytes: int, volumes: list[VolumeState], distrusted_sealers: list[str]
    ) -> StorageState:
        ledger, settings = self._context.ledger, self._context.settings
        unverified = {b: s.size_bytes for b, s in ledger.unverified.items() if b not in ledger.corrupt}
        store_root, paths = self._context.store.layout.root, self._context.store.layout
        blob_paths = [paths.blob(b) for b in sorted(ledger.corrupt)[:MAX_FOREIGN_PATHS]]
        corrupt = [
            str(path.relative_to(store_root) if path.is_relative_to(store_root) else path) for path in blob_paths
        ]
        foreign = [*corrupt, *ledger.foreign.paths]
        return StorageState(
            node=self._node,
            **{name: getattr(settings, name) for name in PublishedSettings.__struct_fields__},
            overridden_by_env=self._overridden_by_env,
            used_bytes=ledger.used_bytes,
            reserved_bytes=ledger.reserved_bytes,
            free_bytes=free_bytes,
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
            ballast_bytes=self._context.store.ballast.held_bytes,
            paused_downloads=bytes_of_paused_models(ledger),
            libraries=self._libraries(),
            volumes=volumes,
            distrusted_sealers=distrusted_sealers,
            incomplete=[] if ledger.store_missing else damaged_models(ledger),
        )

    async def _put_or_delete(self, key: str, value: object | None) -> None:
        """Put a value unless the key already has it: a start that changes nothing writes nothing. None: delete it."""
        if value is not None:
            entry = await self._state.get(key)
            is_current = entry is not None and entry.value == encode(value)
            self._revisions[key] = entry.revision if entry and is_current else await self._state.put(key, value)
        elif key in self._revisions or key in self._model_mirror:
            revision = self._revisions.pop(key, 0)  # first, or it would seem to have been removed by somebody else
            try:
                await self._state.delete(key)
            except BaseException:
                self._revisions[key] = revision
                raise

    async def _wait_key_removed(self) -> None:
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


def read_model_state(context: StorageContext, manifest: Manifest) -> ModelState:
    """Return the published state of a model whose view is there. Raises OSError. Blocking."""
    paths = context.store.layout
    shape, shape_error = None, ""
    try:
        shape = read_model_shape(paths.view(manifest.model))
    except ShoalError as e:
        shape_error = e.message
    offered = context.ledger.offered_library_models.get(manifest.model)
    path = (paths.library_model if offered else paths.manifest)(manifest.model)
    return ModelState(
        node=context.node,
        repo=manifest.repo,
        commit=manifest.commit,
        size_bytes=manifest.size_bytes,
        file_count=len(manifest.files),
        # A snapshot that no ref names has only its commit as a name.
        revisions=manifest.revisions or ([] if offered else [DEFAULT_REVISION]),
        shape=shape,
        shape_error=shape_error,
        ready_at_s=round(path.stat().st_mtime, 3),
        library_directory=offered.directory if offered else "",
        unchecked_from=manifest.unchecked_from,
    )


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
