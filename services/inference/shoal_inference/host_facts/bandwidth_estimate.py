"""Estimate how fast this node reads weights while its stages work, from the time that their passes take. Pure.

The bandwidth measured on the idle machine (`device.py`) is the most that MLX reaches; a token takes more than reading
weights: attention, many small operations, other programs. A pass takes the time to read its active bytes at the
bandwidth we look for, plus an overhead that does not depend on bytes. One stage cannot separate the two, because its
passes are alike: so only stages count that read so much that the overhead is small beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal_common.messages.model_shape import ModelShape

LEAST_BYTES = 64 << 20
LEAST_S = 0.01
"""A pass must read for at least this long at the idle bandwidth: starting its operations alone takes over 1 ms."""
WEIGHT = 0.25
"""Weight of a new sample against the estimate: a minute's work tells most of it, a short disturbance little."""
NEWS_SHARE = 0.1
FARTHEST = 4.0
"""Bound of the estimate, as a factor of the idle bandwidth in both directions. Without it a node that was busy with
other work for an hour would never get another stage, and never show that it has recovered."""


def read_bytes(shape: ModelShape, first_layer: int, last_layer: int) -> int:
    """Return the bytes of weights that one token reads in a stage: the active bytes of each layer, and on the last
    stage the head. Of the embedding a token reads only one row."""
    active = shape.layer_active_bytes or shape.layer_bytes
    return sum(active[first_layer:last_layer]) + (shape.head_bytes if last_layer == len(active) else 0)


def counts(pass_bytes: int, idle_bytes_per_s: float) -> bool:
    """Return whether a pass reads enough to show the bandwidth."""
    return idle_bytes_per_s > 0 and pass_bytes >= max(LEAST_BYTES, LEAST_S * idle_bytes_per_s)


def followed(known: float, seen: float, idle_bytes_per_s: float) -> float:
    """Return the estimate after one more sample. `known`: the estimate before, the idle bandwidth at first."""
    slowest, fastest = idle_bytes_per_s / FARTHEST, idle_bytes_per_s * FARTHEST
    return min(max(known + WEIGHT * (min(seen, fastest) - known), slowest), fastest)


def is_news(said: float, now: float) -> bool:
    """Return whether the estimate moved enough to be published and saved."""
    return abs(now - said) > NEWS_SHARE * said


class Speed:
    """The bandwidth estimate of one node. `published_bytes_per_s` is 0 until it differs from the idle one."""

    def __init__(self, keep: Callable[[float], None]) -> None:
        self._keep = keep
        self._idle, self._estimate = 0.0, 0.0
        self.said = 0.0

    def begin(self, idle_bytes_per_s: float, kept_bytes_per_s: float) -> None:
        """Start from the idle bandwidth (0: estimate nothing) and the estimate saved before (0: none)."""
        self._idle, self.said = idle_bytes_per_s, kept_bytes_per_s
        self._estimate = kept_bytes_per_s or idle_bytes_per_s

    def note(self, pass_bytes: int, pass_s: float) -> None:
        """Add a sample: passes of a stage that read `pass_bytes` took `pass_s` in the median."""
        if pass_s <= 0 or not counts(pass_bytes, self._idle):
            return
        self._estimate = followed(self._estimate, pass_bytes / pass_s, self._idle)
        if is_news(self.said or self._idle, self._estimate):
            self.said = round(self._estimate)
            self._keep(self.said)
