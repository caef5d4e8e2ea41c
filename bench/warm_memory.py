"""Files in memory, and memory that is in use until just before the measurement needs it.

The host of a virtual machine may reclaim memory that is free for some seconds. Touching such memory again waits for
the host, and the machine's cores wait too: several times the cost of the copy, and none of it ours. So the measured
code takes its memory, including that of files, from a heap that shrinks as memory is needed. Linux.
"""

from __future__ import annotations

import mmap
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PIECE_BYTES = 16 << 20
AHEAD_BYTES = 4 * _PIECE_BYTES
"""The measured code uses this within seconds, before the host could reclaim it."""
_POLL_INTERVAL_S = 0.01


@contextmanager
def touched(size_bytes: int, ahead_bytes: int = AHEAD_BYTES) -> Iterator[None]:
    """While the context lasts, keep `size_bytes` of memory touched for what allocates next.

    `ahead_bytes` more than is used so far are released, so that the next allocations find them. Does nothing except
    on Linux, or without twice as much free memory.
    """
    if sys.platform != "linux" or psutil.virtual_memory().free < 2 * size_bytes:
        yield
        return
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    heap = mmap.mmap(-1, -(-size_bytes // _PIECE_BYTES) * _PIECE_BYTES, flags)
    for at in range(0, len(heap), mmap.PAGESIZE):
        heap[at] = 1
    free_then_bytes, ended = psutil.virtual_memory().free, threading.Event()

    def release_memory() -> None:
        given_bytes = 0
        while given_bytes < len(heap):
            used_bytes = free_then_bytes + given_bytes - psutil.virtual_memory().free
            while given_bytes < min(used_bytes + ahead_bytes, len(heap)):
                heap.madvise(mmap.MADV_DONTNEED, given_bytes, _PIECE_BYTES)
                given_bytes += _PIECE_BYTES
            if ended.wait(_POLL_INTERVAL_S):
                return

    giving = threading.Thread(target=release_memory)
    giving.start()
    try:
        yield
    finally:
        ended.set()
        giving.join()
        heap.close()


def memory_directory(needed_bytes: int) -> str | None:
    """Return a directory in memory if these files fit; None for the usual place of temporary files."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > needed_bytes else None
