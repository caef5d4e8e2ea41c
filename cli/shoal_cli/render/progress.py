"""A download as text and figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from shoal_common.messages.downloads import ENDED_PHASES
from shoal_common.messages.views import DownloadView
from shoal_common.units import format_bytes, format_duration


def percent(state: DownloadView) -> float:
    """Return 0 to 100. A model of no bytes is complete when it is ready."""
    if not state.total_bytes:
        return 100.0 if state.phase == "ready" else 0.0
    return min(100.0 * state.done_bytes / state.total_bytes, 100.0)


def sources(state: DownloadView, before: Mapping[str, int]) -> list[str]:
    """Return where bytes come from now, the fastest first, with speeds when there are several.

    Without speeds: the sources that grew since `before`, the largest first; else all that ever sent a byte.
    """
    speeds = state.source_speeds
    if len(speeds) > 1:
        return [f"{s} {format_bytes(v)}/s" for s, v in sorted(speeds.items(), key=lambda pair: (-pair[1], pair[0]))]
    grown = {s: n - before.get(s, 0) for s, n in state.sources.items()}
    names = list(speeds) or [s for s, n in grown.items() if n > 0] or [s for s, n in state.sources.items() if n > 0]
    return sorted(names, key=lambda s: (-grown.get(s, 0), s))


def activity(state: DownloadView, before: Mapping[str, int]) -> str:
    """Return what the download does: `from hub, node-b`, `waiting for origin node-b`, `verifying`."""
    if state.phase == "blocked":
        return f"blocked: {state.waiting_for}"
    if state.phase == "paused":
        return f"paused: `shoal resume {state.model}`"
    if state.phase == "fetching" and state.source_speeds:
        return f"from {', '.join(sources(state, before))}"
    if state.waiting_for:
        return f"waiting for {state.waiting_for}"
    if state.phase == "fetching":
        names = sources(state, before)
        return f"from {', '.join(names)}" if names else "fetching"
    if state.error is not None:
        return f"{state.phase}: {state.error.message}"
    return state.phase


def figures(state: DownloadView) -> list[str]:
    """Return how far it is and how fast, as far as known."""
    shown = []
    if state.total_bytes:
        shown.append(f"{format_bytes(state.done_bytes)} of {format_bytes(state.total_bytes)}")
        if state.phase not in ENDED_PHASES:
            shown += [f"{format_bytes(state.verified_bytes)} verified"] if state.verified_bytes else []
            shown += [f"resumed from {100 * state.resumed_from:.0f} %"] if state.resumed_bytes else []
    if state.phase == "fetching" and state.speed_bytes_per_s >= 1:
        shown.append(f"{format_bytes(state.speed_bytes_per_s)}/s")
    if state.eta_s is not None:
        shown.append(f"{format_duration(state.eta_s)} left")
    return shown + [f"{source} stalled {_times(count)}" for source, count in sorted(state.source_switches.items())]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def progress_line(state: DownloadView, before: Mapping[str, int]) -> str:
    """Return all of it on one line, for output that is no terminal."""
    return f"{state.node}: {', '.join([f'{percent(state):.0f} %', *figures(state), activity(state, before)])}"
