"""Renew, expire and return reservations as downloads come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from shoal_common.bus.keys import live_key
from shoal_common.bus.kv_mirror import View
from shoal_common.bus.reconcile import reconcile_forever
from shoal_common.logs import Log
from shoal_common.messages.downloads import DownloadSpec, DownloadState
from shoal_common.messages.liveness import Live
from shoal_common.service import Context
from shoal_storage.admission.reservation_expiry import decide, paused_of, wishes
from shoal_storage.files.metadata_files import Keeping
from shoal_storage.handlers.deletion import Removal
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.publisher import Announcer
from shoal_storage.settings import Limits
from shoal_storage.shards import Parts

log = Log("storage")
LOOK_S = 30.0


class Reservations:
    """Renews, ends and removes reservations, periodically and when requests change."""

    def __init__(
        self,
        context: Context,
        ledger: Ledger,
        section: asyncio.Lock,
        keeping: Keeping,
        removal: Removal,
        parts: Parts,
        announcer: Announcer,
        limits: Callable[[], Limits],
        specs: View,
        downloads: View,
        live: View,
    ) -> None:
        self._context, self._ledger, self._section = context, ledger, section
        self._keeping, self._removal, self._parts = keeping, removal, parts
        self._announcer, self._limits = announcer, limits
        self._specs, self._downloads, self._live = specs, downloads, live
        self._fetcher_seen_s: float | None = None

    async def watch(self) -> None:
        """Check periodically, and when download requests change."""

        async def check() -> float:
            await self.look(time.time(), time.monotonic())
            return LOOK_S

        await reconcile_forever("checking reservations", (self._specs,), check)

    async def look(self, now_s: float, monotonic_s: float) -> None:
        """Decide by the current cluster state, and act on it."""
        prefix = f"download.{self._context.node}."
        async with self._section:
            requests = wishes(
                self._specs.items(prefix, DownloadSpec), dict(self._downloads.items(prefix, DownloadState))
            )
            down_s = self._fetcher_down_s(monotonic_s)
            steps = decide(self._ledger, requests, down_s, now_s, self._limits().partial_retention_s)
            for model in steps.renew:
                await asyncio.to_thread(self._keeping.wanted, model, now_s)
            for model in steps.end:
                if model in self._ledger.parts:
                    await self._parts.settle(model)
                    log.info("shard reservation ended; shard kept", model=model)
                    continue
                self._ledger.ended.add(model)
                log.info("reservation ended: no download request for it", model=model)
            for model in steps.remove:
                freed = await self._removal.remove_unfinished(model)
                log.info("abandoned download deleted", model=model, freed_bytes=freed)
            paused = paused_of(self._ledger, requests)
            has_changed = bool(steps.end or steps.remove) or paused != self._ledger.paused
            self._ledger.paused = paused
        if has_changed:
            await self._announcer.publish()

    def _fetcher_down_s(self, monotonic_s: float) -> float:
        """Return the seconds since the fetcher's liveness key was last seen; 0 while this node does not hear NATS."""
        is_live = self._live.get(live_key(self._context.node, "fetcher"), Live) is not None
        if is_live or self._fetcher_seen_s is None or not self._context.nats.client.is_connected:
            self._fetcher_seen_s = monotonic_s
        return monotonic_s - self._fetcher_seen_s
