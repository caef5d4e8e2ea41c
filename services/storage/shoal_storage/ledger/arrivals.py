"""What arrives: reservations of models, and the partial blobs they are for."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Final

import msgspec

from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId
from shoal_common.store import leaf_set
from shoal_storage.ledger.blob_volumes import BlobVolumes
from shoal_storage.ledger.entries import PartialBlobInfo


class Arrivals:
    """The models (`org/name@commit`) that arrive, and their partial blobs."""

    partials: Final[Mapping[str, PartialBlobInfo]]
    reservations: Final[Mapping[ModelId, Set[str]]]
    """Blobs, present or arriving, that a running fetch counts on, by model."""
    last_wanted_s: Final[Mapping[ModelId, float]]
    """When each arriving model was last known to be wanted, in Unix seconds."""
    ended_reservations: Final[Set[ModelId]]
    """Arriving models whose reservation has ended: nobody wants them, and their bytes are still here."""
    paused_models: Final[Set[ModelId]]
    """Arriving models that people paused: wanted, and not fetched."""

    def __init__(self, volumes: BlobVolumes, on_dropped: Callable[[str], None]) -> None:
        self._volumes, self._on_dropped = volumes, on_dropped
        self.partials = self._partials = dict[str, PartialBlobInfo]()
        self.reservations = self._reservations = dict[ModelId, frozenset[str]]()
        self.last_wanted_s = self._last_wanted_s = dict[ModelId, float]()
        self.ended_reservations = self._ended_reservations = set[ModelId]()
        self.paused_models = self._paused_models = set[ModelId]()
        self._next_arrival = itertools.count(1)

    def is_same_arrival(self, blob: str, partial: PartialBlobInfo) -> bool:
        """Whether a partial blob is still here and was not dropped and reserved again since it was read."""
        current = self._partials.get(blob)
        return current is not None and current.arrival == partial.arrival

    @property
    def in_flight_bytes(self) -> int:
        """Bytes reserved and not yet allocated: they will still reduce the file system's free space."""
        return sum(self.in_flight_by_volume.values())

    @property
    def in_flight_by_volume(self) -> Counter[str]:
        """The same, by volume; "" for the store."""
        in_flight = Counter[str]()
        for blob, p in self._partials.items():
            in_flight[self._volumes.by_blob.get(blob, "")] += max(self.reserved_bytes_of(p) - p.allocated_bytes, 0)
        return in_flight

    @property
    def models(self) -> set[ModelId]:
        """Models with a reservation, ended or not."""
        return {*self._reservations, *(m for p in self._partials.values() for m in p.models)}

    def is_reserved(self, partial: PartialBlobInfo) -> bool:
        """Whether a partial blob may still grow: the reservation of one of its models has not ended."""
        return not partial.models or not partial.models <= self._ended_reservations

    def reserved_bytes_of(self, partial: PartialBlobInfo, active_model: ModelId | None = None) -> int:
        """Bytes a partial blob may come to occupy by its active reservations; `active_model`'s counts as active."""
        active = partial.models - (self._ended_reservations - {active_model})
        if partial.models and not active:
            return partial.allocated_bytes
        counted = partial if active == partial.models else msgspec.structs.replace(partial, models=active)
        return counted.reserved_bytes

    def needed_bytes(self, blob: str, size_bytes: int, model: ModelId, leaves: int | None = None) -> int:
        """Bytes that reserving an absent blob, or leaves of it, for a model adds to what is already reserved."""
        partial = self._partials.get(blob)
        if partial is None:
            return size_bytes if leaves is None else leaf_set.byte_count(leaves, size_bytes)
        after = self.reserved_bytes_of(partial.with_model(model, leaves), active_model=model)
        return max(0, after - self.reserved_bytes_of(partial))

    # Reservations

    def reserve(self, model: ModelId, blobs: Iterable[str]) -> None:
        """Reserve a model: a fetch counts on these blobs, and no longer on others."""
        self._reservations[model] = frozenset(blobs)

    @contextmanager
    def reserving(self, model: ModelId, blobs: Iterable[str]) -> Iterator[bool]:
        """Reserve a model while the body does the rest: undone if it raises. Yields whether this changes anything."""
        before = self._reservations.get(model)
        self.reserve(model, blobs)
        try:
            yield self._reservations[model] != before
        except BaseException:
            self._restore(model, before)
            raise
        self._ended_reservations.discard(model)

    @contextmanager
    def counted_as_reserved(self, manifest: Manifest | None) -> Iterator[None]:
        """Count a manifest as reserved while the body makes space for it, so that its own blobs stay."""
        if manifest is None:
            yield
            return
        before = self._reservations.get(manifest.model)
        self.reserve(manifest.model, manifest.blob_sizes)
        try:
            yield
        finally:
            self._restore(manifest.model, before)

    def _restore(self, model: ModelId, before: frozenset[str] | None) -> None:
        if before is None:
            self._reservations.pop(model, None)
        else:
            self._reservations[model] = before

    def extend_reservation(self, model: ModelId, blobs: Iterable[str]) -> None:
        """Let a model's reservation, or a new one, count on these blobs too."""
        self.reserve(model, {*self._reservations.get(model, ()), *blobs})

    def record_sha256(self, blob: str, sha256: str) -> list[ModelId]:
        """Let reservations that count on a blob by git's sha1 count on its sha256 too. Returns the models changed."""
        models = [m for m, blobs in self._reservations.items() if blob in blobs and sha256 not in blobs]
        for model in models:
            self.extend_reservation(model, [sha256])
        return models

    def end_reservation(self, model: ModelId) -> None:
        """End a model's reservation: its fetch is over."""
        self._reservations.pop(model, None)
        self._last_wanted_s.pop(model, None)
        self._ended_reservations.discard(model)

    def abandon_reservation(self, model: ModelId) -> None:
        """Let a reservation end because nobody wants the model. What has arrived of it stays for now."""
        self._ended_reservations.add(model)

    def record_wanted(self, model: ModelId, now_s: float) -> None:
        """Record that an arriving model was wanted then."""
        self._last_wanted_s[model] = now_s

    def set_paused(self, models: Set[ModelId]) -> None:
        """Set the models that people paused."""
        self._paused_models.intersection_update(models)
        self._paused_models.update(models)

    # Partial blobs

    def add_partial(self, blob: str, partial: PartialBlobInfo) -> None:
        """Add a partial blob that begins to arrive, or was found on the disk."""
        self._partials[blob] = msgspec.structs.replace(partial, arrival=next(self._next_arrival))

    def reserve_blob(self, blob: str, size_bytes: int, model: ModelId, leaves: int | None = None) -> None:
        """Reserve a blob that is not here, or leaves of it, for a model too. What the model wanted of it ends."""
        if blob not in self._partials:
            self.add_partial(blob, PartialBlobInfo(size_bytes))
        self._partials[blob] = self._partials[blob].with_model(model, leaves)

    def release_blob(self, blob: str, model: ModelId) -> None:
        """End what a model wants of a partial blob, which is dropped if no other model wants it."""
        self._partials[blob] = remaining = self._partials[blob].without_model(model)
        if not remaining.models:
            self.drop_partial(blob)

    def record_allocated(self, blob: str, allocated_bytes: int, durable_leaves: int) -> None:
        """Record how much of a partial blob has arrived."""
        self._partials[blob] = msgspec.structs.replace(
            self._partials[blob], allocated_bytes=allocated_bytes, durable_leaves=durable_leaves
        )

    def drop_partial(self, blob: str) -> None:
        """Drop a partial blob: deleted, or whole by now."""
        self._partials.pop(blob, None)
        self._on_dropped(blob)
