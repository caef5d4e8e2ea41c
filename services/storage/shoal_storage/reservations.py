"""Reservations that nobody fetches any more: their promise ends, their bytes stay a while, and then go.

A model on its way is wanted while a wish for it stands (`spec` `download.<node>.…`, whose commit is in `state` under
the same key) and this node's fetcher lives; and for some minutes after it was last known to be. When that was is the
mtime of its promise, so that a restart changes nothing. A promise that has ended counts what its bytes occupy, no
more, and is the first to go when room is needed. It comes back by being reserved anew, if there is room.
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
"""So long after it was last known to be wanted a model keeps its promise."""
RENEW_EVERY_S = 60.0
GONE_AFTER_S = 900.0
"""A fetcher whose liveness key has been away so long fetches nothing, whatever wishes it has left."""
LOOK_S = 30.0


class Wish(msgspec.Struct, frozen=True):
    """What somebody wants on this node. `commit` is "" until the fetcher knows it."""

    repo: str
    commit: str
    paused: bool = False


class Steps(msgspec.Struct):
    """Models (`org/name@commit`) by what becomes of their reservations."""

    renew: list[str] = []
    end: list[str] = []
    remove: list[str] = []


def wishes(specs: Iterable[tuple[str, DownloadSpec]], states: Mapping[str, DownloadState]) -> list[Wish]:
    """Wishes by their keys, with the commits that the states under the same keys know."""
    found = []
    for key, spec in specs:
        state = states.get(key)
        found.append(Wish(ModelRef.parse(spec.model).repo, state.commit if state else "", spec.paused))
    return found


def wishes_for(model: str, wished: Iterable[Wish]) -> list[Wish]:
    """The wishes that mean a model (`org/name@commit`), or may: whose commit is not known yet."""
    repo, _, commit = model.rpartition("@")
    return [w for w in wished if w.repo == repo and w.commit in (commit, "")]


def paused_of(ledger: Ledger, wished: Iterable[Wish]) -> set[str]:
    """Models on their way that are paused, and that nobody fetches under another name."""
    wanted = list(wished)
    found = set()
    for model in ledger.on_its_way:
        mine = wishes_for(model, wanted)
        if mine and all(w.paused for w in mine):
            found.add(model)
    return found


def decide(ledger: Ledger, wished: Iterable[Wish], fetcher_away_s: float, now_s: float, retention_s: float) -> Steps:
    """What becomes of every reservation now. Pure."""
    steps = Steps(renew=[], end=[], remove=[])
    wanted = list(wished)
    for model in sorted(ledger.on_its_way):
        mine = wishes_for(model, wanted)
        # Nobody has to live for what is paused to stay so; for what is fetched, a fetcher has to.
        is_paused = any(w.paused for w in mine)
        unwanted_s = now_s - ledger.wanted_s.get(model, 0.0)
        if ledger.at_rest(model):
            continue  # nobody has to wish for what is here
        if model not in ledger.ended:
            if mine and (is_paused or fetcher_away_s < GONE_AFTER_S):
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
    """Carries that out, every now and then."""

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
        """Look every LOOK_S, and when what people want changes."""

        async def look() -> float:
            await self.look(time.time(), time.monotonic())
            return LOOK_S

        await reconcile_forever("looking at reservations", (self._specs,), look)

    async def look(self, now_s: float, monotonic_s: float) -> None:
        """Decide by what the cluster says now, and do it."""
        prefix = f"download.{self._context.node}."
        async with self._section:
            wished = wishes(
                self._specs.items(prefix, DownloadSpec), dict(self._downloads.items(prefix, DownloadState))
            )
            away_s = self._fetcher_away_s(monotonic_s)
            steps = decide(self._ledger, wished, away_s, now_s, self._limits().partial_retention_s)
            for model in steps.renew:
                await asyncio.to_thread(self._keeping.wanted, model, now_s)
            for model in steps.end:
                if model in self._ledger.parts:
                    await self._parts.settle(model)
                    log.info("nobody fetches more of this any more", model=model)
                    continue
                self._ledger.ended.add(model)
                log.info("nobody fetches this any more: its promise has ended", model=model)
            for model in steps.remove:
                freed = await self._removal.remove_unfinished(model)
                log.info("removed what an ended download had left", model=model, freed_bytes=freed)
            paused = paused_of(self._ledger, wished)
            is_news = bool(steps.end or steps.remove) or paused != self._ledger.paused
            self._ledger.paused = paused
        if is_news:
            await self._announcer.publish()

    def _fetcher_away_s(self, monotonic_s: float) -> float:
        """0 while its key is there, or while it is not known: who does not hear NATS does not hear of it."""
        here = self._live.get(live_key(self._context.node, "fetcher"), Live) is not None
        if here or self._fetcher_seen_s is None or not self._context.nats.client.is_connected:
            self._fetcher_seen_s = monotonic_s
        return monotonic_s - self._fetcher_seen_s
