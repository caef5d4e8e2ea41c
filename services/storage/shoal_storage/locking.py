"""The lock of a store, or of a further root: who has it, uses what is beside it alone. Blocking: for threads."""

from __future__ import annotations

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from shoal_common.errors import Claimed


def take_lock(path: Path, what: str, holder: str) -> BinaryIO:
    """Take it, and say who has it. It is kept until the file is closed. Raises Claimed with its holder."""
    f = path.open("a+b", buffering=0)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        by = f.read().decode(errors="replace").strip()
        f.close()
        raise Claimed(f"{what} is open already, by {by}; stop that one") from None
    with suppress(OSError):  # a full disk must not keep the one from starting that can empty it
        f.truncate(0)
        f.write(holder.encode())
    return f
