"""How long to wait before connecting again."""

from __future__ import annotations

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0


def backoff_s(attempt: int) -> float:
    """Seconds to wait after the attempt-th (from 0) failure to connect."""
    return min(FIRST_BACKOFF_S * float(2 ** min(attempt, 16)), MAX_BACKOFF_S)
