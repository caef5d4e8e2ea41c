"""What the hub has been asked for and what it has sent.

`bytes` counts body bytes of file content handed to a connection that was still open. It is never less than what
clients received; when a client goes away in the middle, it exceeds that by what the buffers between the two held (up
to one piece of 64 KiB, the server's 64 KiB, and the kernel's). For completed and for dropped answers it is exact.
"""

import threading

import msgspec

from shoal_demo.faults import Kind

# A day of 1 MiB ranges of one large file fits; what is beyond is counted, not kept.
MAX_RANGES_PER_FILE = 100_000


class FileStats(msgspec.Struct):
    """One file: GETs that reached its content (refused and redirected ones do not count here)."""

    bytes: int = 0
    gets: int = 0
    ranges: list[str] = msgspec.field(default_factory=list)
    """Range headers as asked, in order; a GET without one adds nothing."""
    ranges_not_kept: int = 0


class Requests(msgspec.Struct):
    """Requests by kind, refused ones included."""

    api: int = 0
    head: int = 0
    get: int = 0


class Stats(msgspec.Struct):
    """All counters. `files` is keyed by org/name/path, `answers` by status code."""

    bytes: int = 0
    files: dict[str, FileStats] = msgspec.field(default_factory=dict)
    requests: Requests = msgspec.field(default_factory=Requests)
    answers: dict[int, int] = msgspec.field(default_factory=dict)
    authorized_lfs_requests: int = 0
    """Requests to /_lfs/ that carried an Authorization header: must stay 0 where that is another host."""


class StatsBoard:
    """The counters: written by the hub, read and reset from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = Stats()

    def get(self) -> Stats:
        """A copy of all counters."""
        with self._lock:
            # Through builtins, as msgspec has no deep copy; the keys of `answers` survive as integers.
            return msgspec.convert(msgspec.to_builtins(self._stats), Stats)

    def reset(self) -> None:
        """All counters to zero; bytes of answers under way count from here on."""
        with self._lock:
            self._stats = Stats()

    def count_request(self, kind: Kind) -> None:
        """One request arrived."""
        with self._lock:
            setattr(self._stats.requests, kind, getattr(self._stats.requests, kind) + 1)

    def count_answer(self, status: int) -> None:
        """One answer was begun."""
        with self._lock:
            self._stats.answers[status] = self._stats.answers.get(status, 0) + 1

    def count_authorized_lfs(self) -> None:
        """A request for LFS bytes carried an Authorization header."""
        with self._lock:
            self._stats.authorized_lfs_requests += 1

    def count_get(self, name: str, asked_range: str | None) -> None:
        """One GET reached the content of a file."""
        with self._lock:
            file = self._stats.files.setdefault(name, FileStats())
            file.gets += 1
            if asked_range is not None and len(file.ranges) < MAX_RANGES_PER_FILE:
                file.ranges.append(asked_range)
            elif asked_range is not None:
                file.ranges_not_kept += 1

    def count_bytes(self, name: str, count: int) -> None:
        """Body bytes of a file were handed to its connection."""
        with self._lock:
            self._stats.bytes += count
            self._stats.files.setdefault(name, FileStats()).bytes += count
