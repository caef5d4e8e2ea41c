"""When stages that a person forced onto a node have to give way, so that the machine itself does not starve."""

from __future__ import annotations

from shoal_common.errors import NoRoom
from shoal_common.messages.facts import Facts

LOOK_S = 0.5
_FLOOR_SHARE = 50
_LEAST_FLOOR_BYTES = 256 << 20
_MUCH_PRESSURE = 2


def why_starving(facts: Facts, floor_bytes: int | None) -> NoRoom | None:
    """The error with which forced stages end; None while all is well.

    They end when less is available than the floor (a fiftieth of the memory, 256 MiB at least, unless given), or when
    the system says that everything suffers for want of memory.
    """
    floor = floor_bytes or max(facts.memory_total_bytes // _FLOOR_SHARE, _LEAST_FLOOR_BYTES)
    pressed = facts.memory_pressure is not None and facts.memory_pressure >= _MUCH_PRESSURE
    if facts.memory_available_bytes >= floor and not pressed:
        return None
    words = "the system was short of it" if pressed else f"{facts.memory_available_bytes / 1e6:.0f} MB were left"
    return NoRoom(
        f"the instance was forced onto this node and has been stopped before the machine ran out of memory: {words}; "
        "stop it with `shoal stop`, free memory or add a node, and place it again",
        available_bytes=facts.memory_available_bytes,
        floor_bytes=floor,
    )
