"""How long to wait before trying again."""

from __future__ import annotations

import msgspec

_MAX_DOUBLINGS = 64
"""Bounds the exponent, so that a long run of failures cannot overflow a float."""


class Backoff(msgspec.Struct, frozen=True):
    """Waits `first_s` after the first failure in a row and twice as long after each further one, up to `max_s`."""

    first_s: float
    max_s: float

    def delay_s(self, failures: int) -> float:
        """Return the seconds to wait after this many failures in a row: 0 after none."""
        return min(self.first_s * 2.0 ** min(failures - 1, _MAX_DOUBLINGS), self.max_s) if failures > 0 else 0.0
