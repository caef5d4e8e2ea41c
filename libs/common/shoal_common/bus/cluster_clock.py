"""The cluster's clock: NATS's time, carried forward by a local clock that nobody sets.

Machines' clocks may be hours apart and may be set at any time. Times that two processes compare, such as a token's
expiry, a command's age or since when a node is down, are this clock's. Times that a node compares with its own files,
and those in logs, are the local clock's. A process belongs to one cluster, so the clock is the module.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import datetime

from nats.aio.client import Client
from nats.errors import Error as NatsError

from shoal_common.logs import StructuredLogger

log = StructuredLogger("clock")

SYNC_INTERVAL_S = 600.0
"""NATS's own clock may be set, and two clocks always drift."""
_REQUEST_TIMEOUT_S = 5.0
_MIN_REPORTED_OFFSET_S = 5.0
_TICKS = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Counts while the machine sleeps: CLOCK_BOOTTIME on Linux, CLOCK_MONOTONIC on macOS."""

_offset_s: float | None = None


def now_s() -> float:
    """Return seconds since 1970 by NATS's clock, or by the local clock before the first synchronization."""
    return time.time() if _offset_s is None else time.clock_gettime(_TICKS) + _offset_s


async def sync_from_nats(client: Client) -> None:
    """Ask NATS for its time. Without a reply the clock continues as it was."""
    global _offset_s  # noqa: PLW0603  # the module is the clock
    with suppress(NatsError, TimeoutError, ValueError, KeyError):
        sent_s = time.clock_gettime(_TICKS)
        reply = await client.request("$JS.API.STREAM.INFO.CMD", b"", timeout=_REQUEST_TIMEOUT_S)
        received_s = time.clock_gettime(_TICKS)
        before_s = now_s()
        _offset_s = parse_nats_time(str(json.loads(reply.data)["ts"])) - (sent_s + received_s) / 2
        if abs(now_s() - before_s) >= _MIN_REPORTED_OFFSET_S:
            log.warning("local clock differs from NATS; using NATS time: see `shoal doctor`", by_s=now_s() - before_s)


def parse_nats_time(stamp: str) -> float:
    """Parse NATS's `2026-01-01T00:00:00.123456789Z` into seconds since 1970. Raises ValueError."""
    seconds, _, fraction = stamp.partition(".")
    if fraction.endswith("Z"):  # Python reads six digits at most
        stamp = f"{seconds}.{fraction[:-1][:6].ljust(6, '0')}+00:00"
    return datetime.fromisoformat(stamp).timestamp()
