"""A directory in memory, for tests that write much and ask nothing of the disk's durability."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/dev/shm")


@contextmanager
def directory_in_memory() -> Iterator[Path]:
    """Make a directory, in memory where the machine has such a file system, and remove it at the end."""
    with tempfile.TemporaryDirectory(prefix="shoal-test-", dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        yield Path(name)
