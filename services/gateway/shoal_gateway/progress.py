"""How far a thing that was asked for has come. Pure."""

from __future__ import annotations

from shoal_common.errors import Failed, ShoalError, from_body
from shoal_common.messages.commands import Outcome
from shoal_common.messages.records import ENDED, DownloadPhase, DownloadState
from shoal_gateway.outcomes import error_of

_WAITING: frozenset[DownloadPhase] = frozenset({"queued", "reserving"})
_BAD_ENDS: frozenset[DownloadPhase] = ENDED - {"ready"}


def begun(now: DownloadState | None, before: DownloadState | None, asked_at_s: float) -> bool:
    """Whether a download is past its queue since it was asked for.

    A state that was there before the asking says nothing, unless its node has confirmed it since. Clocks of nodes
    differ, so a state that has changed counts as well as one that is dated later.
    """
    if now is None or now.phase in _WAITING:
        return False
    return now != before or max(now.updated_at_s, now.started_at_s) >= asked_at_s


def ended_badly(outcome: Outcome | None, state: DownloadState | None) -> ShoalError | None:
    """The error that a download ended with, or None while it goes on or when it is ready."""
    if outcome is not None:
        return error_of(outcome)
    if state is None or state.phase not in _BAD_ENDS:
        return None
    if state.error is not None:
        return from_body(state.error)
    return Failed(f"the download of {state.model} on node {state.node} {state.phase}; see the fetcher's log there")
