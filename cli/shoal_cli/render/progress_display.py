"""Where a download's progress is drawn: bars on a terminal, lines elsewhere, nothing for `--json`."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from shoal_cli.render.progress import activity, figures, percent, progress_line
from shoal_common.messages.views import DownloadView

_LINE_INTERVAL_S = 3.0
_WIDE = 100
"""Columns of a terminal that has room for a long bar."""


class FiguresColumn(ProgressColumn):
    """The figures, on one line: cut where the line ends, so that bar and percentage stay."""

    def __init__(self) -> None:
        super().__init__(table_column=Column())

    def render(self, task: Task) -> Text:
        """Return the text."""
        text: Text = task.fields["text"].copy()
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class ProgressBars(AbstractContextManager["ProgressBars"]):
    """A bar for each node, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", style="cyan"),
            BarColumn(bar_width=24 if console.width >= _WIDE else 12),
            TextColumn("{task.percentage:>3.0f}%"),
            FiguresColumn(),
            console=console,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, state: DownloadView, before: dict[str, int]) -> None:
        """Move the node's bar."""
        # Not markup: it has names of peers and messages.
        text = Text.assemble(("  ".join(figures(state)), "dim"), "  ", activity(state, before))
        if state.node not in self._bars:
            self._bars[state.node] = self._progress.add_task(state.node, text=text)
        self._progress.update(self._bars[state.node], completed=percent(state), text=text)


class ProgressLines(AbstractContextManager["ProgressLines"]):
    """A line every few seconds, and at once when the phase changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, tuple[float, str]] = {}

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        return

    def show(self, state: DownloadView, before: dict[str, int]) -> None:
        """Print a line if it is due."""
        now_s, phase = time.monotonic(), f"{state.phase} {state.waiting_for}"
        last_s, last_phase = self._last.get(state.node, (-_LINE_INTERVAL_S, ""))
        if phase == last_phase and now_s - last_s < _LINE_INTERVAL_S:
            return
        self._last[state.node] = (now_s, phase)
        self._console.print(progress_line(state, before), markup=False, soft_wrap=True)


class NoProgress(AbstractContextManager["NoProgress"]):
    """Nothing, for `--json`."""

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        return

    def show(self, state: DownloadView, before: dict[str, int]) -> None:
        """Show nothing."""


def progress_display(console: Console, as_json: bool) -> ProgressBars | ProgressLines | NoProgress:
    """Return the display that suits this output."""
    if as_json:
        return NoProgress()
    return ProgressBars(console) if console.is_terminal else ProgressLines(console)
