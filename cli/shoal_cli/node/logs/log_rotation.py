"""Log files that cannot fill a disk: `<name>.log`, `.log.1` and `.log.2`, each of at most 10 MiB."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

from shoal_common.host.file_kinds import require_file
from shoal_common.host.private_files import open_private

MAX_BYTES = 10 << 20
MAX_FILES = 3
MAX_LINE_BYTES = 64 << 10


class RotatingLog:
    """Appends lines to a log. Safe to use from several threads.

    A line that cannot be written (a full disk) is counted and dropped: a process must never wait for its log. Raises
    BadInput for a directory in its place.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES, files: int = MAX_FILES) -> None:
        require_file(path)
        self.path = path
        self.dropped_lines = 0
        self._max_bytes, self._files = max_bytes, files
        self._lock = threading.Lock()
        self._fd = -1
        self._size_bytes = 0

    def write(self, line: bytes) -> None:
        """Append one line, to a new file when this one would exceed its limit."""
        with self._lock:
            try:
                if self._fd < 0:
                    self._open()
                if self._size_bytes and self._size_bytes + len(line) > self._max_bytes:
                    self._rotate()
                self._size_bytes += os.write(self._fd, line)
            except OSError:
                self.dropped_lines += 1

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _open(self) -> None:
        self._fd = open_private(self.path, os.O_WRONLY | os.O_APPEND)
        self._size_bytes = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        os.close(self._fd)
        self._fd = -1
        for number in range(self._files - 1, 0, -1):
            newer = self._numbered(number - 1)
            if newer.exists():
                newer.replace(self._numbered(number))
        self._open()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path


class LogStream(io.TextIOBase):
    """A RotatingLog as the text stream that `logging` writes to."""

    def __init__(self, log: RotatingLog) -> None:
        self._log = log

    def write(self, text: str) -> int:
        """Append text; `logging` writes whole lines."""
        self._log.write(text.encode(errors="replace"))
        return len(text)


def pump(source: int, log: RotatingLog, translate: Callable[[bytes], bytes] | None = None) -> threading.Thread:
    """Copy lines from a pipe into a log until its writers are gone, each translated first.

    In a thread: a slow disk must block nobody.
    """

    def copy() -> None:
        with os.fdopen(source, "rb") as pipe:
            while line := pipe.readline(MAX_LINE_BYTES):
                log.write(translate(line) if translate else line)

    thread = threading.Thread(target=copy, name=f"log {log.path.stem}", daemon=True)
    thread.start()
    return thread


def tail(path: Path, lines: int, max_bytes: int = 256 << 10) -> list[str]:
    """Return the last lines of a log, reading at most `max_bytes` of it; nothing where there is none."""
    try:
        with path.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(size - max_bytes, 0))
            data = f.read(max_bytes)
    except OSError:
        return []
    found = data.decode(errors="replace").removesuffix("\n").split("\n")
    if size > max_bytes:
        found = found[1:]  # the first one is cut
    return found[-lines:] if lines and data else []
