"""Renew, expire and return reservations as downloads come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from shoal_common.bus.keys import liveness_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.reconcile import reconcile_forever
from shoal_common.logs import StructuredLogger
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.service import ServiceContext
from shoal_common.settings.node import StorageSettings
from shoal_storage.admission.reservation_expiry import download_requests, expiry_actions, paused_models
from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.handlers.deletion import DeletionService
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.publisher import StatePublisher
from shoal_storage.shards import ShardService

log = StructuredLogger("storage")
CHECK_INTERVAL_S = 30.0


class ReservationExpiry:
    """Renews, ends and removes reservations, periodically and when requests change."""

    def __init__(
        self,
        context: ServiceContext,
        ledger: Ledger,
        section: asyncio.Lock,
        metadata: MetadataFiles,
        deletions: DeletionService,
        shards: ShardService,
        publisher: StatePublisher,
        get_settings: Callable[[], StorageSettings],
        specs: KvMirror,
        downloads: KvMirror,
        live: KvMirror,
    ) -> None:
        self._context, self._ledger, self._section = context, ledger, section
        self._metadata, self._deletions, self._shards = metadata, deletions, shards
        self._publisher, self._get_settings = publisher, get_settings
        self._specs, self._downloads, self._live = specs, downloads, live
        self._fetcher_seen_s: float | None = None

    async def check_forever(self) -> None:
        """Check periodically, and when download requests change."""

        async def check() -> float:
            await self.check(time.time(), time.monotonic())
            return CHECK_INTERVAL_S

        await reconcile_forever("checking reservations", (self._specs,), check)

    async def check(self, now_s: float, monotonic_s: float) -> None:
        """Decide by the current cluster state, and act on it."""
        prefix = f"download.{self._context.node}."
        async with self._section:
            requests = download_requests(
                self._specs.items(prefix, DownloadRequest), dict(self._downloads.items(prefix, DownloadState))
            )
            down_s = self._fetcher_down_s(monotonic_s)
            actions = expiry_actions(self._ledger, requests, down_s, now_s, self._get_settings().partial_retention_s)
            for model in actions.renew:
                await asyncio.to_thread(self._metadata.record_wanted, model, now_s)
            for model in actions.end:
                if model in self._ledger.shards:
                    await self._shards.finish_shard(model)
                    log.info("shard reservation ended; shard kept", model=model)
                    continue
                self._ledger.arrivals.abandon_reservation(model)
                log.info("reservation ended: no download request for it", model=model)
            for model in actions.remove:
                freed = await self._deletions.delete_abandoned(model)
                log.info("abandoned download deleted", model=model, freed_bytes=freed)
            paused = paused_models(self._ledger, requests)
            has_changed = bool(actions.end or actions.remove) or paused != self._ledger.arrivals.paused_models
            self._ledger.arrivals.set_paused(paused)
        if has_changed:
            await self._publisher.publish_storage()

    def _fetcher_down_s(self, monotonic_s: float) -> float:
        """Return the seconds since the fetcher's liveness key was last seen; 0 while this node does not hear NATS."""
        is_live = self._live.get(liveness_key(self._context.node, "fetcher"), LivenessRecord) is not None
        if is_live or self._fetcher_seen_s is None or not self._context.nats.client.is_connected:
            self._fetcher_seen_s = monotonic_s
        return monotonic_s - self._fetcher_seen_s
