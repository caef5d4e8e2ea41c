"""How much there is suffering for want of memory, in three steps: an idle machine says the same from beat to beat.

Where control groups limit this process (`shoal_common/cgroup.py`) it is what suffers within them that counts.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shoal_common.cgroup import Room

_STALLS = Path("/proc/pressure/memory")
_SOME = re.compile(r"^some avg10=([0-9.]+)", re.MULTILINE)
_STEPS_PERCENT = (1.0, 20.0)
"""Of the last ten seconds, how long something waited for memory."""
_MACOS_LEVELS = {1: 0, 2: 1, 4: 2}


def pressure(rooms: Sequence[Room] = ()) -> int | None:
    """0 none, 1 some, 2 much; None where the system does not say. That of the worst of the limited groups among
    `rooms`, or of the machine where there is none, or none that says it: version 1 of control groups does not."""
    if sys.platform == "darwin":
        return _MACOS_LEVELS.get(_macos_level())
    groups = [_stalls(room.group / "memory.pressure") for room in rooms if room.group is not None]
    steps = [step for step in groups if step is not None]
    return max(steps) if steps else _stalls(_STALLS)


def _stalls(path: Path) -> int | None:
    with suppress(OSError):  # a kernel without PSI, or with it switched off
        return of_stalls(path.read_text())
    return None


def of_stalls(text: str) -> int | None:
    """The step of what Linux says in /proc/pressure/memory."""
    found = _SOME.search(text)
    return sum(float(found.group(1)) >= step for step in _STEPS_PERCENT) if found else None


def _macos_level() -> int:
    """`kern.memorystatus_vm_pressure_level`, 0 when it cannot be read: it is asked for every few seconds, so not by
    starting `sysctl`."""
    level, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    library = ctypes.CDLL(None)
    name = b"kern.memorystatus_vm_pressure_level"
    failed = library.sysctlbyname(name, ctypes.byref(level), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 0 if failed else level.value
