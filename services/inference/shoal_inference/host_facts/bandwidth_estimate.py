"""Estimate how fast this node reads weights while its stages work, from the time that their passes take. Pure.

The bandwidth measured on the idle machine (`device.py`) is the most that MLX reaches; a token takes more than reading
weights: attention, many small operations, other programs. A pass takes the time to read its active bytes at the
bandwidth we look for, plus an overhead that does not depend on bytes. One stage cannot separate the two, because its
passes are alike: so only stages count that read so much that the overhead is small beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from shoal_common.messages.model_shape import ModelShape

MIN_SAMPLE_BYTES = 64 << 20
MIN_SAMPLE_S = 0.01
"""A pass must read for at least this long at the idle bandwidth: starting its operations alone takes over 1 ms."""
SAMPLE_WEIGHT = 0.25
"""Weight of a new sample against the estimate: a minute's work tells most of it, a short disturbance little."""
SIGNIFICANT_CHANGE = 0.1
MAX_DEVIATION_FACTOR = 4.0
"""Bound of the estimate, as a factor of the idle bandwidth in both directions. Without it a node that was busy with
other work for an hour would never get another stage, and never show that it has recovered."""


def bytes_read_per_token(shape: ModelShape, first_layer: int, last_layer: int) -> int:
    """Return the bytes of weights that one token reads in a stage: the active bytes of each layer, and on the last
    stage the head. Of the embedding a token reads only one row."""
    active = shape.layer_active_bytes or shape.layer_bytes
    return sum(active[first_layer:last_layer]) + (shape.head_bytes if last_layer == len(active) else 0)


def is_usable_sample(pass_bytes: int, idle_bytes_per_s: float) -> bool:
    """Return whether a pass reads enough to show the bandwidth. `idle_bytes_per_s`: 0 if it is not measured yet."""
    return pass_bytes >= max(MIN_SAMPLE_BYTES, MIN_SAMPLE_S * idle_bytes_per_s)


def update_estimate(estimate: float, sample: float, idle_bytes_per_s: float) -> float:
    """Return the estimate after one more sample. `estimate`: the one before; 0: none, the sample is taken whole."""
    slowest = idle_bytes_per_s / MAX_DEVIATION_FACTOR
    fastest = idle_bytes_per_s * MAX_DEVIATION_FACTOR or math.inf
    weight = SAMPLE_WEIGHT if estimate else 1.0
    return min(max(estimate + weight * (min(sample, fastest) - estimate), slowest), fastest)


def is_significant(published: float, now: float) -> bool:
    """Return whether the estimate moved enough to be published and saved."""
    return abs(now - published) > SIGNIFICANT_CHANGE * published


class BandwidthEstimate:
    """The bandwidth estimate of one node. `published_bytes_per_s` is 0 until it differs from the idle one."""

    def __init__(self, save: Callable[[float], None]) -> None:
        self._save = save
        self._idle, self._estimate, self._started = 0.0, 0.0, False
        self.published_bytes_per_s = 0.0

    def start(self, idle_bytes_per_s: float, saved_bytes_per_s: float) -> None:
        """Estimate from now on. `idle_bytes_per_s`: 0 where it is not measured; `saved_bytes_per_s`: the estimate
        saved before, 0: none. Started again once the idle bandwidth is known, it keeps what stages have shown."""
        self._idle, self._started = idle_bytes_per_s, True
        self._estimate = self._estimate or saved_bytes_per_s
        self.published_bytes_per_s = self.published_bytes_per_s or saved_bytes_per_s

    def add_sample(self, pass_bytes: int, pass_s: float) -> None:
        """Add a sample: passes of a stage that read `pass_bytes` took `pass_s` in the median."""
        if not self._started or pass_s <= 0 or not is_usable_sample(pass_bytes, self._idle):
            return
        self._estimate = update_estimate(self._estimate, pass_bytes / pass_s, self._idle)
        if is_significant(self.published_bytes_per_s or self._idle, self._estimate):
            self.published_bytes_per_s = round(self._estimate)
            self._save(self.published_bytes_per_s)
