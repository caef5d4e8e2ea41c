"""On which root each blob of a model is to come (docs/storage.md, "Further roots"). Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

_STEPS_AT_MOST = 2000
"""Of the search for a way to place blobs, before it counts as impossible. One that is possible is mostly found at
once."""


class Space(msgspec.Struct, frozen=True):
    """A file system that blobs may come to. `further` is the id of a further root, "" for the store."""

    further: str
    path: str
    free_bytes: int
    in_flight_bytes: int
    """Promised there, and not allocated yet."""

    def to_give(self, headroom_bytes: int) -> int:
        """What it has for new blobs; less than nothing where others have taken what was promised."""
        return self.free_bytes - headroom_bytes - self.in_flight_bytes


def spread(blobs: Mapping[str, int], rooms: Mapping[str, int], fixed: Mapping[str, str]) -> dict[str, str] | None:
    """A root for every blob (bytes by name), or None when there is no way.

    `rooms` are bytes that each root has to give, the store's ("") first; `fixed` names the root of blobs that can be
    in no other. What needs no bytes is taken anywhere.
    """
    left, found = dict(rooms), dict[str, str]()
    for blob in sorted(blobs.keys() & fixed.keys()):
        found[blob] = fixed[blob]
        left[fixed[blob]] = left.get(fixed[blob], 0) - blobs[blob]
        if blobs[blob] and left[fixed[blob]] < 0:
            return None
    free = [b for b in sorted(blobs, key=lambda b: (-blobs[b], b)) if b not in fixed]
    total = sum(blobs[b] for b in free)
    for further in sorted(rooms, key=lambda f: (f != "", -left[f])):
        if total <= max(left[further], 0):
            return found | dict.fromkeys(free, further)
    if total > sum(max(room, 0) for room in left.values()):
        return None
    placed = _search([blobs[b] for b in free], {f: left[f] for f in rooms})
    return found | dict(zip(free, placed, strict=True)) if placed is not None else None


def lacking_bytes(blobs: Mapping[str, int], rooms: Mapping[str, int], fixed: Mapping[str, str]) -> int:
    """What has to be freed at the least, on the right roots, before all blobs have their place; 0 if they have."""
    if spread(blobs, rooms, fixed) is not None:
        return 0
    left, lacking = dict(rooms), 0
    for blob in sorted(blobs, key=lambda b: (b not in fixed, -blobs[b], b)):
        at = fixed[blob] if blob in fixed else max(left, key=lambda f: left[f])
        left[at] = left.get(at, 0) - blobs[blob]
        if blobs[blob] and left[at] < 0:
            lacking, left[at] = lacking - left[at], 0
    return max(lacking, 1)


def _search(sizes: list[int], rooms: Mapping[str, int]) -> list[str] | None:
    """A root for each size: largest first, each to where most room is; where that leads nowhere, to the next."""
    left, placed, choices = dict(rooms), list[str](), list[list[str]]()
    steps_left = _STEPS_AT_MOST + len(sizes)
    while len(placed) < len(sizes):
        size = sizes[len(placed)]
        if len(choices) == len(placed):
            choices.append(_choices(size, left))
        if choices[-1] and steps_left:
            steps_left -= 1
            placed.append(choices[-1].pop())
            left[placed[-1]] -= size
        elif placed and steps_left:
            choices.pop()
            back = placed.pop()
            left[back] += sizes[len(placed)]
        else:
            return None
    return placed


def _choices(size_bytes: int, left: Mapping[str, int]) -> list[str]:
    """Roots that can take so much, the one with most room last; of those with as much room as another, one."""
    by_room = {room: further for further, room in left.items() if room >= size_bytes or not size_bytes}
    return [by_room[room] for room in sorted(by_room)]
