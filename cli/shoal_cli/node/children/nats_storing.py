"""Whether this node's NATS stores, and what to do when it does not. Pure; time arrives as `now_s`.

After a write that its disk refused, nats-server refuses every later write to that stream until it is restarted,
though it answers and there may be room again. Its log is where it says so.
"""

from __future__ import annotations

import re
from typing import Literal

from shoal_common.concurrency.backoff import Backoff
from shoal_common.units import format_bytes

MIN_FREE_BYTES = 4 << 20
"""With less, the disk counts as full: a restarted server would fail again."""
RESTART_BACKOFF = Backoff(5.0, 300.0)
_STORES_AFTER_S = 900.0
"""Without a refusal for so long, the next one counts as the first."""
_REFUSAL = re.compile(rb"\[(?:ERR|FTL|WRN)\].*(?:critical write error|will be disabled)", re.IGNORECASE)

Decision = Literal["restart", "wait", "nothing"]


class NatsStoring:
    """What is known of a NATS server's writes."""

    def __init__(self) -> None:
        self.refuses = False
        """Whether it has refused to store since it was last started."""
        self._restarted_at_s = 0.0
        self._restart_count = 0

    def read_line(self, line: bytes) -> None:
        """Take note of a line of its log."""
        if _REFUSAL.search(line):
            self.refuses = True

    def decide(self, free_bytes: int, now_s: float) -> Decision:
        """Return whether to restart it now, or to wait: for space, or until the last restart is long enough ago."""
        if not self.refuses:
            return "nothing"
        delay_s = RESTART_BACKOFF.delay_s(self._restart_count)
        return "restart" if free_bytes >= MIN_FREE_BYTES and now_s >= self._restarted_at_s + delay_s else "wait"

    def restarting(self, now_s: float) -> None:
        """Take note that it is restarted."""
        is_first = now_s - self._restarted_at_s > _STORES_AFTER_S
        self._restart_count = 1 if is_first else self._restart_count + 1
        self.refuses, self._restarted_at_s = False, now_s

    def problem(self, directory: str, free_bytes: int) -> str:
        """Return what is wrong, for people; "" if it stores."""
        if free_bytes < MIN_FREE_BYTES:
            return (
                f"the disk of {directory} is full ({format_bytes(free_bytes)} free), so NATS cannot store: free "
                "space there, for example with `shoal rm` or `shoal gc`; NATS then stores again by itself"
            )
        if self.refuses:
            return f"NATS refuses to store in {directory}, with {format_bytes(free_bytes)} free: it is restarted"
        return ""
