"""Tokens as they arrive, and text as it may be shown. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shoal_common.messages.questions import TokenEvent

MAX_AHEAD = 4096
"""Tokens kept that came before their turn. One beyond counts as never come."""


class InOrder:
    """Puts token events in order of their index, each once. An error is passed on at once, whatever its index."""

    def __init__(self) -> None:
        self.next_index = 0
        self._ahead: dict[int, TokenEvent] = {}

    @property
    def gap(self) -> bool:
        """Whether a later token is here and an earlier one is not."""
        return bool(self._ahead)

    def push(self, event: TokenEvent) -> list[TokenEvent]:
        """What can be passed on now that this event is here."""
        if event.error is not None:
            return [event]
        if self.next_index <= event.index < self.next_index + MAX_AHEAD:
            self._ahead.setdefault(event.index, event)
        ready = []
        while (following := self._ahead.pop(self.next_index, None)) is not None:
            ready.append(following)
            self.next_index += 1
        return ready


class StopScanner:
    """Looks for stop strings in text that comes in pieces; holds back what may turn out to begin one.

    The stop string that is complete first ends the text (of two complete at once, the longer), so how the text
    is cut into pieces makes no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is certain now. Nothing comes after `stopped`."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = self._may_begin_a_stop(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _may_begin_a_stop(self, text: str) -> int:
        longest = max((len(s) for s in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stops):
                return length
        return 0
