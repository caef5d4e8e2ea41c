"""What only its owner may use: a node's home, its store, and every file in them. Blocking.

The umask of each process (`own_process.py`) keeps new files private. The functions here are for what a command
creates before such a process runs, and for what an older version left readable by others.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_common.errors import BadInput
from shoal_common.host.file_kinds import require_directory, require_no_broken_link
from shoal_common.logs import StructuredLogger

log = StructuredLogger("private_files")

PRIVATE_UMASK = 0o077
DIRECTORY_MODE = 0o700
FILE_MODE = 0o600

_HOME_DIRECTORIES = ("log", "run", "nats", "store", "identity", "operator")
_PRIVATE_CONTENTS = ("log", "identity", "operator")
_HOME_FILES = (
    "node.toml",
    "node.id",
    "api.key",
    "chat_history",
    "device.json",
    "environment",
    "environment.fetcher",
    "nats-server.conf",
)


def make_private_directory(path: Path) -> None:
    """Create a directory that only its owner may enter, and missing parents; make an existing one private."""
    path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    deny_others([path])


def make_home(home: Path) -> None:
    """Create a node's home, or make private what an older version left readable by others. Raises BadInput."""
    if home.exists() and not home.is_dir():
        raise BadInput(f"{home} is a file, not a node's directory: choose another one with --home or SHOAL_HOME")
    make_private_directory(home)
    for name in _HOME_DIRECTORIES:
        require_directory(home / name)
        if name != "store":  # without it everything but storage runs
            require_no_broken_link(home / name)
    deny_others(private_paths(home))


def private_paths(home: Path) -> list[Path]:
    """Return what is in a home and should be its owner's alone; not all of it exists."""
    return [
        *(home / name for name in (*_HOME_DIRECTORIES, *_HOME_FILES)),
        *(file for name in _PRIVATE_CONTENTS if (home / name).is_dir() for file in sorted((home / name).iterdir())),
    ]


def deny_others(paths: Iterable[Path]) -> None:
    """Take group's and others' permissions from those of these files and directories that exist.

    What belongs to another user stays as it is and is logged: the node works all the same.
    """
    for path in paths:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & PRIVATE_UMASK:
                path.chmod(mode & ~PRIVATE_UMASK)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            log.warning("cannot make this private; other users may read it", path=path, reason=e.strerror)


def open_private(path: Path, flags: int) -> int:
    """Open a file by os.open; a new one is its owner's alone, whatever the umask."""
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)


def replace_private(path: Path, data: bytes) -> None:
    """Replace a file that only its owner may read, durably, or leave the old one. Raises OSError."""
    new = path.with_name(f"{path.name}.new")
    try:
        new.unlink(missing_ok=True)  # what a killed process left may have another mode
        with os.fdopen(open_private(new, os.O_WRONLY | os.O_EXCL), "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()  # half a file does no harm, but is of no use
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def directory_locked(directory: Path) -> Iterator[None]:
    """Hold the lock under which files of this directory are read and then replaced; waits for the current holder."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
