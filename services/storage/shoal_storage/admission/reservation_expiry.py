"""When a reservation ends. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.names import ModelId, ModelRef, commit_of, repo_of
from shoal_storage.ledger.ledger import Ledger

RESERVATION_GRACE_S = 300.0
"""A reservation lasts this long after its model was last known to be wanted."""
RENEW_INTERVAL_S = 60.0
FETCHER_DOWN_AFTER_S = 900.0
"""A fetcher whose liveness key is missing for this long fetches nothing, whatever requests it left."""


class DownloadRequestView(msgspec.Struct, frozen=True):
    """A download request on this node. `commit` is "" until the fetcher knows it."""

    repo: str
    commit: str
    paused: bool = False


class ExpiryActions(msgspec.Struct):
    """Models (`org/name@commit`) by what to do with their reservations."""

    renew: list[ModelId] = []
    end: list[ModelId] = []
    remove: list[ModelId] = []


def download_requests(
    specs: Iterable[tuple[str, DownloadRequest]], states: Mapping[str, DownloadState]
) -> list[DownloadRequestView]:
    """Return the download requests, with the commits that the states under the same keys know."""
    requests = []
    for key, spec in specs:
        state = states.get(key)
        requests.append(
            DownloadRequestView(ModelRef.parse(spec.model).repo, state.commit if state else "", spec.paused)
        )
    return requests


def requests_for_model(model: ModelId, requests: Iterable[DownloadRequestView]) -> list[DownloadRequestView]:
    """Return the requests that mean a model, or may: those whose commit is not known yet."""
    return [w for w in requests if w.repo == repo_of(model) and w.commit in (commit_of(model), "")]


def paused_models(ledger: Ledger, requests: Iterable[DownloadRequestView]) -> set[ModelId]:
    """Return the arriving models that are paused and not fetched under another name."""
    requests = list(requests)
    paused = set()
    for model in ledger.arrivals.models:
        own_requests = requests_for_model(model, requests)
        if own_requests and all(w.paused for w in own_requests):
            paused.add(model)
    return paused


def expiry_actions(
    ledger: Ledger, requests: Iterable[DownloadRequestView], fetcher_down_s: float, now_s: float, retention_s: float
) -> ExpiryActions:
    """Return what to do with every reservation now. Pure."""
    actions = ExpiryActions(renew=[], end=[], remove=[])
    requests = list(requests)
    for model in sorted(ledger.arrivals.models):
        own_requests = requests_for_model(model, requests)
        # A paused model stays wanted without a live fetcher; a model being fetched needs one.
        is_paused = any(w.paused for w in own_requests)
        unwanted_s = now_s - ledger.arrivals.last_wanted_s.get(model, 0.0)
        if ledger.is_shard_settled(model):
            continue  # a settled shard needs no request
        if model not in ledger.arrivals.ended_reservations:
            if own_requests and (is_paused or fetcher_down_s < FETCHER_DOWN_AFTER_S):
                if (is_paused or fetcher_down_s == 0) and unwanted_s >= RENEW_INTERVAL_S:
                    actions.renew.append(model)
                continue
            if unwanted_s < RESERVATION_GRACE_S:
                continue
            actions.end.append(model)
        if unwanted_s >= retention_s and model not in ledger.shards:
            actions.remove.append(model)
    return actions
