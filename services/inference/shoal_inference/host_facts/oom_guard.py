"""Decide when stages that were forced onto a node are killed, before the machine runs out of memory."""

from __future__ import annotations

from shoal_common.errors import NoMemory
from shoal_common.messages.liveness import NodeFacts

CHECK_INTERVAL_S = 0.5
_FLOOR_FRACTION = 50
_MIN_FLOOR_BYTES = 256 << 20
_HIGH_PRESSURE = 2


def oom_reason(facts: NodeFacts, floor_bytes: int | None) -> NoMemory | None:
    """Return the error with which forced stages end; None while there is enough memory.

    They end when less is available than the floor (unless given, a fiftieth of the memory, at least 256 MiB), or when
    the system reports high memory pressure.
    """
    floor = floor_bytes or max(facts.memory_total_bytes // _FLOOR_FRACTION, _MIN_FLOOR_BYTES)
    under_pressure = facts.memory_pressure is not None and facts.memory_pressure >= _HIGH_PRESSURE
    if facts.memory_available_bytes >= floor and not under_pressure:
        return None
    cause = (
        "the system reports high memory pressure"
        if under_pressure
        else f"{facts.memory_available_bytes / 1e6:.0f} MB were left, {floor / 1e6:.0f} MB must stay free"
    )
    return NoMemory(
        f"the instance was forced onto this node and was stopped before the machine ran out of memory: {cause}; "
        "stop it with `shoal stop`, free memory or add a node, then run it again",
        available_bytes=facts.memory_available_bytes,
        floor_bytes=floor,
    )
