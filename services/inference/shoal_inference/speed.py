"""How fast this node reads weights while stages work, from the time that their passes take.

What is measured on the idle machine (`device.py`) is the fastest that MLX can; what a token really takes is more:
attention, many small operations, other programs. A stage's pass takes as long as reading its active bytes at the
speed that is looked for, and an overhead that has nothing to do with bytes. One stage cannot tell the two apart, its
passes being alike: so only stages count that read so much that the overhead is small beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal_common.messages.records import ModelShape

LEAST_BYTES = 64 << 20
LEAST_S = 0.01
"""A pass has to read for so long, by the idle speed: starting its operations takes a millisecond and more."""
WEIGHT = 0.25
"""Of what is seen now, against what was known: a minute's work tells most of it, a moment's disturbance little."""
NEWS_SHARE = 0.1
FARTHEST = 4.0
"""Not more than so many times slower or faster than the idle machine: a node on which something else ran for an hour
is not shunned for ever, for no stage would come to it and show that it is well again."""


def read_bytes(shape: ModelShape, first_layer: int, last_layer: int) -> int:
    """What one token reads of a stage's weights: of each layer what is active, and the head on the last stage. Of
    the embedding it reads a row."""
    active = shape.layer_active_bytes or shape.layer_bytes
    return sum(active[first_layer:last_layer]) + (shape.head_bytes if last_layer == len(active) else 0)


def counts(pass_bytes: int, idle_bytes_per_s: float) -> bool:
    """Whether a stage that reads so much shows how fast the machine reads."""
    return idle_bytes_per_s > 0 and pass_bytes >= max(LEAST_BYTES, LEAST_S * idle_bytes_per_s)


def followed(known: float, seen: float, idle_bytes_per_s: float) -> float:
    """The speed after one more was seen. `known`: before that; the idle machine's where none was."""
    slowest, fastest = idle_bytes_per_s / FARTHEST, idle_bytes_per_s * FARTHEST
    return min(max(known + WEIGHT * (min(seen, fastest) - known), slowest), fastest)


def is_news(said: float, now: float) -> bool:
    """Whether it moved by so much that it is said, and kept."""
    return abs(now - said) > NEWS_SHARE * said


class Speed:
    """The speed of one node. `said` is what the cluster hears: 0 until stages have shown another than the idle."""

    def __init__(self, keep: Callable[[float], None]) -> None:
        self._keep = keep
        self._idle, self._now = 0.0, 0.0
        self.said = 0.0

    def begin(self, idle_bytes_per_s: float, kept_bytes_per_s: float) -> None:
        """What the idle machine does, 0 where nothing is to be corrected; and what was kept of stages before."""
        self._idle, self.said = idle_bytes_per_s, kept_bytes_per_s
        self._now = kept_bytes_per_s or idle_bytes_per_s

    def note(self, pass_bytes: int, pass_s: float) -> None:
        """Passes of a stage that read so much took so long, in the median."""
        if pass_s <= 0 or not counts(pass_bytes, self._idle):
            return
        self._now = followed(self._now, pass_bytes / pass_s, self._idle)
        if is_news(self.said or self._idle, self._now):
            self.said = round(self._now)
            self._keep(self.said)
