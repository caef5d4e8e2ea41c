"""Measure the memory that instances may use on this node, and what its stages occupy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from msgspec import structs

from shoal_common.host.cgroup import MemoryLimit, tightest
from shoal_common.messages.liveness import NodeFacts
from shoal_inference.host_facts.memory_pressure import pressure_level
from shoal_inference.stage.compute.device import Device

_MIB = 1 << 20
_STEP_BYTES = 64 * _MIB
_STEP_SHARE = 100
_OWN_PAGES = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)


def occupied_bytes(pid: int) -> int:
    """Return the bytes that the end of a process would free; 0 when it has ended.

    On Linux file pages are left out: they count as available while they are mapped.
    """
    try:
        return sum(int(kib) << 10 for kib in _OWN_PAGES.findall(Path(f"/proc/{pid}/status").read_text()))
    except OSError:
        with suppress(psutil.Error):
            return int(psutil.Process(pid).memory_info().rss)
    return 0


def memory_facts(
    limits: Sequence[MemoryLimit], cap_bytes: int | None, stages: Mapping[str, int], device: Device
) -> NodeFacts:
    """Return the facts from this process's limits (`AvailableMemory.read`), the cap, and what `stages` (bytes by
    `<instance>/<rank>`) occupy."""
    limit = tightest(limits)
    total, available = limit.total_bytes, limit.available_bytes
    reclaimable = max(available - limit.free_bytes, 0)
    if cap_bytes is not None:
        total = min(total, cap_bytes)
        available = min(available, max(total - sum(stages.values()), 0))
    return NodeFacts(
        memory_total_bytes=total,
        memory_available_bytes=available // _MIB * _MIB,
        memory_reclaimable_bytes=min(reclaimable, available) // _MIB * _MIB,
        stages={name: size // _MIB * _MIB for name, size in sorted(stages.items())},
        memory_pressure=pressure_level(limits),
        accelerator=device.accelerator,
        accelerator_bytes=device.limit_bytes,
        idle_bandwidth_bytes_per_s=device.bytes_per_s,
    )


def debounce_facts(published: NodeFacts, now: NodeFacts) -> NodeFacts:
    """Return what to publish: `published`, unless something differs from it by more than normal fluctuation.

    So an idle machine publishes the same at every beat. Available and occupied memory always come from one sample:
    when one of them changes by a step, all are replaced. A step is a hundredth of the memory, at least 64 MiB.
    """
    step = max(now.memory_total_bytes // _STEP_SHARE, _STEP_BYTES)
    same = structs.replace(
        now,
        memory_available_bytes=published.memory_available_bytes,
        memory_reclaimable_bytes=published.memory_reclaimable_bytes,
        stages=published.stages,
        addresses=published.addresses,
        links=published.links,
    )
    changes = [
        abs(now.memory_available_bytes - published.memory_available_bytes),
        abs(now.memory_reclaimable_bytes - published.memory_reclaimable_bytes),
        *(abs(size - published.stages.get(name, 0)) for name, size in now.stages.items()),
    ]
    unchanged = same == published and now.stages.keys() == published.stages.keys() and max(changes) <= step
    return published if unchanged else now
