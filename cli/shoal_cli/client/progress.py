"""A download in words and figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal_cli.sizes import show_bytes, show_seconds
from shoal_common.messages.records import ENDED, DownloadState


def percent(state: DownloadState) -> float:
    """0 to 100. A model of no bytes is whole when it is ready."""
    if not state.total_bytes:
        return 100.0 if state.phase == "ready" else 0.0
    return min(100.0 * state.done_bytes / state.total_bytes, 100.0)


def sources(state: DownloadState, before: Mapping[str, int]) -> list[str]:
    """Where bytes come from now, the fastest first, with its speed where it is not the only one.

    Where no speed is known: the sources that grew since `before`, the largest first; else all there were.
    """
    speeds = state.source_speeds
    if len(speeds) > 1:
        return [f"{s} {show_bytes(v)}/s" for s, v in sorted(speeds.items(), key=lambda pair: (-pair[1], pair[0]))]
    grown = {s: n - before.get(s, 0) for s, n in state.sources.items()}
    names = list(speeds) or [s for s, n in grown.items() if n > 0] or [s for s, n in state.sources.items() if n > 0]
    return sorted(names, key=lambda s: (-grown.get(s, 0), s))


def what_it_does(state: DownloadState, before: Mapping[str, int]) -> str:
    """The state in words: `from hub, node-b`, `waiting for origin node-b`, `verifying`."""
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


def figures(state: DownloadState) -> list[str]:
    """How far it is and how fast, where these are known."""
    found = []
    if state.total_bytes:
        found.append(f"{show_bytes(state.done_bytes)} of {show_bytes(state.total_bytes)}")
        if state.phase not in ENDED:
            found += [f"{show_bytes(state.verified_bytes)} verified"] if state.verified_bytes else []
            found += [f"resumed from {100 * state.resumed_from:.0f} %"] if state.resumed_bytes else []
    if state.phase == "fetching" and state.speed_bytes_per_s >= 1:
        found.append(f"{show_bytes(state.speed_bytes_per_s)}/s")
    if state.eta_s is not None:
        found.append(f"{show_seconds(state.eta_s)} left")
    found += [f"left {source}, silent, {_times(count)}" for source, count in sorted(state.switched.items())]
    return found


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def line(state: DownloadState, before: Mapping[str, int]) -> str:
    """All of it on one line, for where no terminal is."""
    return f"{state.node}: {', '.join([f'{percent(state):.0f} %', *figures(state), what_it_does(state, before)])}"


def latest(states: Sequence[DownloadState], model: str, nodes: Sequence[str]) -> dict[str, DownloadState]:
    """The states of one download, by node."""
    return {s.node: s for s in states if s.model == model and s.node in nodes}
