"""Intercept every call that changes the disk, in this process: to stop before it, fail it, or skip it.

The calls themselves are real.

Writes to open files are not intercepted; a file counts as written when it is opened for writing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import msgspec

CHANGES = ("fsync", "replace", "rename", "link", "symlink", "unlink", "mkdir", "rmdir", "chmod", "fchmod", "utime")
_PACKAGE = "shoal_storage"
_active: Seam | None = None
_hooked = False


class Call(msgspec.Struct, frozen=True):
    """One call. `site` is where the store's code made it: functions with line numbers, innermost first."""

    number: int
    name: str
    paths: tuple[str, ...]
    site: str

    def __str__(self) -> str:
        return f"{self.number}: {self.name} {' '.join(self.paths)} ({self.site})"


class Seam:
    """The intercepted calls below a directory. `before` may block, raise OSError, or return False to skip one."""

    def __init__(self, root: Path, before: Callable[[Call], bool]) -> None:
        self.root, self._before = str(root), before
        self.calls: list[Call] = []
        """The calls that were made and succeeded."""
        self.events: list[Call | tuple[str, str]] = []
        """The same, with acknowledgements in between."""
        self._count = 0
        self._busy = False

    def acknowledge(self, what: str, which: str) -> None:
        """Record an acknowledgement: from here on it must last."""
        self.events.append((what, which))

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of `os` that is intercepted."""

        def call(*args: Any, **more: Any) -> Any:
            paths = self._paths(name, args, more)
            seen = self._see(name, paths)
            if seen is None:
                return real(*args, **more)
            if not self._before(seen):
                return None
            result = real(*args, **more)
            self._made(seen)
            return result

        return call

    def opened(self, path: object, flags: int) -> None:
        """Intercept the opening of a file."""
        if isinstance(path, str | os.PathLike) and flags & (os.O_WRONLY | os.O_RDWR):
            seen = self._see("create" if flags & os.O_CREAT else "write", (_path(path, None),))
            if seen is not None and self._before(seen):
                self._made(seen)

    def _see(self, name: str, paths: tuple[str, ...]) -> Call | None:
        if self._busy or not any(p == self.root or p.startswith(f"{self.root}/") for p in paths):
            return None
        site = _site()
        if not site:
            return None  # made by the test itself
        self._count += 1
        return Call(self._count, name, paths, site)

    def _made(self, call: Call) -> None:
        self.calls.append(call)
        self.events.append(call)

    def _paths(self, name: str, args: tuple[Any, ...], more: dict[str, Any]) -> tuple[str, ...]:
        self._busy = True
        try:
            wanted = args[: 2 if name in ("replace", "rename", "link", "symlink") else 1]
            return tuple(_path(a, more.get("dir_fd")) for a in wanted)
        finally:
            self._busy = False


def _path(given: Any, dir_fd: int | None) -> str:
    if isinstance(given, int):
        return str(Path(f"/proc/self/fd/{given}").readlink())
    # Tens of thousands of calls a second: `Path` would take most of a test's time.
    base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()  # noqa: PTH109, PTH115
    return os.path.join(base, given)  # noqa: PTH118


def _site() -> str:
    frame, found = sys._getframe(1), []
    while frame.f_back is not None:
        if function := _store_function(frame.f_code):
            found.append(f"{function}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


@cache
def _store_function(code: CodeType) -> str:
    """Return a function's file and name; "" if it is not the store's, or only wraps a call."""
    if _PACKAGE not in code.co_filename or code.co_name == "fsync_path":
        return ""
    return f"{Path(code.co_filename).name}:{code.co_name}"


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _active is not None:
        _active.opened(arguments[0], arguments[2])


@contextmanager
def seen(root: Path, before: Callable[[Call], bool] = lambda _: True) -> Iterator[Seam]:
    """Intercept every change below `root` that the store's code makes while the body runs."""
    global _active, _hooked  # noqa: PLW0603  # an audit hook cannot be removed: there is one, for whoever is active
    assert _active is None, "one at a time"
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    real = {name: getattr(os, name) for name in CHANGES}
    seam = Seam(root, before)
    _active = seam
    for name, function in real.items():
        setattr(os, name, seam.wrapped(name, function))
    try:
        yield seam
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        _active = None
