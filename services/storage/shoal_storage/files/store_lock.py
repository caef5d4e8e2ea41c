"""The lock of a store or a volume: its holder has exclusive use of the directory. Blocking."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from shoal_common.errors import AlreadyRunning
from shoal_common.host.private_files import open_private


def take_lock(path: Path, what: str, holder: str) -> BinaryIO:
    """Take the lock and write `holder` into it. Held until the file is closed. Raises AlreadyRunning."""
    f = os.fdopen(open_private(path, os.O_RDWR | os.O_APPEND), "a+b", buffering=0)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        owner = f.read().decode(errors="replace").strip()
        f.close()
        raise AlreadyRunning(f"{what} is already open, by {owner}; stop it first") from None
    with suppress(OSError):  # a full disk must not keep storage from starting, which can free space
        f.truncate(0)
        f.write(holder.encode())
    return f
