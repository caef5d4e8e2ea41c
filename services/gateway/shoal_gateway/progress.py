"""Decide whether a requested download has started, and whether it has failed. Pure."""

from __future__ import annotations

from shoal_common.errors import Failed, ShoalError, from_body
from shoal_common.messages.commands import Outcome
from shoal_common.messages.records import ENDED, DownloadPhase, DownloadState
from shoal_gateway.outcomes import error_of

_WAITING: frozenset[DownloadPhase] = frozenset({"queued", "reserving"})
_BAD_ENDS: frozenset[DownloadPhase] = ENDED - {"ready"}


def begun(now: DownloadState | None, before: DownloadState | None, asked_at_s: float) -> bool:
    """Return whether a download has left its queue since it was requested.

    A state published before the request does not count, unless its node has confirmed it since. Nodes' clocks
    differ, so a changed state counts as well as one with a later time.
    """
    if now is None or now.phase in _WAITING:
        return False
    return now != before or max(now.updated_at_s, now.started_at_s) >= asked_at_s


def ended_badly(outcome: Outcome | None, state: DownloadState | None) -> ShoalError | None:
    """Return the error of a download; None while it runs or when it is ready."""
    if outcome is not None:
        return error_of(outcome)
    if state is None or state.phase not in _BAD_ENDS:
        return None
    if state.error is not None:
        return from_body(state.error)
    return Failed(f"the download of {state.model} on node {state.node} {state.phase}; see `shoal logs fetcher` there")
