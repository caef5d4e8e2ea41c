"""Choose the volume for each blob of a model (docs/storage.md, "Volumes"). Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

_MAX_SEARCH_STEPS = 2000
"""Steps of the placement search before it counts as impossible. A possible placement is usually found at once."""


class VolumeSpace(msgspec.Struct, frozen=True):
    """A file system that blobs may go to. `volume_id` is "" for the store."""

    volume_id: str
    path: str
    free_bytes: int
    in_flight_bytes: int
    """Bytes reserved there and not allocated yet."""

    def available_bytes(self, headroom_bytes: int) -> int:
        """Return the bytes available for new blobs; negative where others took what was reserved."""
        return self.free_bytes - headroom_bytes - self.in_flight_bytes


def allocate(
    blobs: Mapping[str, int], available_by_volume: Mapping[str, int], fixed: Mapping[str, str]
) -> dict[str, str] | None:
    """Return a volume for every blob (bytes by name), or None if they do not fit.

    `available_by_volume` gives the bytes available on each volume, the store ("") first; `fixed` names the volume of
    blobs that can go to no other. A blob that needs no bytes fits anywhere.
    """
    remaining_by_volume, placement = dict(available_by_volume), dict[str, str]()
    for blob in sorted(blobs.keys() & fixed.keys()):
        placement[blob] = fixed[blob]
        remaining_by_volume[fixed[blob]] = remaining_by_volume.get(fixed[blob], 0) - blobs[blob]
        if blobs[blob] and remaining_by_volume[fixed[blob]] < 0:
            return None
    free = [b for b in sorted(blobs, key=lambda b: (-blobs[b], b)) if b not in fixed]
    total = sum(blobs[b] for b in free)
    for volume_id in sorted(available_by_volume, key=lambda f: (f != "", -remaining_by_volume[f])):
        if total <= max(remaining_by_volume[volume_id], 0):
            return placement | dict.fromkeys(free, volume_id)
    if total > sum(max(free_bytes, 0) for free_bytes in remaining_by_volume.values()):
        return None
    placed = _search([blobs[b] for b in free], {f: remaining_by_volume[f] for f in available_by_volume})
    return placement | dict(zip(free, placed, strict=True)) if placed is not None else None


def shortfall_bytes(
    blobs: Mapping[str, int], available_by_volume: Mapping[str, int], fixed: Mapping[str, str]
) -> int:
    """Return the least that must be freed, on the right volumes, before all blobs fit; 0 if they do."""
    if allocate(blobs, available_by_volume, fixed) is not None:
        return 0
    remaining_by_volume, lacking_bytes = dict(available_by_volume), 0
    for blob in sorted(blobs, key=lambda b: (b not in fixed, -blobs[b], b)):
        volume_id = fixed[blob] if blob in fixed else max(remaining_by_volume, key=lambda f: remaining_by_volume[f])
        remaining_by_volume[volume_id] = remaining_by_volume.get(volume_id, 0) - blobs[blob]
        if blobs[blob] and remaining_by_volume[volume_id] < 0:
            lacking_bytes, remaining_by_volume[volume_id] = lacking_bytes - remaining_by_volume[volume_id], 0
    return max(lacking_bytes, 1)


def _search(sizes: list[int], available_by_volume: Mapping[str, int]) -> list[str] | None:
    """Place the largest blob first, each on the volume with the most free space, backtracking to the next one."""
    remaining_by_volume, placed, choices = dict(available_by_volume), list[str](), list[list[str]]()
    steps_left = _MAX_SEARCH_STEPS + len(sizes)
    while len(placed) < len(sizes):
        size = sizes[len(placed)]
        if len(choices) == len(placed):
            choices.append(_choices(size, remaining_by_volume))
        if choices[-1] and steps_left:
            steps_left -= 1
            placed.append(choices[-1].pop())
            remaining_by_volume[placed[-1]] -= size
        elif placed and steps_left:
            choices.pop()
            volume_id = placed.pop()
            remaining_by_volume[volume_id] += sizes[len(placed)]
        else:
            return None
    return placed


def _choices(size_bytes: int, remaining_by_volume: Mapping[str, int]) -> list[str]:
    """Return the volumes that can take so many bytes, the emptiest last; of volumes with equal space, one."""
    by_free_bytes = {
        free_bytes: volume_id
        for volume_id, free_bytes in remaining_by_volume.items()
        if free_bytes >= size_bytes or not size_bytes
    }
    return [by_free_bytes[free_bytes] for free_bytes in sorted(by_free_bytes)]
