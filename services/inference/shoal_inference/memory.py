"""How much memory instances may use on this node."""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from shoal_common.errors import BadInput
from shoal_common.messages.facts import Facts


def read_cap(settings: Mapping[str, object], environ: Mapping[str, str]) -> int | None:
    """`[inference] max_memory_bytes` of node.toml, or SHOAL_MAX_MEMORY_BYTES: bytes, or None for no cap."""
    value = environ.get("SHOAL_MAX_MEMORY_BYTES") or settings.get("max_memory_bytes")
    try:
        return int(str(value)) if value else None
    except ValueError:
        raise BadInput(f"max_memory_bytes {value!r} is not a number of bytes") from None


def memory_facts(cap_bytes: int | None, held_bytes: int) -> Facts:
    """Total and available memory for instances.

    What stages of this node hold already (`held_bytes`) counts as available here: placement knows what it has
    placed and subtracts that itself, once.
    """
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available) + held_bytes
    if cap_bytes is not None:
        total = min(total, cap_bytes)
    # Rounded, so that the liveness value of an idle node stays the same from beat to beat.
    return Facts(memory_total_bytes=total, memory_available_bytes=min(available, total) >> 20 << 20)
