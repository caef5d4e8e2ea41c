"""When a reservation ends. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from shoal_common.messages.downloads import DownloadSpec, DownloadState
from shoal_common.names import ModelRef
from shoal_storage.ledger.ledger import Ledger

STILL_WANTED_S = 300.0
"""A reservation lasts this long after its model was last known to be wanted."""
RENEW_EVERY_S = 60.0
GONE_AFTER_S = 900.0
"""A fetcher whose liveness key is missing for this long fetches nothing, whatever requests it left."""


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
