"""The life of one download: what may happen to it, and what follows. Pure; `handle` is its only mutator.

    none ─► queued ─► reserving ─► fetching ─► verifying ─► ready · failed · rejected
               ▲         ▲ │          │           │
               │         │ ▼          ▼           │
            paused       ├───────── blocked ◄─────┤  the disk is full
                         └────────────────────────┘  the reservation is lost, leaves of a shard are corrupt

From any phase before the end a person may pause it. Cancelled, it is `discarding`, and then `none`.

`Download.doing` is the one action under way. It ends as exactly one event, and events that belong to another are
ignored. A download that is not `none`, `paused` or ended always has one: there is none that nobody runs. A command
changes the stored request first, which is what people want, and the download follows when that is stored: a command
that is cut short at any point leaves a download that does what its request asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import structs

from shoal_common.concurrency.backoff import Backoff
from shoal_common.errors import (
    DiskFull,
    ErrorBody,
    HubUnavailable,
    NatsDown,
    Paused,
    QuotaExceeded,
    ShoalError,
    Unavailable,
)
from shoal_common.messages.downloads import ENDED_PHASES, DownloadPhase, DownloadState
from shoal_common.models.layer_tensors import union
from shoal_fetcher.downloads import events as ev
from shoal_fetcher.errors import BlobHashMismatch, RateLimited, ReservationLost
from shoal_fetcher.sources.failure_policy import RETRY_BACKOFF

MAX_RESOLVE_ATTEMPTS = 4
MAX_RESERVATIONS_LOST = 3
"""A download fails when it has lost its reservation this many times without a new leaf in between."""
MAX_SHARD_SEALS = 3
"""A shard fails after this many times that leaves did not match the sealed list."""
NO_PROGRESS_TIMEOUT_S = 120.0
"""A download without progress for this long fails, naming what it waited for (I7)."""
MAX_BLOCKED_S = 24 * 3600.0
"""A download fails after a full disk has blocked it for this long (I7)."""
FUTILE_ATTEMPT_BACKOFF = Backoff(1.0, 60.0)
"""After attempts in a row that made nothing durable although storage reports space, as under a file system quota."""
SPACE_CHECK_BACKOFF = Backoff(5.0, 60.0)
"""Until storage is asked again for free space, if nothing changes before."""

Phase = DownloadPhase | Literal["none", "discarding"]
"""`none`: there is no download. `discarding`: it is cancelled; its bytes and its reservation are being released."""
ACTIVE_PHASES: frozenset[Phase] = frozenset({"queued", "reserving", "fetching", "verifying", "blocked"})


class Download(msgspec.Struct, frozen=True):
    """All that decisions about one download depend on."""

    node: str
    model: str
    """As requested: `org/name`, or `org/name@revision`."""
    phase: Phase = "none"
    waiting_for: str = ""
    error: ErrorBody | None = None
    blocked_since_s: float = 0.0
    layers: list[list[int]] = []
    """The layers whose tensors it fetches; empty: the whole model."""
    doing: ev.Work | ev.Record | None = None
    """The action under way."""
    resolve_failures: int = 0
    reservations_lost: int = 0
    """In a row, without a new leaf in between."""
    max_done_bytes: int = 0
    """When a reservation was lost."""
    corrupt_shards: int = 0
    blocked_by: DiskFull | None = None
    """The last error of a full disk."""
    blocked_bytes: int = -1
    """What was durable then; -1 if no disk was full."""
    futile_attempts: int = 0
    """In a row, that made nothing durable."""
    space_checks: int = 0
    store_failures: int = 0
    """In a row, of the end or of discarding."""


class Transition(msgspec.Struct, frozen=True):
    """What follows from an event."""

    state: Download
    actions: Sequence[ev.Action] = ()


_UNDER_WAY: dict[type[ev.DownloadEvent], tuple[type[ev.Action], ...]] = {
    ev.WaitOver: (ev.Wait,),
    ev.Resolved: (ev.Resolve,),
    ev.Reserved: (ev.ReserveSpace,),
    ev.Fetched: (ev.Fetch,),
    ev.Sealed: (ev.Seal,),
    ev.WorkFailed: (ev.Resolve, ev.ReserveSpace, ev.Fetch, ev.Seal, ev.AskForSpace),
    ev.SpaceFree: (ev.AskForSpace,),
    ev.SpaceShort: (ev.AskForSpace,),
    ev.EndStored: (ev.StoreEnd,),
    ev.Discarded: (ev.Discard,),
    ev.SourceWaiting: (ev.Resolve, ev.Fetch),
    ev.ProgressStalled: (ev.Fetch,),
}
"""The actions to which an event belongs. Commands, and what becomes of them, belong to none."""


def handle(state: Download, event: ev.DownloadEvent, now_s: float) -> Transition:  # noqa: PLR0912  # one case per event
    """Return what follows from an event. `now_s` is the cluster's time."""
    under_way = _UNDER_WAY.get(type(event))
    if under_way is not None and not isinstance(state.doing, under_way):
        return Transition(state)
    match event:
        case ev.Found():
            return _found(state, event)
        case ev.DownloadRequested() | ev.PauseRequested() | ev.ResumeRequested() | ev.CancelRequested():
            return Transition(state, [_on_command(state, event)])
        case ev.RequestStored(layers):
            if state.phase in ACTIVE_PHASES and merge_layers(state.layers, layers) == state.layers:
                return Transition(state, [ev.Answer()])
            return _begin(state, layers, "")
        case ev.PauseStored() if state.phase in ACTIVE_PHASES:
            paused = _still(state, "paused")
            return Transition(paused, [ev.StopWork(), ev.Publish(), ev.EmitPaused(), ev.Answer("paused")])
        case ev.ResumeStored(layers) if state.phase == "paused":
            return _begin(state, layers, "resumed")
        case ev.RequestRemoved():
            return _do(_still(state, "discarding"), ev.StopWork(), ev.Discard())
        case ev.Discarded():
            return Transition(_still(state, "none"), [ev.Answer("cancelled")])
        case ev.EndStored():
            return Transition(structs.replace(state, doing=None))
        case ev.NotStored(error):
            return _not_stored(state, error)
        case ev.StoreWiped():
            is_requested = state.phase in ACTIVE_PHASES or state.phase == "paused"
            return Transition(state, [ev.StoreAgain() if is_requested else ev.Answer()])
        case ev.StoredAgain():
            return Transition(state, [ev.Answer()])
        case ev.WaitOver():
            return _do(state, _after_wait(state))
        case ev.Resolved(layers):
            return _reserve(structs.replace(state, layers=layers), ev.ReserveSpace())
        case ev.Reserved(is_whole_model):
            if is_whole_model:
                return _reserve(structs.replace(state, layers=[]), ev.ReserveSpace())
            return _do(_in(state, "fetching"), ev.Publish(), ev.Fetch())
        case ev.Fetched(has_more):
            if has_more:
                return _reserve(state, ev.ReserveSpace())
            return _do(_in(state, "verifying", "storage"), ev.Publish(), ev.Seal())
        case ev.Sealed():
            return _do(_still(state, "ready"), ev.StoreEnd())
        case ev.WorkFailed():
            return _work_failed(state, event, now_s)
        case ev.SpaceFree():
            return _reserve(structs.replace(state, space_checks=0), ev.ReserveSpace(again=True))
        case ev.SpaceShort(error=shortage):
            return _space_short(state, shortage, now_s)
        case ev.SourceWaiting(reason):
            return Transition(structs.replace(state, waiting_for=reason))
        case ev.ProgressStalled(path, stalled_s, reason) if stalled_s > NO_PROGRESS_TIMEOUT_S:
            message = f"no progress on {path} for {NO_PROGRESS_TIMEOUT_S:.0f} s ({reason}); pull again to resume"
            return Transition(state, [ev.FailWork(Unavailable(message))])
    return Transition(state)


# Commands, and what is found at the start


def _found(state: Download, found: ev.Found) -> Transition:
    request, before = found.request, found.state
    has_ended = before is not None and before.phase in ENDED_PHASES
    if before is not None:
        blocked_bytes = before.done_bytes if before.blocked_since_s else -1
        state = structs.replace(state, phase=before.phase, error=before.error, layers=before.layers)
        state = structs.replace(state, blocked_since_s=before.blocked_since_s, blocked_bytes=blocked_bytes)
    if request is None:
        # Without a request and not ended: a cancellation was interrupted.
        return Transition(state) if before is None or has_ended else _do(_still(state, "discarding"), ev.Discard())
    if before is not None and has_ended and (request.paused or before.updated_at_s >= request.requested_at_s):
        # Killed after the download ended, before its request was deleted: a rejected download is not retried.
        return _do(state, ev.StoreEnd())
    if request.paused:
        return Transition(_still(state, "paused"), [] if state.phase == "paused" else [ev.Publish()])
    return _begin(state, request.layers, None)


def _on_command(state: Download, command: ev.DownloadEvent) -> ev.Action:
    is_active, phase = state.phase in ACTIVE_PHASES, state.phase
    match command:
        case ev.DownloadRequested(command=identity, layers=layers, keep_paused=keep_paused, force=force):
            is_kept = phase == "paused" and keep_paused
            return ev.Refuse(_paused_error(state)) if is_kept else ev.StoreRequest(identity, layers, force)
        case ev.PauseRequested() if is_active:
            return ev.StorePause(_paused_error(state))
        case ev.PauseRequested() if phase == "paused":
            return ev.Answer("was_paused")
        case ev.ResumeRequested() if phase == "paused":
            return ev.StoreResume()
        case ev.ResumeRequested() if is_active:
            return ev.Answer("under_way")
        case ev.CancelRequested(deletes_model=deletes_model):
            is_anything = phase != "none" and (deletes_model or phase != "ready")
            return ev.RemoveRequest() if is_anything else ev.Answer()
    return ev.Answer("unknown" if phase in ("none", "discarding") else phase)


def _paused_error(state: Download) -> Paused:
    return Paused(
        f"the download of {state.model} is paused on node {state.node}; `shoal resume {state.model}` continues it"
    )


def _begin(state: Download, layers: list[list[int]], answer: str | None) -> Transition:
    has_ended = state.phase in ENDED_PHASES
    begun = Download(
        node=state.node,
        model=state.model,
        phase="queued",
        layers=layers,
        # A restarted fetcher continues to wait for the same full disk: its deadline must not move with each start.
        blocked_since_s=0.0 if has_ended else state.blocked_since_s,
        blocked_bytes=-1 if has_ended else state.blocked_bytes,
    )
    actions: list[ev.Action] = [ev.StopWork(), ev.Begin(forget_sources=has_ended), ev.Publish(), ev.Resolve()]
    return _do(begun, *actions, *([] if answer is None else [ev.Answer(answer)]))


def _not_stored(state: Download, error: ShoalError) -> Transition:
    if not isinstance(state.doing, ev.StoreEnd | ev.Discard):
        return Transition(state, [ev.Refuse(error)])  # a command: nothing has changed
    failures = state.store_failures + 1
    waiting = structs.replace(state, store_failures=failures)
    return _do(waiting, ev.Refuse(error), ev.Wait(RETRY_BACKOFF.delay_s(failures)))


def _after_wait(state: Download) -> ev.Work | ev.Record:
    if state.phase == "queued":
        return ev.Resolve()
    if state.phase == "blocked":
        return _check_space(state, 0.0)
    return ev.Discard() if state.phase == "discarding" else ev.StoreEnd()


# Work


def _work_failed(state: Download, failed: ev.WorkFailed, now_s: float) -> Transition:
    error, done_bytes = failed.error, failed.done_bytes
    if isinstance(error, NatsDown) and isinstance(state.doing, ev.Resolve | ev.ReserveSpace | ev.Fetch | ev.Seal):
        # NATS may be out for as long as its disk is full, and that ends no download. What failed took its time.
        if isinstance(state.doing, ev.Resolve):
            return _do(structs.replace(state, waiting_for=error.message), ev.Wait(RETRY_BACKOFF.delay_s(1)))
        return _reserve(state, ev.ReserveSpace(again=True))
    if isinstance(state.doing, ev.Resolve):
        failures = state.resolve_failures + 1
        if not isinstance(error, HubUnavailable) or not failed.may_retry or failures == MAX_RESOLVE_ATTEMPTS:
            return _fail(state, error, done_bytes)
        wait_s = error.retry_after_s if isinstance(error, RateLimited) else RETRY_BACKOFF.delay_s(failures)
        return _do(structs.replace(state, resolve_failures=failures, waiting_for=error.message), ev.Wait(wait_s))
    if isinstance(error, ReservationLost):
        # It expired, storage was restarted, or files were removed by hand: ask again what is present.
        lost = 1 if done_bytes > state.max_done_bytes else state.reservations_lost + 1
        if lost == MAX_RESERVATIONS_LOST:
            return _fail(state, error, done_bytes)
        most = max(done_bytes, state.max_done_bytes)
        return _reserve(
            structs.replace(state, reservations_lost=lost, max_done_bytes=most), ev.ReserveSpace(again=True)
        )
    if isinstance(error, DiskFull):
        return _disk_full(state, error, done_bytes, now_s)
    if isinstance(state.doing, ev.Seal) and isinstance(error, BlobHashMismatch) and state.layers:
        corrupt = state.corrupt_shards + 1
        if corrupt < MAX_SHARD_SEALS:
            return _reserve(structs.replace(state, corrupt_shards=corrupt), ev.ReserveSpace(again=True))
    return _fail(state, error, done_bytes)


def _disk_full(state: Download, error: DiskFull, done_bytes: int, now_s: float) -> Transition:
    moved = done_bytes > state.blocked_bytes
    futile = 0 if moved else state.futile_attempts + 1
    blocked = structs.replace(
        _in(state, "blocked", error.message),
        error=error.body(),
        blocked_since_s=round(now_s, 3) if moved or not state.blocked_since_s else state.blocked_since_s,
        blocked_by=error,
        blocked_bytes=done_bytes,
        futile_attempts=futile,
        space_checks=0,
    )
    wait_s = FUTILE_ATTEMPT_BACKOFF.delay_s(futile)
    return _do(blocked, ev.Publish(), ev.Wait(wait_s) if wait_s else _check_space(blocked, 0.0))


def _space_short(state: Download, shortage: ErrorBody | None, now_s: float) -> Transition:
    if shortage is not None:
        state = structs.replace(state, error=shortage, waiting_for=shortage.message)
    if now_s - state.blocked_since_s > MAX_BLOCKED_S:
        message = (
            f"the disk was full for {MAX_BLOCKED_S / 3600:.0f} h while {state.model} arrived ({state.waiting_for}); "
            "the partial download is kept: free some space and pull again"
        )
        details = state.blocked_by.details if state.blocked_by else {}
        return _fail(state, DiskFull(message, **details), state.blocked_bytes)
    checks = state.space_checks + 1
    return _do(structs.replace(state, space_checks=checks), _check_space(state, SPACE_CHECK_BACKOFF.delay_s(checks)))


def _check_space(state: Download, after_s: float) -> ev.AskForSpace:
    return ev.AskForSpace(after_s, str(state.blocked_by.details.get("blob") or "") if state.blocked_by else "")


def _fail(state: Download, error: ShoalError, done_bytes: int) -> Transition:
    ended = structs.replace(_still(state, end_phase(error)), error=error.body())
    return _do(ended, ev.StoreEnd(release=not done_bytes))


# The state that follows


def _reserve(state: Download, reserve: ev.ReserveSpace) -> Transition:
    return _do(_in(state, "reserving", "storage"), ev.Publish(), reserve)


def _in(state: Download, phase: Phase, waiting_for: str = "") -> Download:
    return structs.replace(state, phase=phase, waiting_for=waiting_for, error=None)


def _still(state: Download, phase: Phase) -> Download:
    """Return the state of a download that waits for nothing."""
    return structs.replace(_in(state, phase), doing=None, blocked_since_s=0.0, store_failures=0)


def _do(state: Download, *actions: ev.Action) -> Transition:
    """Return a transition to the one action among these that takes long."""
    (doing,) = (action for action in actions if isinstance(action, ev.Work | ev.Record))
    return Transition(structs.replace(state, doing=doing), actions)


# What follows from figures and errors


def merge_layers(layers: list[list[int]], more: list[list[int]]) -> list[list[int]]:
    """Return the union of two sets of layers; empty, which means the whole model, if either is."""
    return union([*layers, *more]) if layers and more else []


def end_phase(error: ShoalError) -> DownloadPhase:
    """Return the phase of a download that ends with this error: `rejected` if over quota, else `failed`."""
    return "rejected" if isinstance(error, QuotaExceeded) else "failed"


# What is published


def new_state(node: str, model: str, now_s: float) -> DownloadState:
    """Return the published state of a download that begins."""
    return DownloadState(node=node, model=model, phase="queued", started_at_s=round(now_s, 3))


def with_decisions(published: DownloadState, download: Download) -> DownloadState:
    """Return a published state with what was decided; unchanged while there is no download."""
    if download.phase in ("none", "discarding"):
        return published
    decided: dict[str, Any] = {
        name: getattr(download, name) for name in ("phase", "waiting_for", "error", "blocked_since_s", "layers")
    }
    if all(getattr(published, name) == value for name, value in decided.items()):
        return published
    return structs.replace(published, **decided)
