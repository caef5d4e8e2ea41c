"""The cluster's clock: NATS's, carried on by a clock of this machine's that nobody sets.

Machines' clocks may be hours apart, and may be set at any time. What is compared between two processes, a token's
end, a command's age, since when a node is silent, is a time of this clock. What a node compares with the times of its
own files, and what logs show, is its own clock's. One process belongs to one cluster: its clock is the module's.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import datetime

from nats.aio.client import Client
from nats.errors import Error as NatsError

from shoal_common.logs import Log

log = Log("clock")

LOOK_AGAIN_S = 600.0
"""NATS's own clock may be set, and no two clocks go alike."""
_ANSWER_S = 5.0
_TOLD_FROM_S = 5.0
_TICKS = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Counts while the machine sleeps, on Linux by this name and on macOS by the other."""

_offset_s: float | None = None


def now_s() -> float:
    """Seconds since 1970 by NATS's clock; by this machine's until NATS was heard."""
    return time.time() if _offset_s is None else time.clock_gettime(_TICKS) + _offset_s


async def set_by(client: Client) -> None:
    """Ask NATS what time it is. Without an answer the clock goes on as it was."""
    global _offset_s  # noqa: PLW0603  # the module is the clock
    with suppress(NatsError, TimeoutError, ValueError, KeyError):
        began_s = time.clock_gettime(_TICKS)
        reply = await client.request("$JS.API.STREAM.INFO.CMD", b"", timeout=_ANSWER_S)
        ended_s = time.clock_gettime(_TICKS)
        before_s = now_s()
        _offset_s = read_time(str(json.loads(reply.data)["ts"])) - (began_s + ended_s) / 2
        if abs(now_s() - before_s) >= _TOLD_FROM_S:
            log.warning("the clock is off by that of NATS, which holds: see `shoal doctor`", by_s=now_s() - before_s)


def read_time(stamp: str) -> float:
    """`2026-01-01T00:00:00.123456789Z`, as NATS says times, in seconds since 1970. Raises ValueError."""
    whole, _, rest = stamp.partition(".")
    if rest.endswith("Z"):  # Python reads six digits at most
        stamp = f"{whole}.{rest[:-1][:6].ljust(6, '0')}+00:00"
    return datetime.fromisoformat(stamp).timestamp()
