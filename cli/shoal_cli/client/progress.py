"""A download in words and figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal_cli.sizes import show_bytes, show_seconds
from shoal_common.messages.records import DownloadState


def left_s(state: DownloadState) -> float | None:
    """Seconds until it is done at this speed; None while that cannot be told."""
    if state.phase != "fetching" or state.speed_bytes_per_s < 1 or not state.total_bytes:
        return None
    return max(state.total_bytes - state.done_bytes, 0) / state.speed_bytes_per_s


def percent(state: DownloadState) -> float:
    """0 to 100. A model of no bytes is whole when it is ready."""
    if not state.total_bytes:
        return 100.0 if state.phase == "ready" else 0.0
    return min(100.0 * state.done_bytes / state.total_bytes, 100.0)


def sources(state: DownloadState, before: Mapping[str, int]) -> list[str]:
    """Where bytes come from now: the sources that grew since `before`, the largest first; else all there were."""
    grown = {s: n - before.get(s, 0) for s, n in state.sources.items()}
    names = [s for s, n in grown.items() if n > 0] or [s for s, n in state.sources.items() if n > 0]
    return sorted(names, key=lambda s: (-grown[s], s))


def what_it_does(state: DownloadState, before: Mapping[str, int]) -> str:
    """The state in words: `from hub, node-b`, `waiting for origin node-b`, `verifying`."""
    if state.phase == "blocked":
        return f"blocked: {state.waiting_for}"
    if state.waiting_for:
        return f"waiting for {state.waiting_for}"
    if state.phase == "fetching":
        names = sources(state, before)
        return f"from {', '.join(names)}" if names else "fetching"
    if state.error is not None:
        return f"{state.phase}: {state.error.message}"
    return state.phase


def line(state: DownloadState, before: Mapping[str, int]) -> str:
    """All of it on one line, for where no terminal is."""
    parts = [f"{percent(state):.0f} %"]
    if state.total_bytes:
        parts.append(f"{show_bytes(state.done_bytes)} of {show_bytes(state.total_bytes)}")
    if state.phase == "fetching" and state.speed_bytes_per_s >= 1:
        parts.append(f"{show_bytes(state.speed_bytes_per_s)}/s")
    remaining = left_s(state)
    if remaining is not None:
        parts.append(f"{show_seconds(remaining)} left")
    parts.append(what_it_does(state, before))
    return f"{state.node}: {', '.join(parts)}"


def latest(states: Sequence[DownloadState], model: str, nodes: Sequence[str]) -> dict[str, DownloadState]:
    """The states of one download, by node."""
    return {s.node: s for s in states if s.model == model and s.node in nodes}
