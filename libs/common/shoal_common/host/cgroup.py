"""Memory available to this process: the machine's, within the limits of its control groups.

A container, or a systemd unit with MemoryMax=, is a control group; the kernel kills what exceeds its limit. A process
is in one group of each hierarchy (`/proc/self/cgroup`), and the limits of all groups above apply too.
`/proc/self/mountinfo` says where a hierarchy is mounted, and from which group down: in a container the groups above
its own are often invisible. Only Linux has these files; elsewhere there are no limits.

              limit                            in use                   file cache, reclaimable
    v1        memory.limit_in_bytes, and in    memory.usage_in_bytes    total_inactive_file, total_active_file
              memory.stat that of all above
    v2        memory.max, memory.high          memory.current           inactive_file, active_file, slab_reclaimable
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import monotonic
from typing import Literal

import msgspec
import psutil

_RESCAN_INTERVAL_S = 60.0
"""Limits change (`systemctl set-property`) and processes are moved, but not often."""
_ESCAPED = re.compile(r"\\([0-7]{3})")
_PAGES = re.compile(r"^(\w+) (\d+)$", re.MULTILINE)


class ControlGroup(msgspec.Struct, frozen=True):
    """A visible control group."""

    version: Literal[1, 2]
    directory: Path


class MemoryLimit(msgspec.Struct, frozen=True):
    """Memory in bytes: total, available, and available without reclaiming file cache."""

    total_bytes: int
    available_bytes: int
    free_bytes: int
    group: Path | None = None
    """The group with this limit; None for the machine."""


def groups_of(membership: str, mounts: str) -> list[ControlGroup]:
    """Return the visible groups that limit a process's memory, innermost first in each hierarchy.

    `membership` is /proc/<pid>/cgroup, `mounts` is /proc/<pid>/mountinfo.
    """
    groups: dict[ControlGroup, None] = {}
    paths = _paths(membership)
    for version, root, mount_point in _mounts(mounts):
        for name in _visible_groups(paths.get(version, ""), root):
            groups[ControlGroup(version, mount_point / name)] = None
    return list(groups)


def _paths(membership: str) -> dict[Literal[1, 2], str]:
    """Return a process's group by hierarchy: lines are `<number>:<controllers>:<path>`, version 2 is number 0."""
    paths: dict[Literal[1, 2], str] = {}
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            paths[1] = path
        elif number == "0" and not controllers:
            paths[2] = path
    return paths


def _mounts(mounts: str) -> Iterable[tuple[Literal[1, 2], str, Path]]:
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields, options = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(options) < 3:
            continue
        root, mount_point = _unescaped(fields[3]), Path(_unescaped(fields[4]))
        if options[0] == "cgroup2":
            yield 2, root, mount_point
        elif options[0] == "cgroup" and "memory" in options[2].split(","):
            yield 1, root, mount_point


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda m: chr(int(m[1], 8)), text)


def _visible_groups(path: str, root: str) -> list[str]:
    """Return a group and those above it, relative to the group that a mount shows, innermost first.

    In a cgroup namespace both are relative to its root, and groups outside begin with `..`.
    """
    names, above = _names(path), _names(root)
    if not path:
        return []
    if names[: len(above)] == above and ".." not in names[len(above) :]:
        below = names[len(above) :]
        return ["/".join(below[:count]) for count in range(len(below), -1, -1)]
    # There are groups in between, but their names are unknown.
    outside = len(above) > names.count("..") and set(above) == {".."}
    return [""] if outside else []


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name]


_FILES: Mapping[int, tuple[str, ...]] = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
    2: ("memory.max", "memory.high", "memory.current", "memory.stat"),
}
_RECLAIMABLE: Mapping[int, tuple[str, ...]] = {
    1: ("total_inactive_file", "total_active_file"),
    2: ("inactive_file", "active_file", "slab_reclaimable"),
}


def memory_limit_of(group: ControlGroup, files: Mapping[str, str]) -> MemoryLimit | None:
    """Return a group's memory by the contents of its files; None if it has no limit or does not say."""
    pages = {name: int(size) for name, size in _PAGES.findall(files.get("memory.stat", ""))}
    limits = [files.get(name, "").strip() for name in ("memory.limit_in_bytes", "memory.max", "memory.high")]
    limits.append(str(pages.get("hierarchical_memory_limit", "")))
    used = (files.get("memory.usage_in_bytes") or files.get("memory.current") or "").strip()
    limit = min((int(text) for text in limits if text.isdecimal()), default=None)
    if limit is None or not used.isdecimal():
        return None
    free = limit - int(used)
    available = free + sum(pages.get(name, 0) for name in _RECLAIMABLE[group.version])
    return MemoryLimit(limit, _clamp(available, limit), _clamp(free, limit), group.directory)


def _clamp(size_bytes: int, limit_bytes: int) -> int:
    return min(max(size_bytes, 0), limit_bytes)


def tightest(memory_limits: Iterable[MemoryLimit]) -> MemoryLimit:
    """Return the memory available under all of these limits."""
    limits = list(memory_limits)
    return MemoryLimit(
        total_bytes=min(r.total_bytes for r in limits),
        available_bytes=min(r.available_bytes for r in limits),
        free_bytes=min(r.free_bytes for r in limits),
    )


class AvailableMemory:
    """Memory available to this process. Limited groups are searched once a minute; thread-safe."""

    def __init__(self, process: Path = Path("/proc/self"), now_s: Callable[[], float] = monotonic) -> None:
        self._process, self._now_s = process, now_s
        self._limited: list[ControlGroup] = []
        self._find_at_s = float("-inf")

    def read(self) -> list[MemoryLimit]:
        """Return the memory of the machine and of each group with a lower limit. Blocks: reads small files."""
        memory = psutil.virtual_memory()
        machine = MemoryLimit(int(memory.total), int(memory.available), int(memory.free))
        if self._now_s() < self._find_at_s:
            limits = [_read(group) for group in self._limited]
            if None not in limits:
                return [machine, *(limit for limit in limits if limit is not None)]
        try:
            groups = groups_of(*((self._process / name).read_text() for name in ("cgroup", "mountinfo")))
        except OSError:
            groups = []
        # Version 1 writes "no limit" as a number larger than any machine's memory.
        limited = {g: r for g in groups if (r := _read(g)) is not None and r.total_bytes < machine.total_bytes}
        self._limited, self._find_at_s = list(limited), self._now_s() + _RESCAN_INTERVAL_S
        return [machine, *limited.values()]


def _read(group: ControlGroup) -> MemoryLimit | None:
    files = {}
    for name in _FILES[group.version]:
        try:
            files[name] = (group.directory / name).read_text()
        except OSError:  # version 2's root group has no such files, and a group may vanish at any time
            continue
    return memory_limit_of(group, files)
