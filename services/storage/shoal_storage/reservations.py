"""Reservations that nobody fetches any more: the reservation ends, its bytes stay for a while and are then deleted.

An arriving model is wanted while a download request for it exists (`spec` `download.<node>.…`, whose commit is in
`state` under the same key) and this node's fetcher is live; and for some minutes after it was last known to be. That
time is the mtime of its reservation file, so a restart changes nothing. An ended reservation counts only what its
bytes occupy, and is the first to go when space is needed. Reserving the model again restores it, if there is space.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from shoal_common.buckets import live_key
from shoal_common.logs import Log
from shoal_common.messages.facts import Live
from shoal_common.messages.records import DownloadSpec, DownloadState
from shoal_common.names import ModelRef
from shoal_common.reconcile import reconcile_forever
from shoal_common.service import Context
from shoal_common.watch import View
from shoal_storage.announce import Announcer
from shoal_storage.decide import Ledger, Limits
from shoal_storage.keeping import Keeping
from shoal_storage.parts import Parts
from shoal_storage.removal import Removal

log = Log("storage")

STILL_WANTED_S = 300.0
"""A reservation lasts this long after its model was last known to be wanted."""
RENEW_EVERY_S = 60.0
GONE_AFTER_S = 900.0
"""A fetcher whose liveness key is missing for this long fetches nothing, whatever requests it left."""
LOOK_S = 30.0


class Wish(msgspec.Struct, frozen=True):
    """A download request on this node. `commit` is "" until the fetcher knows it."""

    repo: str
    commit: str
    paused: bool = False


class Steps(msgspec.Struct):
    """Models (`org/name@commit`) by what to do with their reservations."""

    renew: list[str] = []
    end: list[str] = []
    remove: list[str] = []


def wishes(specs: Iterable[tuple[str, DownloadSpec]], states: Mapping[str, DownloadState]) -> list[Wish]:
    """Return the download requests, with the commits that the states under the same keys know."""
    requests = []
    for key, spec in specs:
        state = states.get(key)
        requests.append(Wish(ModelRef.parse(spec.model).repo, state.commit if state else "", spec.paused))
    return requests


def wishes_for(model: str, wished: Iterable[Wish]) -> list[Wish]:
    """Return the requests that mean a model (`org/name@commit`), or may: those whose commit is not known yet."""
    repo, _, commit = model.rpartition("@")
    return [w for w in wished if w.repo == repo and w.commit in (commit, "")]


def paused_of(ledger: Ledger, wished: Iterable[Wish]) -> set[str]:
    """Return the arriving models that are paused and not fetched under another name."""
    requests = list(wished)
    paused = set()
    for model in ledger.on_its_way:
        own_requests = wishes_for(model, requests)
        if own_requests and all(w.paused for w in own_requests):
            paused.add(model)
    return paused


def decide(ledger: Ledger, wished: Iterable[Wish], fetcher_away_s: float, now_s: float, retention_s: float) -> Steps:
    """Return what to do with every reservation now. Pure."""
    steps = Steps(renew=[], end=[], remove=[])
    requests = list(wished)
    for model in sorted(ledger.on_its_way):
        own_requests = wishes_for(model, requests)
        # A paused model stays wanted without a live fetcher; a model being fetched needs one.
        is_paused = any(w.paused for w in own_requests)
        unwanted_s = now_s - ledger.wanted_s.get(model, 0.0)
        if ledger.at_rest(model):
            continue  # a settled shard needs no request
        if model not in ledger.ended:
            if own_requests and (is_paused or fetcher_away_s < GONE_AFTER_S):
                if (is_paused or fetcher_away_s == 0) and unwanted_s >= RENEW_EVERY_S:
                    steps.renew.append(model)
                continue
            if unwanted_s < STILL_WANTED_S:
                continue
            steps.end.append(model)
        if unwanted_s >= retention_s and model not in ledger.parts:
            steps.remove.append(model)
    return steps


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
