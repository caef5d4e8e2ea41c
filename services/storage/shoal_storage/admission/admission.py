"""Admission: whether bytes may come in, by quota and free space (I3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from shoal_common.errors import BadInput, QuotaExceeded
from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId
from shoal_common.settings.node import StorageSettings
from shoal_common.store import leaf_set
from shoal_common.units import format_bytes
from shoal_storage.admission.allocator import VolumeSpace, allocate, shortfall_bytes
from shoal_storage.ledger.ledger import Ledger


class Shortfall(msgspec.Struct, frozen=True):
    """Bytes that must be freed before new ones fit: for the quota, and for the disk."""

    quota_bytes: int
    disk_bytes: int

    @property
    def required_bytes(self) -> int:
        """Bytes to free to meet both."""
        return max(self.quota_bytes, self.disk_bytes)


class Admission(msgspec.Struct, frozen=True):
    """An approval: which blobs are present, and which are missing (new or already arriving)."""

    present: list[str]
    missing: list[str]
    needed_bytes: int
    volume_by_blob: dict[str, str] = {}
    """The volume ("" for the store) of each missing blob."""


class SpaceDemand(msgspec.Struct, frozen=True):
    """What new blobs need of quota and disks, in bytes by blob. `fixed`: blobs that can go to one volume only."""

    blobs: Mapping[str, int]
    """Disk bytes that each needs: less than its size where good leaves of it are in quarantine."""
    volume_of_fixed: Mapping[str, str]
    needed_bytes: int
    """Bytes needed of the quota."""

    def shortfall(self, ledger: Ledger, settings: StorageSettings, spaces: Sequence[VolumeSpace]) -> Shortfall:
        """Return what must be freed before they fit. A demand of nothing lacks nothing, however full the disk is."""
        if self.needed_bytes <= 0:
            return Shortfall(0, 0)
        disk_shortfall_bytes = shortfall_bytes(
            self.blobs, available_by_volume(spaces, settings), self.volume_of_fixed
        )
        return Shortfall(_over_quota(self.needed_bytes, ledger, settings), disk_shortfall_bytes)

    def met_after_freeing(
        self, ledger: Ledger, settings: StorageSettings, spaces: Sequence[VolumeSpace]
    ) -> Callable[[Mapping[str, int]], bool]:
        """Return a predicate: whether they fit once so many bytes are freed, by volume."""
        quota, capacity = _over_quota(self.needed_bytes, ledger, settings), available_by_volume(spaces, settings)

        def met(freed: Mapping[str, int]) -> bool:
            if self.needed_bytes <= 0:
                return True
            after = {volume_id: free_bytes + freed.get(volume_id, 0) for volume_id, free_bytes in capacity.items()}
            return sum(freed.values()) >= quota and allocate(self.blobs, after, self.volume_of_fixed) is not None

        return met


def _over_quota(needed_bytes: int, ledger: Ledger, settings: StorageSettings) -> int:
    if settings.quota_bytes is None:
        return 0
    return max(needed_bytes - (settings.quota_bytes - ledger.used_bytes - ledger.reserved_bytes), 0)


def requested_leaves(
    manifest: Manifest, requested_ranges: Mapping[str, Iterable[Sequence[int]]], ledger: Ledger
) -> dict[str, int]:
    """Return the requested leaves by blob, for blobs not requested whole; the model's shard's own leaves included.

    Raises BadInput for blobs and leaves that are not the manifest's.
    """
    sizes, part = manifest.blob_sizes, ledger.shards.get(manifest.model)
    leaves_by_blob: dict[str, int] = {}
    for blob, ranges in requested_ranges.items():
        if blob not in sizes:
            raise BadInput(f"the request names leaves of {blob[:80]!r}, which is not a blob of {manifest.model}")
        leaves_by_blob[blob] = leaf_set.from_ranges(ranges, sizes[blob])
        if part is not None and blob in part.leaves:
            leaves_by_blob[blob] |= part.leaves[blob]
    return leaves_by_blob


def leaves_to_reserve(model: ModelId, requested: Mapping[str, int], ledger: Ledger) -> dict[str, int]:
    """Return the leaves to reserve by blob. Blobs that are not in the result are reserved whole."""
    result = dict(requested)
    for blob in requested:
        partial = ledger.arrivals.partials.get(blob)
        arrives_whole = partial is not None and model in partial.models and model not in partial.leaves_by_model
        if arrives_whole and model not in ledger.arrivals.ended_reservations:
            del result[blob]  # another download of the model fetches all of it
        elif partial is None and requested[blob] and blob in ledger.repairable:
            del result[blob]  # it comes back from quarantine with its own good leaves, which may be others
    return result


def available_by_volume(spaces: Iterable[VolumeSpace], settings: StorageSettings) -> dict[str, int]:
    """Return the bytes each volume can take, the store first."""
    return {s.volume_id: s.available_bytes(settings.headroom_bytes) for s in spaces}


def store_space(ledger: Ledger, free_bytes: int) -> VolumeSpace:
    """Return the free space of a store without volumes."""
    return VolumeSpace("", "the store", free_bytes, ledger.arrivals.in_flight_by_volume[""])


def space_demand(manifest: Manifest, ledger: Ledger, leaves: Mapping[str, int] | None = None) -> SpaceDemand:
    """Return what a manifest's missing blobs need; `leaves` names those needed in part."""
    wanted_leaves = leaves or {}
    sizes = {
        b: size
        for b, size in manifest.blob_sizes.items()
        if ledger.blob_size(b) != size and wanted_leaves.get(b) != 0
    }
    needed_by_blob = {
        b: ledger.arrivals.needed_bytes(b, size, manifest.model, wanted_leaves.get(b)) for b, size in sizes.items()
    }
    quarantined = {
        b: ledger.repairable[b] for b in sizes if b in ledger.repairable and b not in ledger.arrivals.partials
    }
    fixed_blobs = {*ledger.arrivals.partials, *ledger.unverified, *quarantined}
    return SpaceDemand(
        blobs={b: max(n - quarantined.get(b, 0), 0) for b, n in needed_by_blob.items()},
        volume_of_fixed={b: ledger.volume_by_blob.get(b, "") for b in sizes if b in fixed_blobs},
        needed_bytes=sum(needed_by_blob.values()),
    )


def admit(
    manifest: Manifest,
    ledger: Ledger,
    settings: StorageSettings,
    free_bytes: int,
    spaces: Sequence[VolumeSpace] = (),
    leaves: Mapping[str, int] | None = None,
) -> Admission:
    """Approve a manifest's missing blobs, of some only `leaves`. Raises QuotaExceeded with the figures (I3).

    The needed bytes are the distinct bytes neither present nor reserved. They must fit the quota beside all that is
    present and reserved, and each blob must fit its disk beside the headroom and all that is still to be written
    there. `free_bytes` is the store's; `spaces`, where there are volumes, lists all, the store first. A blob whose
    size changed on disk is missing: a new one replaces it. Raises BadInput for a size that contradicts an existing
    reservation.
    """
    leaves = leaves or {}
    sizes = {b: size for b, size in manifest.blob_sizes.items() if leaves.get(b) != 0}
    spaces = spaces or [store_space(ledger, free_bytes)]
    present = [b for b in sizes if ledger.blob_size(b) == sizes[b]]
    missing = [b for b in sizes if ledger.blob_size(b) != sizes[b]]
    for blob in missing:
        partial = ledger.arrivals.partials.get(blob)
        if partial is not None and partial.size_bytes != sizes[blob]:
            raise BadInput(
                f"{manifest.model} gives blob {blob[:16]}… {sizes[blob]} bytes, but another download reserved it "
                f"with {partial.size_bytes}: one manifest is wrong; cancel the other download to try this one"
            )
    demand = space_demand(manifest, ledger, leaves)
    needed, shortfall = demand.needed_bytes, demand.shortfall(ledger, settings, spaces)
    if shortfall.required_bytes:
        raise _refused(manifest, demand, shortfall, ledger, settings, free_bytes, spaces)
    # A demand of nothing is admitted however full the disks are.
    volumes = allocate(demand.blobs, available_by_volume(spaces, settings), demand.volume_of_fixed) or {}
    return Admission(
        present=present, missing=missing, needed_bytes=needed, volume_by_blob={b: volumes.get(b, "") for b in missing}
    )


def _refused(
    manifest: Manifest,
    demand: SpaceDemand,
    shortfall: Shortfall,
    ledger: Ledger,
    settings: StorageSettings,
    free_bytes: int,
    spaces: Sequence[VolumeSpace],
) -> QuotaExceeded:
    """Build the refusal with its figures. They cost a pass over the whole ledger, which an approval does not need."""
    needed = demand.needed_bytes
    figures: dict[str, Any] = {
        "needed_bytes": needed,
        "free_bytes": free_bytes,
        "headroom_bytes": settings.headroom_bytes,
        "in_flight_bytes": ledger.arrivals.in_flight_bytes,
        "quota_bytes": settings.quota_bytes,
        "used_bytes": ledger.used_bytes,
        "reserved_bytes": ledger.reserved_bytes,
        "shortfall_bytes": shortfall.required_bytes,
    }
    if len(spaces) > 1:
        figures["volumes"] = [
            {
                "path": s.path,
                "free_bytes": s.free_bytes,
                "in_flight_bytes": s.in_flight_bytes,
                "room_bytes": max(s.available_bytes(settings.headroom_bytes), 0),
            }
            for s in spaces
        ]
    if shortfall.quota_bytes:
        return QuotaExceeded(
            f"{manifest.repo} needs {format_bytes(needed)}; the quota of {format_bytes(settings.quota_bytes or 0)} "
            "has "
            f"{format_bytes(max(needed - shortfall.quota_bytes, 0))} left ({format_bytes(ledger.used_bytes)} used, "
            f"{format_bytes(ledger.reserved_bytes)} reserved): remove a model with `shoal rm`, or raise the quota "
            "with "
            "`shoal storage set --max-storage`",
            **figures,
        )
    if len(spaces) > 1:
        return QuotaExceeded(
            f"{manifest.repo} needs {format_bytes(needed)}, its largest file "
            f"{format_bytes(max(demand.blobs.values()))}; "
            f"{_describe_available(spaces, settings)}, each beside {format_bytes(settings.headroom_bytes)} of "
            "headroom: free "
            "some space, or remove a model with `shoal rm`",
            **figures,
        )
    return QuotaExceeded(
        f"{manifest.repo} needs {format_bytes(needed)}; the disk has "
        f"{format_bytes(max(needed - shortfall.disk_bytes, 0))} available "
        f"({format_bytes(free_bytes)} free, {format_bytes(settings.headroom_bytes)} headroom, "
        f"{format_bytes(ledger.arrivals.in_flight_bytes)} reserved): free some space, or remove a model with "
        "`shoal rm`",
        **figures,
    )


def _describe_available(spaces: Iterable[VolumeSpace], settings: StorageSettings) -> str:
    return ", ".join(
        f"{s.path} has {format_bytes(max(s.available_bytes(settings.headroom_bytes), 0))} available" for s in spaces
    )
