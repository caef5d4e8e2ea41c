"""Put tokens in order, and hold back text that may begin a stop string. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shoal_common.messages.generation import TokenEvent

MAX_TOKENS_AHEAD = 4096
"""Most tokens kept ahead of a gap. A token beyond that is dropped."""


class TokenReorderBuffer:
    """Orders token events by index, each once. An error is passed on at once, whatever its index."""

    def __init__(self) -> None:
        self.next_index = 0
        self._ahead: dict[int, TokenEvent] = {}

    @property
    def has_gap(self) -> bool:
        """Whether a token is missing before one that has arrived."""
        return bool(self._ahead)

    def push(self, event: TokenEvent) -> list[TokenEvent]:
        """Add an event; return the events that are now in order."""
        if event.error is not None:
            return [event]
        if self.next_index <= event.index < self.next_index + MAX_TOKENS_AHEAD:
            self._ahead.setdefault(event.index, event)
        ready = []
        while (following := self._ahead.pop(self.next_index, None)) is not None:
            ready.append(following)
            self.next_index += 1
        return ready


class StopScanner:
    """Finds stop strings in text that arrives in pieces; holds back text that may begin one.

    The stop string that is complete first ends the text (of two complete at once, the longer), so the cut into
    pieces makes no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held_back = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Add a piece; return the text that can be sent now. After `stopped` that is always ""."""
        if self.stopped:
            return ""
        text = self._held_back + piece
        matches = [(index + len(stop), index) for stop in self._stops if (index := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._held_back = True, ""
            return text[: min(matches)[1]]
        held_back = self._may_begin_a_stop(text)
        self._held_back = text[len(text) - held_back :]
        return text[: len(text) - held_back]

    def flush(self) -> str:
        """Return the text held back, at the end of the answer."""
        held_back, self._held_back = self._held_back, ""
        return held_back

    def _may_begin_a_stop(self, text: str) -> int:
        longest = max((len(s) for s in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stops):
                return length
        return 0
