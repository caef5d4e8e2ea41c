"""Reading the logs of this machine's node: the last lines of one or of all, or lines as they are written."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from shoal_cli.node.logs.log_rotation import tail
from shoal_cli.node_home import Home
from shoal_common.errors import NotFound
from shoal_common.names import SERVICES

NAMES = (*SERVICES, "nats", "supervisor")
_POLL_INTERVAL_S = 0.25
_CHUNK_BYTES = 256 << 10
_TIME = re.compile(r"ts=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z")


def written_at_s(line: str) -> float | None:
    """Return when a line was written, seconds since 1970; None for a line without a time, as in a traceback."""
    match = _TIME.match(line)
    return datetime.fromisoformat(match.group(1)).replace(tzinfo=UTC).timestamp() if match else None


def last_lines(home: Home, service: str, count: int) -> list[str]:
    """Return the last lines of one log, or of all ("") in the order of their times, each with its log's name.

    Raises NotFound.
    """
    if service:
        path = home.log(service)
        if not path.exists():
            raise NotFound(f"there is no log {path}: {service} has not run here; --home names another node")
        return tail(path, count)
    stamped: list[tuple[float, str]] = []
    for name in NAMES:
        at_s = 0.0
        for line in tail(home.log(name), count):
            at_s = written_at_s(line) or at_s
            stamped.append((at_s, f"{name:10} | {line}"))
    if not stamped:
        raise NotFound(f"there are no logs in {home.logs}: start a node with `shoal up`, or name its --home")
    stamped.sort(key=lambda s: s[0])
    return [line for _, line in stamped[-count:]]


class LogFollower:
    """Reads what is appended to one log, through its rotation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = self._stat()
        self._incomplete_line = b""

    def _stat(self) -> tuple[int, int]:
        try:
            stat = self._path.stat()
        except OSError:
            return 0, 0
        return stat.st_ino, stat.st_size

    def new_lines(self) -> list[str]:
        """Return the complete lines since the last call."""
        inode, size = self._stat()
        lines: list[str] = []
        if inode != self._inode:
            # What was appended before the rotation is in the file's older name now.
            lines += self._read(self._path.with_name(f"{self._path.name}.1")) if self._inode else []
            self._inode, self._offset = inode, 0
        if size > self._offset:
            lines += self._read(self._path)
        return lines

    def _read(self, path: Path) -> list[str]:
        try:
            with path.open("rb") as f:
                f.seek(self._offset)
                data = f.read(_CHUNK_BYTES)
        except OSError:
            return []
        self._offset += len(data)
        *complete, self._incomplete_line = (self._incomplete_line + data).split(b"\n")
        return [line.decode(errors="replace") for line in complete]


def follow_logs(home: Home, service: str) -> Iterator[str]:
    """Yield lines as they are written, for ever; those of one log, or of all ("")."""
    names = (service,) if service else NAMES
    followers = {name: LogFollower(home.log(name)) for name in names}
    while True:
        for name, follower in followers.items():
            for line in follower.new_lines():
                yield line if service else f"{name:10} | {line}"
        time.sleep(_POLL_INTERVAL_S)
