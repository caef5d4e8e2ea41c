"""Memory as a process may have it: the machine's, within the limits of its control groups.

A container, or a systemd unit with MemoryMax=, is a control group; what is over its limit is killed by the kernel. A
process is in one group of each hierarchy (`/proc/self/cgroup`), and a limit of any group above counts as well.
`/proc/self/mountinfo` says where a hierarchy can be seen, and from which group on: in a container those above its own
are often out of sight. Elsewhere than on Linux there are no such files, and no limits.

              limit                            in use                   of files, which can be given back
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

_FIND_S = 60.0
"""Limits come and go (`systemctl set-property`), and processes are moved, but not often."""
_ESCAPED = re.compile(r"\\([0-7]{3})")
_PAGES = re.compile(r"^(\w+) (\d+)$", re.MULTILINE)


class Group(msgspec.Struct, frozen=True):
    """A control group in sight, by its directory."""

    version: Literal[1, 2]
    directory: Path


class Room(msgspec.Struct, frozen=True):
    """Memory, in bytes: all, what can be had, and what can be had without taking it from the cache of files."""

    total_bytes: int
    available_bytes: int
    free_bytes: int
    group: Path | None = None
    """The group that is limited so; None: the machine."""


def groups_of(membership: str, mounts: str) -> list[Group]:
    """The groups of a process that limit its memory, and those above them, as far as they are in sight.

    `membership` is its /proc/<pid>/cgroup, `mounts` its /proc/<pid>/mountinfo.
    """
    found: dict[Group, None] = {}
    paths = _paths(membership)
    for version, root, at in _mounts(mounts):
        for below in _in_sight(paths.get(version, ""), root):
            found[Group(version, at / below)] = None
    return list(found)


def _paths(membership: str) -> dict[Literal[1, 2], str]:
    """Which group a process is in, by hierarchy: lines are `<number>:<controllers>:<path>`, version 2 is number 0."""
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
        place, _, kind = line.partition(" - ")
        where, what = place.split(" "), kind.split(" ")
        if len(where) < 5 or len(what) < 3:
            continue
        root, at = _unescaped(where[3]), Path(_unescaped(where[4]))
        if what[0] == "cgroup2":
            yield 2, root, at
        elif what[0] == "cgroup" and "memory" in what[2].split(","):
            yield 1, root, at


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda m: chr(int(m[1], 8)), text)


def _in_sight(path: str, root: str) -> list[str]:
    """A group and those above it, relative to the group that a mount shows from, the innermost first.

    In a namespace of groups both are relative to its root, and what lies outside begins with `..`.
    """
    names, above = _names(path), _names(root)
    if not path:
        return []
    if names[: len(above)] == above and ".." not in names[len(above) :]:
        below = names[len(above) :]
        return ["/".join(below[:count]) for count in range(len(below), -1, -1)]
    # Groups between are there, but nothing tells their names.
    outside = len(above) > names.count("..") and set(above) == {".."}
    return [""] if outside else []


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name]


_FILES: Mapping[int, tuple[str, ...]] = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
    2: ("memory.max", "memory.high", "memory.current", "memory.stat"),
}
_GIVEN_BACK: Mapping[int, tuple[str, ...]] = {
    1: ("total_inactive_file", "total_active_file"),
    2: ("inactive_file", "active_file", "slab_reclaimable"),
}


def room_of(group: Group, files: Mapping[str, str]) -> Room | None:
    """What a group may have, by the contents of its files; None where it has no limit, or does not say."""
    pages = {name: int(size) for name, size in _PAGES.findall(files.get("memory.stat", ""))}
    limits = [files.get(name, "").strip() for name in ("memory.limit_in_bytes", "memory.max", "memory.high")]
    limits.append(str(pages.get("hierarchical_memory_limit", "")))
    used = (files.get("memory.usage_in_bytes") or files.get("memory.current") or "").strip()
    limit = min((int(text) for text in limits if text.isdecimal()), default=None)
    if limit is None or not used.isdecimal():
        return None
    free = limit - int(used)
    available = free + sum(pages.get(name, 0) for name in _GIVEN_BACK[group.version])
    return Room(limit, _within(available, limit), _within(free, limit), group.directory)


def _within(size_bytes: int, limit_bytes: int) -> int:
    return min(max(size_bytes, 0), limit_bytes)


def least(rooms: Iterable[Room]) -> Room:
    """What a process may have for which all of these hold."""
    held = list(rooms)
    return Room(
        total_bytes=min(r.total_bytes for r in held),
        available_bytes=min(r.available_bytes for r in held),
        free_bytes=min(r.free_bytes for r in held),
    )


class Memory:
    """What this process may have. Which groups are limited is found once a minute; any thread may ask."""

    def __init__(self, process: Path = Path("/proc/self"), now_s: Callable[[], float] = monotonic) -> None:
        self._process, self._now_s = process, now_s
        self._limited: list[Group] = []
        self._find_at_s = float("-inf")

    def look(self) -> list[Room]:
        """The machine, and each group with a limit that is less. Reads small files; call it in a thread."""
        memory = psutil.virtual_memory()
        machine = Room(int(memory.total), int(memory.available), int(memory.free))
        if self._now_s() < self._find_at_s:
            rooms = [_read(group) for group in self._limited]
            if None not in rooms:
                return [machine, *(room for room in rooms if room is not None)]
        try:
            found = groups_of(*((self._process / name).read_text() for name in ("cgroup", "mountinfo")))
        except OSError:
            found = []
        # What says that there is no limit is a number too in version 1, more than any machine has.
        limited = {g: r for g in found if (r := _read(g)) is not None and r.total_bytes < machine.total_bytes}
        self._limited, self._find_at_s = list(limited), self._now_s() + _FIND_S
        return [machine, *limited.values()]


def _read(group: Group) -> Room | None:
    files = {}
    for name in _FILES[group.version]:
        try:
            files[name] = (group.directory / name).read_text()
        except OSError:  # the root of version 2 has none; a group may go at any time
            continue
    return room_of(group, files)
