"""How long this stage's passes take, told now and then while it works. Pure: time comes in.

Counted are passes of one token of one answer, computing alone: from their turn on the MLX thread to their result,
without what they waited for. An idle stage tells nothing, for nothing but a pass makes it look.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from shoal_inference.stage.ipc.messages import PassTiming

EVERY_S = 10.0
"""At most so often."""
LEAST_PASSES = 16
MOST_PASSES = 256
"""Remembered for the median: the last ones."""


class Passes:
    """The passes since the stage last told."""

    def __init__(self) -> None:
        self._taken_s: deque[float] = deque(maxlen=MOST_PASSES)
        self._told_at_s: float | None = None

    def note(self, pass_s: float, now_s: float) -> PassTiming | None:
        """A pass took so long. What to tell, when it is time to."""
        self._taken_s.append(pass_s)
        early = self._told_at_s is not None and now_s - self._told_at_s < EVERY_S
        if early or len(self._taken_s) < LEAST_PASSES:
            return None
        self._told_at_s = now_s
        told = PassTiming(pass_s=median(self._taken_s), passes=len(self._taken_s))
        self._taken_s.clear()
        return told
