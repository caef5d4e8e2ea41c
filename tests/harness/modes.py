"""Who else may use the files of a node."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_USUAL_UMASK = 0o022


def open_to_others(root: Path) -> list[str]:
    """Return what another user may read, the directory itself included, as `mode path`; links and sockets not."""
    found = []
    for path in (root, *root.rglob("*")):
        status = path.lstat()
        if (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)) and status.st_mode & 0o077:
            found.append(f"{stat.S_IMODE(status.st_mode):04o} {path.relative_to(root)}")
    return found


@contextmanager
def usual_umask() -> Iterator[None]:
    """Let this process and its children create files as those of most users are created: readable by all."""
    before = os.umask(_USUAL_UMASK)
    try:
        yield
    finally:
        os.umask(before)
