"""Count the hub's requests and sent bytes.

`bytes` counts the body bytes of files handed to a connection that was still open. It is never less than what clients
received; when a client disconnects, it exceeds that by the contents of the buffers (up to one piece of 64 KiB, the
server's 64 KiB, and the kernel's). For completed and for dropped responses it is exact.
"""

import threading

import msgspec

from shoal_demo.faults import Kind

# Enough for a day of 1 MiB ranges of one large file; further ranges are counted, not kept.
MAX_RANGES_PER_FILE = 100_000


class FileStats(msgspec.Struct):
    """One file: GETs that reached its content, without refused and redirected ones."""

    bytes: int = 0
    gets: int = 0
    ranges: list[str] = msgspec.field(default_factory=list)
    """Range headers in order; a GET without one adds nothing."""
    ranges_not_kept: int = 0


class RequestCounts(msgspec.Struct):
    """Requests by kind, refused ones included."""

    api: int = 0
    head: int = 0
    get: int = 0


class TransferStats(msgspec.Struct):
    """All counters. `files` is keyed by org/name/path, `answers` by status code."""

    bytes: int = 0
    files: dict[str, FileStats] = msgspec.field(default_factory=dict)
    requests: RequestCounts = msgspec.field(default_factory=RequestCounts)
    answers: dict[int, int] = msgspec.field(default_factory=dict)
    authorized_lfs_requests: int = 0
    """Requests to /_lfs/ that carried an Authorization header: must stay 0 where that is another host."""


class StatsBoard:
    """Holds the counters: written by the hub, read and reset from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = TransferStats()

    def get(self) -> TransferStats:
        """Return a copy of all counters."""
        with self._lock:
            # Through builtins, because msgspec has no deep copy; the keys of `answers` stay integers.
            return msgspec.convert(msgspec.to_builtins(self._stats), TransferStats)

    def reset(self) -> None:
        """Set all counters to zero; running responses count from here on."""
        with self._lock:
            self._stats = TransferStats()

    def count_request(self, kind: Kind) -> None:
        """Count a request."""
        with self._lock:
            setattr(self._stats.requests, kind, getattr(self._stats.requests, kind) + 1)

    def count_answer(self, status: int) -> None:
        """Count a response."""
        with self._lock:
            self._stats.answers[status] = self._stats.answers.get(status, 0) + 1

    def count_authorized_lfs(self) -> None:
        """Count a request for LFS bytes that carried an Authorization header."""
        with self._lock:
            self._stats.authorized_lfs_requests += 1

    def count_get(self, name: str, range_header: str | None) -> None:
        """Count a GET that reached the content of a file."""
        with self._lock:
            file = self._stats.files.setdefault(name, FileStats())
            file.gets += 1
            if range_header is not None and len(file.ranges) < MAX_RANGES_PER_FILE:
                file.ranges.append(range_header)
            elif range_header is not None:
                file.ranges_not_kept += 1

    def count_bytes(self, name: str, count: int) -> None:
        """Count body bytes of a file handed to its connection."""
        with self._lock:
            self._stats.bytes += count
            self._stats.files.setdefault(name, FileStats()).bytes += count
