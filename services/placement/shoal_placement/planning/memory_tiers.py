"""How much of a node's memory a placement may take: what is free, what could be freed, all there is. Pure.

    fits    the available memory, less what placed stages have reserved and do not occupy yet
    tight   all memory but a reserve for the system, less the reservations: other programs have to free memory
    force   all memory of the accelerator, or else of the machine, less the reservations: only if a person insists

Each tier is at least as large as the one before. No tier exceeds the accelerator's own limit, if it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from shoal_common.messages.liveness import NodeFacts

Tier = Literal["fits", "tight", "force"]
_RESERVE_SHARE = 10
_MAX_RESERVE_BYTES = 4 << 30


class MemoryTiers(msgspec.Struct, frozen=True):
    """Bytes that one more stage may take on a node, by tier; negative if too much is reserved already."""

    fits_bytes: int
    tight_bytes: int
    force_bytes: int

    def of(self, tier: Tier) -> int:
        """Return the bytes of a tier."""
        return {"fits": self.fits_bytes, "tight": self.tight_bytes, "force": self.force_bytes}[tier]


def system_reserve_bytes(total_bytes: int) -> int:
    """Return the memory left to the system on a machine with this much: a tenth, at most 4 GiB."""
    return min(total_bytes // _RESERVE_SHARE, _MAX_RESERVE_BYTES)


def memory_tiers(facts: NodeFacts, reserved: Mapping[str, int]) -> MemoryTiers:
    """Return the budget of a node for one more stage. `reserved`: bytes of the stages placed there, by `stage_key`.

    What a stage occupies is already missing from the available memory; the rest of its reservation is subtracted.
    """
    occupied = facts.stages
    unoccupied = sum(max(size - occupied.get(key, 0), 0) for key, size in reserved.items())
    taken = sum(max(reserved.get(key, 0), occupied.get(key, 0)) for key in reserved.keys() | occupied.keys())
    total = facts.memory_total_bytes
    limit = total if facts.accelerator_bytes is None else min(total, facts.accelerator_bytes)
    force = limit - taken
    fits = min(facts.memory_available_bytes - unoccupied, force)
    tight = max(fits, min(total - system_reserve_bytes(total), limit) - taken)
    return MemoryTiers(fits, tight, force)


def tier_of(needed_bytes: int, budget: MemoryTiers) -> Tier | None:
    """Return the first tier with this many bytes; None if there is none."""
    order: tuple[Tier, ...] = ("fits", "tight", "force")
    return next((tier for tier in order if needed_bytes <= budget.of(tier)), None)
