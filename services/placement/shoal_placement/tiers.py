"""How much of a node's memory a placement may take: what is free, what could be freed, what there is. Pure.

    fits    what is available, less what placed stages were promised and do not occupy yet
    tight   all of the memory but a reserve for the system, less what is promised: other programs have to give way
    force   all that the accelerator, or else the machine, has, less what is promised: a person insists

Each is at least the one before. Where the accelerator has a limit of its own, none passes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from shoal_common.messages.facts import Facts

Tier = Literal["fits", "tight", "force"]
_RESERVE_SHARE = 10
_MOST_RESERVE_BYTES = 4 << 30


class Tiers(msgspec.Struct, frozen=True):
    """Bytes that one more stage may take on a node; negative where too much is promised already."""

    fits_bytes: int
    tight_bytes: int
    force_bytes: int

    def of(self, tier: Tier) -> int:
        """The bytes of one of them."""
        return {"fits": self.fits_bytes, "tight": self.tight_bytes, "force": self.force_bytes}[tier]


def reserve_bytes(total_bytes: int) -> int:
    """What is left to the system of a machine with this much: a tenth, at most 4 GiB."""
    return min(total_bytes // _RESERVE_SHARE, _MOST_RESERVE_BYTES)


def tiers(facts: Facts, promised: Mapping[str, int]) -> Tiers:
    """What a node has for one more stage. `promised`: bytes of the stages placed there, by `need.stage_key`.

    What a stage occupies already is missing from what is available; what it does not yet is still to come.
    """
    occupied = facts.stages
    to_come = sum(max(own - occupied.get(key, 0), 0) for key, own in promised.items())
    taken = sum(max(promised.get(key, 0), occupied.get(key, 0)) for key in promised.keys() | occupied.keys())
    total = facts.memory_total_bytes
    limit = total if facts.accelerator_bytes is None else min(total, facts.accelerator_bytes)
    force = limit - taken
    fits = min(facts.memory_available_bytes - to_come, force)
    tight = max(fits, min(total - reserve_bytes(total), limit) - taken)
    return Tiers(fits, tight, force)


def tier_of(needed_bytes: int, room: Tiers) -> Tier | None:
    """The first tier that gives this much; None: there is not so much."""
    order: tuple[Tier, ...] = ("fits", "tight", "force")
    return next((tier for tier in order if needed_bytes <= room.of(tier)), None)
