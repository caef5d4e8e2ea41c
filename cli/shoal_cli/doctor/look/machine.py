"""Memory, and the open files of processes. Blocks for milliseconds."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path

import psutil

from shoal_cli.doctor.look.here import Here
from shoal_cli.doctor.machine import MemoryFacts, Opened

_CONTROL_GROUP = Path("/sys/fs/cgroup")


def memory(here: Here) -> MemoryFacts:
    """The machine's memory and what is set for it."""
    found = psutil.virtual_memory()
    section = here.settings.get("inference", {})
    value = here.environ.get("SHOAL_MAX_MEMORY_BYTES")
    if not value and isinstance(section, dict):
        value = section.get("max_memory_bytes")
    text = str(value) if value else ""
    wrong = bool(text) and not text.isdecimal()
    return MemoryFacts(
        total_bytes=int(found.total),
        available_bytes=int(found.available),
        cap_bytes=int(text) if text and not wrong else None,
        cap_error=f"max_memory_bytes {value!r} is not a number of bytes" if wrong else "",
        container_bytes=_container_bytes(),
    )


def _container_bytes() -> int | None:
    """The limit of this process's control group: what a container may have, seen from within."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (_CONTROL_GROUP / name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            return int(text)
    return None


def opened(pids: Mapping[str, int]) -> list[Opened]:
    """How many files each process may open and has open; where none can be asked, what this one may."""
    found = [o for name, pid in sorted(pids.items()) if (o := _of(name, pid)) is not None]
    return found or [Opened("a process started here", _limit(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))]


def _of(name: str, pid: int) -> Opened | None:
    try:
        process = psutil.Process(pid)
        if not hasattr(process, "rlimit"):  # macOS tells a process's limit to nobody else
            return None
        return Opened(name, _limit(process.rlimit(psutil.RLIMIT_NOFILE)[0]), process.num_fds())
    except (psutil.Error, OSError):
        return None


def _limit(soft: int) -> int:
    return -1 if soft == resource.RLIM_INFINITY else soft
