"""A full disk, as the error that people meet: the only place that maps it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shoal_common.errors import DISK_FULL, DiskFull


@contextmanager
def map_disk_full(activity: str, advice: str = "free some space", **details: Any) -> Iterator[None]:
    """Map ENOSPC and EDQUOT to DiskFull, raised from the OSError."""
    try:
        yield
    except OSError as e:
        if e.errno not in DISK_FULL:
            raise
        raise DiskFull(f"disk full: {e.strerror} while {activity}; {advice}", **details) from e
