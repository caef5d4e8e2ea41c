"""Lines that a person types, with editing and a saved history."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from shoal_common.host.private_files import make_private_directory, open_private

try:
    import readline
except ImportError:  # Python can be built without it: lines then have no history
    readline = None  # type: ignore[assignment]

_MAX_HISTORY_LINES = 1000
_PROMPT = "\x01\x1b[1;36m\x02> \x01\x1b[0m\x02"
"""Bold cyan; \\x01 and \\x02 tell readline which characters have no width."""


def confirm(question: str) -> bool:
    """Return whether a person answers yes; Enter alone means no."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


class LineEditor:
    """Reads lines from the terminal."""

    def __init__(self, history: Path) -> None:
        self._history = history
        if readline is not None:
            with suppress(OSError):
                readline.read_history_file(history)
            readline.set_history_length(_MAX_HISTORY_LINES)
            # Prompts are private: readline would create the file readable by all.
            with suppress(OSError):
                make_private_directory(history.parent)
                os.close(open_private(history, os.O_WRONLY))

    def next_line(self) -> str | None:
        """Return the next line; None at Ctrl-D. Ctrl-C discards the line and says how to leave."""
        while True:
            try:
                line = input(_PROMPT if readline is not None else "> ")
            except EOFError:
                return None
            except KeyboardInterrupt:
                print("\nCtrl-D or /exit ends", file=sys.stderr)
                continue
            if readline is not None and line.strip():
                with suppress(OSError):
                    readline.write_history_file(self._history)
            return line

    def confirm(self, question: str) -> bool:
        """Return whether a person answers yes; Enter alone means yes. The answer is not kept in the history."""
        try:
            answer = input(question).strip().lower()
        except EOFError:
            return False
        if readline is not None and readline.get_current_history_length():
            readline.remove_history_item(readline.get_current_history_length() - 1)
        return answer in ("", "y", "yes")
