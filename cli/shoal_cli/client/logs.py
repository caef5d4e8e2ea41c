"""`shoal logs`: the logs of this machine's node, one after the other or as they are written."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from shoal_cli.home import Home
from shoal_cli.node.rotate import tail
from shoal_common.errors import NotFound
from shoal_common.subjects import SERVICES

NAMES = (*SERVICES, "nats", "supervisor")
_POLL_S = 0.25
_CHUNK_BYTES = 256 << 10
_OURS = re.compile(r"ts=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z")
_NATS = re.compile(r"\[\d+\] (\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{3})")


def written_at(text: str) -> float | None:
    """When a line was written, seconds since 1970; None for a line without a time (a trace's second line)."""
    if match := _OURS.match(text):
        return datetime.fromisoformat(match.group(1)).replace(tzinfo=UTC).timestamp()
    if match := _NATS.match(text):  # nats-server writes local time
        return datetime.strptime(match.group(1), "%Y/%m/%d %H:%M:%S.%f").astimezone().timestamp()
    return None


def last_lines(home: Home, service: str, count: int) -> list[str]:
    """The last lines of one log, or of all in the order they were written, each with its name in front."""
    if service:
        path = home.log(service)
        if not path.exists():
            raise NotFound(f"there is no log {path}: {service} has not run here; --home names another node")
        return tail(path, count)
    stamped: list[tuple[float, str]] = []
    for name in NAMES:
        at_s = 0.0
        for text in tail(home.log(name), count):
            at_s = written_at(text) or at_s
            stamped.append((at_s, f"{name:10} | {text}"))
    if not stamped:
        raise NotFound(f"there are no logs in {home.logs}: start a node with `shoal up`, or name its --home")
    stamped.sort(key=lambda s: s[0])
    return [text for _, text in stamped[-count:]]


class Follower:
    """What is added to one log, rotation included."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = self._where()
        self._rest = b""

    def _where(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0
        return found.st_ino, found.st_size

    def new_lines(self) -> list[str]:
        """Whole lines since the last look."""
        inode, size = self._where()
        found: list[str] = []
        if inode != self._inode:
            # What its predecessor got after our last look is in the file's older name now.
            found += self._read(self._path.with_name(f"{self._path.name}.1")) if self._inode else []
            self._inode, self._offset = inode, 0
        if size > self._offset:
            found += self._read(self._path)
        return found

    def _read(self, path: Path) -> list[str]:
        try:
            with path.open("rb") as f:
                f.seek(self._offset)
                data = f.read(_CHUNK_BYTES)
        except OSError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [text.decode(errors="replace") for text in whole]


def follow(home: Home, service: str) -> Iterator[str]:
    """Lines as they are written, for ever."""
    names = (service,) if service else NAMES
    followers = {name: Follower(home.log(name)) for name in names}
    while True:
        for name, follower in followers.items():
            for text in follower.new_lines():
                yield text if service else f"{name:10} | {text}"
        time.sleep(_POLL_S)
