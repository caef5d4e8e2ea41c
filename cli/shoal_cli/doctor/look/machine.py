"""Memory, and the open files of processes. Blocks for milliseconds."""

from __future__ import annotations

import resource
from collections.abc import Mapping

import psutil

from shoal_cli.doctor.look.here import Here
from shoal_cli.doctor.machine import MemoryFacts, Opened
from shoal_common.cgroup import Memory, least


def memory(here: Here) -> MemoryFacts:
    """The memory that a process may have here, and what is set for it."""
    machine, *groups = Memory().look()
    room = least([machine, *groups])
    section = here.settings.get("inference", {})
    value = here.environ.get("SHOAL_MAX_MEMORY_BYTES")
    if not value and isinstance(section, dict):
        value = section.get("max_memory_bytes")
    text = str(value) if value else ""
    wrong = bool(text) and not text.isdecimal()
    return MemoryFacts(
        total_bytes=room.total_bytes,
        available_bytes=room.available_bytes,
        machine_bytes=machine.total_bytes,
        cap_bytes=int(text) if text and not wrong else None,
        cap_error=f"max_memory_bytes {value!r} is not a number of bytes" if wrong else "",
    )


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
