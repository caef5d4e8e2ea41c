"""Who else may use the files of a node, and files that are not what they should be."""

from __future__ import annotations

import os
import shutil
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


def make_wrong(path: Path, kind: str) -> None:
    """Put something else in the place of a file or a directory: `directory`, `fifo`, `bytes` or `broken link`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match kind:
        case "directory":
            path.mkdir()
            (path / "in it").write_text("x")
        case "fifo":
            os.mkfifo(path)
        case "bytes":
            path.write_bytes(bytes(range(256)))
        case "broken link":
            path.symlink_to("/nowhere/at all")
