"""Files that are not what they should be: a directory in a file's place, the reverse, or no text. Blocking."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal_common.errors import BadInput

_MAX_TEXT_BYTES = 1 << 20
_WRONG_KIND = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


def read_text_file(path: Path) -> str:
    """Return a small file's text. Raises BadInput, naming it, for what is no text file; OSError."""
    # Without waiting: a FIFO has no end.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        data = os.read(fd, _MAX_TEXT_BYTES + 1) if stat.S_ISREG(mode) else None
    finally:
        os.close(fd)
    if data is None:
        raise _in_place_of_a_file(path, mode)
    if len(data) > _MAX_TEXT_BYTES:
        raise BadInput(
            f"{path} cannot be read: it has more than {_MAX_TEXT_BYTES >> 20} MiB; put the right file back"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise BadInput(f"{path} cannot be read: {e}; put the right file back from a copy") from None


def require_directory(path: Path) -> None:
    """Raise BadInput for a path with something else than a directory; a missing one is fine."""
    if path.exists() and not path.is_dir():
        raise _in_place_of_a_directory(path)


def require_no_broken_link(path: Path) -> None:
    """Raise BadInput for a link to something that is not there."""
    if path.is_symlink() and not path.exists():
        raise _broken_link(path)


def require_file(path: Path) -> None:
    """Raise BadInput for a path with a directory; a missing file is fine."""
    if path.is_dir():
        raise _in_place_of_a_file(path, path.stat().st_mode)


@contextmanager
def wrong_kinds_named() -> Iterator[None]:
    """Raise BadInput, naming the path, instead of an OSError that a file of the wrong kind causes."""
    try:
        yield
    except OSError as e:
        named = wrong_kind(e)
        if named is None:
            raise
        raise named from e


def wrong_kind(error: BaseException) -> BadInput | None:
    """Return what people read of an OSError that a file of the wrong kind causes; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _WRONG_KIND:
        return None
    # A rename has two paths, and either can be at fault.
    for path in (
        Path(os.fsdecode(name)) for name in (error.filename2, error.filename) if isinstance(name, str | bytes)
    ):
        if error.errno == errno.EISDIR:
            if path.is_dir():
                return _in_place_of_a_file(path, path.stat().st_mode)
            continue
        for at in (path, *path.parents):
            if at.is_symlink() and not at.exists():
                return _broken_link(at)
            if at.exists():
                if not at.is_dir():
                    return _in_place_of_a_directory(at)
                break
    return None


def _broken_link(path: Path) -> BadInput:
    return BadInput(f"{path} is a broken link to {path.readlink()}: mount that disk, or remove the link")


def _in_place_of_a_file(path: Path, mode: int) -> BadInput:
    kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO, socket or device"
    return BadInput(f"{path} cannot be read: it is {kind} where a file belongs; move it away, then start again")


def _in_place_of_a_directory(path: Path) -> BadInput:
    return BadInput(f"{path} is a file where a directory belongs: move it away, then start again")
