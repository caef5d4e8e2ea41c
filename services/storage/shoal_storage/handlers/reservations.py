"""Renew, expire and return reservations as downloads come and go."""

from __future__ import annotations

import asyncio
import time

from shoal_common.bus.keys import liveness_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.reconcile import reconcile_forever
from shoal_common.logs import StructuredLogger
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.liveness import LivenessRecord
from shoal_storage.admission.reservation_expiry import (
    DownloadRequestView,
    download_requests,
    expiry_actions,
    paused_models,
)
from shoal_storage.context import StorageContext
from shoal_storage.eviction.model_deleter import ModelDeleter
from shoal_storage.shards import ShardService

log = StructuredLogger("storage")
CHECK_INTERVAL_S = 30.0


class ReservationExpiry:
    """Renews, ends and removes reservations, periodically and when requests change."""

    def __init__(
        self,
        context: StorageContext,
        deleter: ModelDeleter,
        shards: ShardService,
        downloads: KvMirror,
        live: KvMirror,
    ) -> None:
        self._context, self._service, self._ledger = context, context.service, context.ledger
        self._deleter, self._shards = deleter, shards
        self._downloads, self._live = downloads, live
        self._fetcher_seen_s: float | None = None

    async def check_forever(self) -> None:
        """Check periodically, and when download requests change."""

        async def check() -> float:
            await self.check(time.time(), time.monotonic())
            return CHECK_INTERVAL_S

        await reconcile_forever("checking reservations", (self._context.specs,), check)

    async def check(self, now_s: float, monotonic_s: float) -> None:
        """Decide by the current cluster state, and act on it. One model is deleted in each hold of the section."""
        ledger, has_changed, down_s = self._ledger, False, self._fetcher_down_s(monotonic_s)
        while True:
            async with self._context.section as held:
                requests = self._requests()
                retention_s = self._context.settings.partial_retention_s
                actions = expiry_actions(ledger, requests, down_s, now_s, retention_s)
                for model in actions.renew:
                    await asyncio.to_thread(self._context.metadata.record_wanted, model, now_s)
                for model in actions.end:
                    if model in ledger.shards:
                        await self._shards.finish_shard(held, model)
                        log.info("shard reservation ended; shard kept", model=model)
                        continue
                    ledger.arrivals.abandon_reservation(model)
                    log.info("reservation ended: no download request for it", model=model)
                for model in actions.remove[:1]:
                    freed = await self._deleter.delete_abandoned(held, model)
                    log.info("abandoned download deleted", model=model, freed_bytes=freed)
                paused = paused_models(ledger, requests)
                has_changed |= bool(actions.end or actions.remove) or paused != ledger.arrivals.paused_models
                ledger.arrivals.set_paused(paused)
            if len(actions.remove) <= 1:
                break
        if has_changed:
            await self._context.publishing.publish_soon()

    def _requests(self) -> list[DownloadRequestView]:
        prefix = f"download.{self._context.node}."
        return download_requests(
            self._context.specs.items(prefix, DownloadRequest), dict(self._downloads.items(prefix, DownloadState))
        )

    def _fetcher_down_s(self, monotonic_s: float) -> float:
        """Return the seconds since the fetcher's liveness key was last seen; 0 while this node does not hear NATS."""
        is_live = self._live.get(liveness_key(self._context.node, "fetcher"), LivenessRecord) is not None
        if is_live or self._fetcher_seen_s is None or not self._service.nats.client.is_connected:
            self._fetcher_seen_s = monotonic_s
        return monotonic_s - self._fetcher_seen_s
