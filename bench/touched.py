"""Memory that is in use just before what is measured needs it.

The host of a virtual machine may take memory back that is free for some seconds. Who touches such memory again waits
for the host, and the machine's cores with it: several times the cost of the copy, and nothing of ours. A measurement
that writes to a file system in memory takes its room from a file that gives way as it is needed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PIECE_BYTES = 16 << 20
_LOOK_S = 0.02


@contextmanager
def touched(directory: Path, size_bytes: int) -> Iterator[None]:
    """Let `size_bytes` of new files in a file system in memory, while the context lasts, take memory that is touched.

    Elsewhere, and where there is no room for it, nothing is done.
    """
    free_bytes = _free_bytes(directory)
    if not directory.is_relative_to("/dev/shm") or free_bytes < 2 * size_bytes:
        yield
        return
    path = directory / "touched"
    with path.open("wb") as f:
        piece = bytes(_PIECE_BYTES)
        for _ in range(-(-size_bytes // _PIECE_BYTES)):
            f.write(piece)
        f.flush()
        held_bytes, ended = f.tell(), threading.Event()
        free_then_bytes = free_bytes - held_bytes

        def give_way() -> None:
            held_now_bytes = held_bytes
            while not ended.wait(_LOOK_S):
                used_bytes = free_then_bytes + (held_bytes - held_now_bytes) - _free_bytes(directory)
                if used_bytes > held_bytes - held_now_bytes:
                    # Somewhat more than is used so far: what comes next finds it.
                    held_now_bytes = max(held_bytes - used_bytes - 2 * _PIECE_BYTES, 0)
                    os.ftruncate(f.fileno(), held_now_bytes)

        giving = threading.Thread(target=give_way)
        giving.start()
        try:
            yield
        finally:
            ended.set()
            giving.join()
            path.unlink()


def _free_bytes(directory: Path) -> int:
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize
