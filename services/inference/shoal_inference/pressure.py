"""How much this machine suffers for want of memory, in three steps: an idle one says the same from beat to beat."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

_STALLS = Path("/proc/pressure/memory")
_SOME = re.compile(r"^some avg10=([0-9.]+)", re.MULTILINE)
_STEPS_PERCENT = (1.0, 20.0)
"""Of the last ten seconds, how long something waited for memory."""
_MACOS_LEVELS = {1: 0, 2: 1, 4: 2}


def pressure() -> int | None:
    """0 none, 1 some, 2 much; None where the system does not say."""
    if sys.platform == "darwin":
        return _MACOS_LEVELS.get(_macos_level())
    try:
        return of_stalls(_STALLS.read_text())
    except OSError:  # a kernel without PSI, or with it switched off
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
