"""Holding the lease of the files that this stage reads: by its lock, which the kernel lets go of when we die."""

from __future__ import annotations

import asyncio
import fcntl
import os
from pathlib import Path

from shoal_inference.stage.errors import LoadFailed

HOLD_WITHIN_S = 10.0
"""Storage takes the lock for a moment when it looks whether somebody holds it."""
_TRY_EVERY_S = 0.02


async def hold(lock: str) -> int:
    """Take a shared lock on a lease, for as long as this process lives: the descriptor is never closed.

    No process that we start inherits it. Raises LoadFailed when the lease has ended already.
    """
    gone = LoadFailed(f"the model's lease ended before the stage locked it: {lock} does not exist")
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        raise gone from None
    try:
        async with asyncio.timeout(HOLD_WITHIN_S):
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_TRY_EVERY_S)
    except TimeoutError:
        raise LoadFailed(
            f"the lock of the model's lease was held by another process for over {HOLD_WITHIN_S} s: {lock}"
        ) from None
    # Storage removes a lease only while it has the lock alone: one that is there now stays.
    if not _is_there(lock):
        raise gone
    return fd


def _is_there(lock: str) -> bool:
    return Path(lock).exists()
