"""A memory control group for a test, like that of a container or a systemd unit with MemoryMax=, and a program in it
that takes memory, like any other program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_GONE_DEADLINE_S = 60.0
_POLL_INTERVAL_S = 0.02
_NOT_TESTED = "memory limits of control groups are NOT tested here"


class MemoryGroup:
    """The control group, through the files that an administrator would use."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory, self.limit_bytes = directory, limit_bytes
        self._v1 = directory.parent == _V1
        (directory / ("memory.limit_in_bytes" if self._v1 else "memory.max")).write_text(str(limit_bytes))

    @property
    def within(self) -> tuple[str, ...]:
        """Return a command's prefix that runs it in this group."""
        return ("sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', str(self.directory))

    def available_bytes(self) -> int:
        """Return the bytes that its processes can still allocate."""
        usage = self._number("memory.usage_in_bytes" if self._v1 else "memory.current")
        stat = dict(line.split() for line in (self.directory / "memory.stat").read_text().splitlines())
        of_files = ("total_inactive_file", "total_active_file") if self._v1 else ("inactive_file", "active_file")
        return self.limit_bytes - usage + sum(int(stat[name]) for name in of_files)

    def killed_count(self) -> int:
        """Return how many of its processes the kernel has killed for memory."""
        text = (self.directory / ("memory.oom_control" if self._v1 else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])

    def pids(self) -> list[int]:
        """Return its processes."""
        return [int(pid) for pid in (self.directory / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """Remove it, with whatever a failed test has left in it."""
        give_up_s = time.monotonic() + _GONE_DEADLINE_S
        while True:
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(OSError):
                return self.directory.rmdir()
            assert time.monotonic() < give_up_s, f"{self.directory} still has processes {self.pids()}"
            time.sleep(_POLL_INTERVAL_S)

    def _number(self, name: str) -> int:
        return int((self.directory / name).read_text())


@contextmanager
def memory_group(name: str, limit_bytes: int) -> Iterator[MemoryGroup]:
    """Create a group with this limit while the body runs. Skips where that is not possible."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip(f"only root on Linux can make a control group: {_NOT_TESTED}")
    root = _V1 if (_V1 / "memory.limit_in_bytes").exists() else _V2
    directory = root / f"shoal-test-{os.getpid()}-{name}"
    try:
        if root == _V2:
            (root / "cgroup.subtree_control").write_text("+memory")
        directory.mkdir()
    except OSError as e:
        pytest.skip(f"no control group can be made in {root} ({e}): {_NOT_TESTED}")
    group = MemoryGroup(directory, limit_bytes)
    try:
        yield group
    finally:
        group.remove()


_TAKES = """
held = []
while words := input().split():
    held.append(bytearray(b"x") * int(words[1])) if words[0] == "take" else held.clear()
    print("done", flush=True)
"""


class Hog:
    """A program in a group that allocates memory on request and frees it; never all of the group's."""

    STEP_BYTES = 16 << 20

    def __init__(self, group: MemoryGroup) -> None:
        self._group = group
        self._process = subprocess.Popen(
            [*group.within, sys.executable, "-c", _TAKES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @contextmanager
    def leaving(self, available_bytes: int) -> Iterator[None]:
        """Allocate until the group has no more than this left; free it after the body."""
        try:
            while self._group.available_bytes() > available_bytes:
                self._command(f"take {self.STEP_BYTES}")
            yield
        finally:
            self._command("free")

    def _command(self, command: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(command, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "done\n", "the hog was killed"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
