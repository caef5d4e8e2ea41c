"""How much memory instances may use on this node, and what its stages occupy of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from msgspec import structs

from shoal_common.cgroup import Room, least
from shoal_common.errors import BadInput
from shoal_common.messages.facts import Facts
from shoal_inference.pressure import pressure
from shoal_inference.stage.device import Device

_MIB = 1 << 20
_STEP_BYTES = 64 * _MIB
_STEP_SHARE = 100
_OWN_PAGES = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)


def read_bytes(name: str, settings: Mapping[str, object], environ: Mapping[str, str]) -> int | None:
    """A setting of `[inference]` of node.toml, or SHOAL_ and its name: bytes, or None where it is not set.

    `max_memory_bytes` is the cap, `force_floor_bytes` what forced stages have to leave. Raises BadInput.
    """
    value = environ.get(f"SHOAL_{name.upper()}") or settings.get(name)
    try:
        return int(str(value)) if value else None
    except ValueError:
        raise BadInput(f"{name} {value!r} is not a number of bytes") from None


def occupied_bytes(pid: int) -> int:
    """What a process holds that the machine would have again without it; 0 when it has ended.

    On Linux without the pages of files, which count as available while they are mapped.
    """
    try:
        return sum(int(kib) << 10 for kib in _OWN_PAGES.findall(Path(f"/proc/{pid}/status").read_text()))
    except OSError:
        with suppress(psutil.Error):
            return int(psutil.Process(pid).memory_info().rss)
    return 0


def memory_facts(rooms: Sequence[Room], cap_bytes: int | None, stages: Mapping[str, int], device: Device) -> Facts:
    """What this process may have (`Memory.look`), less where a cap says so, and what `stages` (bytes by
    `<instance>/<rank>`) occupy."""
    room = least(rooms)
    total, available = room.total_bytes, room.available_bytes
    reclaimable = max(available - room.free_bytes, 0)
    if cap_bytes is not None:
        total = min(total, cap_bytes)
        available = min(available, max(total - sum(stages.values()), 0))
    return Facts(
        memory_total_bytes=total,
        memory_available_bytes=available // _MIB * _MIB,
        memory_reclaimable_bytes=min(reclaimable, available) // _MIB * _MIB,
        stages={name: size // _MIB * _MIB for name, size in sorted(stages.items())},
        memory_pressure=pressure(rooms),
        accelerator=device.accelerator,
        accelerator_bytes=device.limit_bytes,
        memory_bytes_per_s=device.bytes_per_s,
    )


def steady(said: Facts, now: Facts) -> Facts:
    """What to say now: what was said before, unless something differs from it by more than machines waver.

    So an idle machine says the same from beat to beat. What is available and what stages occupy are always of one
    look: when one of them changes by a step, all are said anew. A step is a hundredth of the memory, 64 MiB at least.
    """
    step = max(now.memory_total_bytes // _STEP_SHARE, _STEP_BYTES)
    same = structs.replace(
        now,
        memory_available_bytes=said.memory_available_bytes,
        memory_reclaimable_bytes=said.memory_reclaimable_bytes,
        stages=said.stages,
        addresses=said.addresses,
        links=said.links,
    )
    wavered = [
        abs(now.memory_available_bytes - said.memory_available_bytes),
        abs(now.memory_reclaimable_bytes - said.memory_reclaimable_bytes),
        *(abs(size - said.stages.get(name, 0)) for name, size in now.stages.items()),
    ]
    unchanged = same == said and now.stages.keys() == said.stages.keys() and max(wavered) <= step
    return said if unchanged else now
