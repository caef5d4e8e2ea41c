"""`shoal pull`: ask for a download, show how it goes, say how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from shoal_cli.client.answers import Anything, DownloadsAnswer
from shoal_cli.client.gateway import Gateway
from shoal_cli.client.progress import figures, latest, line, percent, what_it_does
from shoal_common.errors import NotFound, ShoalError, Unavailable, from_body
from shoal_common.messages.commands import Outcome
from shoal_common.messages.records import ENDED, DownloadState
from shoal_common.names import ModelRef

POLL_S = 0.5
_STILL = ENDED | {"paused"}
"""Phases in which a command that waits may have its answer."""
_LINE_EVERY_S = 3.0
_OUTAGE_PATIENCE_S = 30.0
"""A gateway that restarts meanwhile is no reason to give up watching."""


class Shown(Protocol):
    """Where progress goes."""

    def show(self, state: DownloadState, before: dict[str, int]) -> None:
        """A node's download as it is now; `before`: bytes by source when last shown."""


class Bars(AbstractContextManager["Bars"]):
    """A bar for each node, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", style="cyan"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[bytes]}", style="dim"),
            TextColumn("{task.fields[doing]}"),
            console=console,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, state: DownloadState, before: dict[str, int]) -> None:
        """Move the node's bar."""
        if state.node not in self._bars:
            self._bars[state.node] = self._progress.add_task(state.node, total=100, bytes="", doing="")
        self._progress.update(
            self._bars[state.node],
            completed=percent(state),
            bytes="  ".join(figures(state)),
            # Names of peers and messages are no markup.
            doing=Text(what_it_does(state, before)).markup,
        )


class Lines(AbstractContextManager["Lines"]):
    """A line now and then, where no terminal is; at once when the state changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, tuple[float, str]] = {}

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        return

    def show(self, state: DownloadState, before: dict[str, int]) -> None:
        """Print it if it is time or news."""
        now_s, news = time.monotonic(), f"{state.phase} {state.waiting_for}"
        last_s, last_news = self._last.get(state.node, (-_LINE_EVERY_S, ""))
        if news == last_news and now_s - last_s < _LINE_EVERY_S:
            return
        self._last[state.node] = (now_s, news)
        self._console.print(line(state, before), markup=False, soft_wrap=True)


class Silent(AbstractContextManager["Silent"]):
    """Nothing, for --json."""

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        return

    def show(self, state: DownloadState, before: dict[str, int]) -> None:
        """Nothing."""


def display(console: Console, as_json: bool) -> Bars | Lines | Silent:
    """How progress is shown here."""
    if as_json:
        return Silent()
    return Bars(console) if console.is_terminal else Lines(console)


class Pull:
    """One download, on one or more nodes."""

    def __init__(self, gateway: Gateway, model: str) -> None:
        self._gateway = gateway
        self.model = str(ModelRef.parse(model))
        self.states: dict[str, DownloadState] = {}
        self.errors: dict[str, ShoalError] = {}
        self._commands: dict[str, str] = {}

    @property
    def nodes(self) -> list[str]:
        """Where it was asked for."""
        return list(self._commands)

    def ask(self, nodes: Sequence[str], everywhere: bool) -> None:
        """Send the wish. Raises what the first node that refuses says."""
        body: dict[str, Any] = {"model": self.model}
        if everywhere or nodes:
            body["nodes"] = "all" if everywhere else list(nodes)
        answer = self._gateway.post("/v1/downloads", body, DownloadsAnswer)
        self._commands = answer.commands
        self.states = latest(answer.downloads, self.model, self.nodes)

    def follow(self, shown: Shown, pause: Callable[[float], None] = time.sleep) -> None:
        """Show progress until it has ended on every node; `errors` then holds what went wrong, by node."""
        running, before = set(self.nodes), dict[str, dict[str, int]]()
        reached_s = time.monotonic()
        while True:
            try:
                answer = self._gateway.get("/v1/downloads", DownloadsAnswer)
                self.states |= latest(answer.downloads, self.model, self.nodes)
                for node in sorted(running):
                    state = self.states.get(node)
                    if state is not None:
                        shown.show(state, before.get(node, {}))
                        before[node] = dict(state.sources)
                    # An old state may say "ready" or "failed" of an earlier wish: the command's outcome decides.
                    if (state is None or state.phase in _STILL) and self._has_ended(node):
                        running.discard(node)
                reached_s = time.monotonic()
            except Unavailable:
                if time.monotonic() - reached_s > _OUTAGE_PATIENCE_S:
                    raise
            if not running:
                return
            pause(POLL_S)

    def _has_ended(self, node: str) -> bool:
        try:
            outcome = self._gateway.get(f"/v1/commands/{self._commands[node]}", Outcome)
        except NotFound:
            return False
        if outcome.error is not None:
            self.errors[node] = from_body(outcome.error)
        return True

    def final(self) -> Anything:
        """The document that --json prints."""
        answer = self._gateway.get("/v1/downloads", Anything)
        mine = [d for d in answer["downloads"] if d["model"] == self.model and d["node"] in self._commands]
        return {"downloads": mine, "commands": self._commands}


def say_it_goes_on(model: str) -> None:
    """What Ctrl-C did: nothing to the download."""
    print(
        f"\nthe download goes on without you: `shoal pull {model}` shows it again, `shoal pause {model}` stops it "
        f"for a while, `shoal cancel {model}` for good",
        file=sys.stderr,
    )
