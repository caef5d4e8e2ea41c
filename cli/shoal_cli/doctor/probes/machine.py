"""Memory, and the open files of processes. Blocks for milliseconds."""

from __future__ import annotations

import resource
from collections.abc import Mapping

import psutil

from shoal_cli.doctor.checks.machine import MemoryFacts, OpenFiles
from shoal_cli.doctor.probes.local_node import LocalNode
from shoal_common.host.cgroup import AvailableMemory, tightest
from shoal_common.host.own_process import raise_file_limit
from shoal_common.settings.node import InferenceSettings
from shoal_common.settings.values import read_valid_settings


def memory(local: LocalNode) -> MemoryFacts:
    """Return the memory that a process may have here, and the cap that is set for it."""
    machine, *groups = AvailableMemory().read()
    limit = tightest([machine, *groups])
    settings, errors = read_valid_settings(InferenceSettings, local.settings, local.environ)
    return MemoryFacts(
        total_bytes=limit.total_bytes,
        available_bytes=limit.available_bytes,
        machine_bytes=machine.total_bytes,
        cap_bytes=settings.max_memory_bytes,
        settings_errors=[e.message for e in errors],
    )


def open_files(pids: Mapping[str, int]) -> list[OpenFiles]:
    """Return how many files each process may open and has open; where none can be asked, what a new one may."""
    known = [files for name, pid in sorted(pids.items()) if (files := _of(name, pid)) is not None]
    return known or [OpenFiles("a process started here", raise_file_limit())]


def _of(name: str, pid: int) -> OpenFiles | None:
    try:
        process = psutil.Process(pid)
        if not hasattr(process, "rlimit"):  # macOS does not tell another process's limit
            return None
        return OpenFiles(name, _limit(process.rlimit(psutil.RLIMIT_NOFILE)[0]), process.num_fds())
    except (psutil.Error, OSError):
        return None


def _limit(soft: int) -> int:
    return -1 if soft == resource.RLIM_INFINITY else soft
