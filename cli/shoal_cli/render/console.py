"""Where text and tables are drawn: as wide as the terminal, without a limit elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

UNLIMITED = 1 << 20
"""Characters of a line in a pipe or a file: nothing wraps there."""


def new_console(environ: Mapping[str, str], stderr: bool = False) -> Console:
    """Return a console for stdout or stderr. NO_COLOR, if not empty, leaves out every style."""
    console = Console(stderr=stderr, highlight=False, color_system=None if environ.get("NO_COLOR") else "auto")
    if not console.is_terminal:
        console.width = UNLIMITED
    return console
