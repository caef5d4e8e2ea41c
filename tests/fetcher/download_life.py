"""A download's state machine, driven by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal_common.errors import DiskFull, HubUnavailable, ShoalError
from shoal_common.messages.downloads import DownloadPhase, DownloadState
from shoal_fetcher.downloads import events as ev
from shoal_fetcher.downloads.state_machine import Download, handle
from shoal_fetcher.errors import ReservationLost

NOW_S = 1_800_000_000.0
NONE = Download(node="a", model="org/name")
FULL = DiskFull("disk full: No space left on device", blob="a" * 64)
LOST = ReservationLost("the reservation is gone")
HUB_DOWN = HubUnavailable("the hub is unreachable")


class Life:
    """One download, and the actions that its last event led to."""

    def __init__(self, state: Download = NONE) -> None:
        self.state, self.now_s = state, NOW_S
        self.actions: Sequence[ev.Action] = ()

    def on(self, *events: ev.DownloadEvent) -> Sequence[ev.Action]:
        """Let events happen, one after another. Returns the actions of the last one."""
        for event in events:
            transition = handle(self.state, event, self.now_s)
            self.state, self.actions = transition.state, transition.actions
        return self.actions

    @property
    def phase(self) -> str:
        return self.state.phase


def requested(layers: list[list[int]] | None = None, *events: ev.DownloadEvent) -> Life:
    """A download that was requested now, after these events."""
    life = Life()
    life.on(ev.Found(None, None), ev.RequestStored(layers or []), *events)
    return life


def fetching(layers: list[list[int]] | None = None) -> Life:
    """A download whose bytes arrive."""
    return requested(layers, ev.Resolved(layers or []), ev.Reserved())


def failed(error: ShoalError, done_bytes: int = 1) -> ev.WorkFailed:
    return ev.WorkFailed(error, done_bytes)


def published(phase: DownloadPhase, **fields: Any) -> DownloadState:
    return DownloadState(node="a", model="org/name", phase=phase, **fields)
