"""Lines that a person types, with editing and a history that is kept."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

try:
    import readline
except ImportError:  # Python can be built without it: lines then have no history
    readline = None  # type: ignore[assignment]

_KEPT_LINES = 1000
_PROMPT = "\x01\x1b[1;36m\x02> \x01\x1b[0m\x02"
"""Bold cyan; \\x01 and \\x02 tell readline which characters take no room."""


def confirmed(question: str) -> bool:
    """Whether a person says yes, in so many words: Enter alone is no."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


class TypedLines:
    """Reads lines from the terminal."""

    def __init__(self, history: Path) -> None:
        self._history = history
        if readline is not None:
            with suppress(OSError):
                readline.read_history_file(history)
            readline.set_history_length(_KEPT_LINES)
            # What people ask a model is theirs: readline would create the file for all to read.
            with suppress(OSError):
                history.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(history, os.O_WRONLY | os.O_CREAT, 0o600))

    def next_line(self) -> str | None:
        """The next line; None at Ctrl-D. Ctrl-C throws the line away and says how to leave."""
        while True:
            try:
                words = input(_PROMPT if readline is not None else "> ")
            except EOFError:
                return None
            except KeyboardInterrupt:
                print("\nCtrl-D or /exit ends", file=sys.stderr)
                continue
            if readline is not None and words.strip():
                with suppress(OSError):
                    readline.write_history_file(self._history)
            return words

    def confirm(self, question: str) -> bool:
        """Whether a person says yes, which Enter alone does too."""
        try:
            said = input(question).strip().lower()
        except EOFError:
            return False
        if readline is not None and readline.get_current_history_length():
            readline.remove_history_item(readline.get_current_history_length() - 1)
        return said in ("", "y", "yes")
