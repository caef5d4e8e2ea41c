"""Memory pressure in three steps, so that an idle machine publishes the same at every beat.

Where control groups limit this process (`shoal_common/host/cgroup.py`), the pressure within them counts.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shoal_common.host.cgroup import MemoryLimit

_STALLS = Path("/proc/pressure/memory")
_SOME = re.compile(r"^some avg10=([0-9]+(?:\.[0-9]+)?)", re.MULTILINE)
_STEPS_PERCENT = (1.0, 20.0)
"""Share of the last ten seconds in which some task waited for memory."""
_MACOS_LEVELS = {1: 0, 2: 1, 4: 2}


def pressure_level(limits: Sequence[MemoryLimit] = ()) -> int | None:
    """Return 0 none, 1 some or 2 much; None where the system does not report it.

    The worst of the control groups among `limits`, or the machine's where no group reports it: version 1 does not.
    """
    if sys.platform == "darwin":
        return _MACOS_LEVELS.get(_macos_level())
    groups = [_stalls(limit.group / "memory.pressure") for limit in limits if limit.group is not None]
    steps = [step for step in groups if step is not None]
    return max(steps) if steps else _stalls(_STALLS)


def _stalls(path: Path) -> int | None:
    with suppress(OSError):  # a kernel without PSI, or with it switched off
        return parse_psi(path.read_text())
    return None


def parse_psi(text: str) -> int | None:
    """Return the pressure step of a Linux PSI file such as /proc/pressure/memory."""
    match = _SOME.search(text)
    return sum(float(match.group(1)) >= step for step in _STEPS_PERCENT) if match else None


def _macos_level() -> int:
    """Return `kern.memorystatus_vm_pressure_level`, or 0 when it cannot be read.

    Read every few seconds, so not by starting `sysctl`.
    """
    level, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    library = ctypes.CDLL(None)
    name = b"kern.memorystatus_vm_pressure_level"
    failed = library.sysctlbyname(name, ctypes.byref(level), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 0 if failed else level.value
