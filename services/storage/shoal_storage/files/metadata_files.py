"""Pins, last uses and reservations as small files: they survive a restart and need no index. Blocking.

    pins/<org>--<name>@<commit>           empty; exists while the model is pinned; durable before the acknowledgement
    uses/<org>--<name>@<commit>           empty; its mtime is the last use, written within 30 s and at a stop
    reservations/<org>--<name>@<commit>   {"blobs":[…]}: the blobs that a running fetch counts on, present or not

A reservation file's mtime is when its model was last known to be wanted; if the file could not be written, the mtimes
of its partial blobs' `meta.json` count.

A model without a file in `uses/` counts from when its manifest was written. Deleting a model deletes its pin and use;
a start deletes those of models without a manifest. A reservation file is deleted when its fetch ends. Without it, a
start would take what that fetch has committed so far for garbage.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from shoal_common.errors import BadMessage, BadName, InternalError
from shoal_common.host.private_files import open_private
from shoal_common.logs import StructuredLogger
from shoal_common.messages import WireStruct, decode, encode
from shoal_common.names import ModelId
from shoal_common.store.store_paths import StorePaths, model_from_file_name
from shoal_storage.files.atomic_file import fsync_path, make_directory, replace_file
from shoal_storage.ledger.ledger import Ledger

log = StructuredLogger("keeping")

WRITE_INTERVAL_S = 30.0
_US_PER_S = 1_000_000
_NS_PER_US = 1_000
_TEMPORARY_SUFFIX = ".new"


class ReservationFile(WireStruct):
    """`reservations/<org>--<name>@<commit>`."""

    blobs: list[str]


class MetadataFiles:
    """Keeps a ledger's `pinned`, `last_uses` and `reservations` and their files in step."""

    def __init__(self, layout: StorePaths, ledger: Ledger) -> None:
        self._layout, self._ledger = layout, ledger
        self._unwritten: set[ModelId] = set()
        """Models whose last use is newer than their file. Only models that are here, so bounded by them."""

    def read(self) -> None:
        """Read the files of the models that are here. At start, after the ledger."""
        paths, ledger = self._layout, self._ledger
        for model in self._entries(paths.pins):
            ledger.uses.pin(model)
        for model in ledger.local_manifests:
            self.record_arrival(model)
        for model, path in self._entries(paths.uses).items():
            with suppress(FileNotFoundError):
                ledger.uses.record_use(model, path.stat().st_mtime)
        for model, path in iter_model_files(paths.reservations):
            if model in ledger.manifests:
                _remove(path)  # sealed: its manifest names all its blobs
                continue
            try:
                ledger.arrivals.reserve(model, decode(path.read_bytes(), ReservationFile).blobs)
                ledger.arrivals.record_wanted(model, path.stat().st_mtime)
            except (BadMessage, OSError) as e:
                log.warning("not a reservation file; left alone", path=path, reason=str(e))
        for model, part in ledger.shards.items():
            ledger.arrivals.extend_reservation(model, part.manifest.blob_sizes)
        for blob, partial in ledger.arrivals.partials.items():
            with suppress(FileNotFoundError):
                reserved_s = (paths.partial(blob) / "meta.json").stat().st_mtime
                for model in partial.models - ledger.arrivals.reservations.keys():
                    wanted_s = ledger.arrivals.last_wanted_s.get(model, 0.0)
                    ledger.arrivals.record_wanted(model, max(reserved_s, wanted_s))

    def _entries(self, directory: Path) -> dict[ModelId, Path]:
        """Return the files of a directory by their models. Deletes those of models that are gone."""
        files, local = {}, self._ledger.local_manifests
        for model, path in iter_model_files(directory):
            if model in local:
                files[model] = path
            elif not self._layout.manifest(model).exists():  # an unreadable manifest is not a missing one
                path.unlink(missing_ok=True)
        return files

    def record_arrival(self, model: ModelId) -> None:
        """Set a sealed model's last use to the time its manifest was written, until it is used."""
        if model not in self._unwritten:
            paths = self._layout
            for path in (paths.use(model), paths.manifest(model), paths.shard(model)):
                with suppress(FileNotFoundError):
                    self._ledger.uses.record_use(model, path.stat().st_mtime)
                    return

    def record_use(self, models: Iterable[ModelId], now_s: float) -> None:
        """Record a use of those of the models that are here. In memory: `write_uses` makes it durable."""
        local = self._ledger.local_manifests
        for model in models:
            if model in local:
                self._ledger.uses.record_use(model, now_s)
                self._unwritten.add(model)

    def write_uses(self) -> None:
        """Make the recorded uses durable. What cannot be written is retried at the next call."""
        # Removed from the set first, one by one: a use recorded while its file is written is written again.
        for model in sorted(self._unwritten):
            self._unwritten.discard(model)
            last_use_s = self._ledger.uses.last_uses.get(model)
            if last_use_s is None:  # deleted meanwhile
                continue
            try:
                _touch(self._layout.use(model), last_use_s)
            except OSError as e:
                self._unwritten.add(model)
                log.warning("cannot write last use; kept in memory", model=model, reason=e.strerror)

    def write_reservation(self, model: ModelId) -> None:
        """Make the ledger's reservation for a model durable."""
        path = self._layout.reservation(model)
        try:
            make_directory(path.parent)
            replace_file(path, encode(ReservationFile(blobs=sorted(self._ledger.arrivals.reservations[model]))))
        except OSError as e:
            # A full disk. After a restart, what this fetch has brought would be fetched again.
            log.warning("cannot write reservation; kept in memory", model=model, reason=e.strerror)

    def record_wanted(self, model: ModelId, now_s: float) -> None:
        """Record that an arriving model is wanted now. Survives a restart if the disk allows the write."""
        self._ledger.arrivals.record_wanted(model, now_s)
        partials = (self._layout.partial(b) for b, p in self._ledger.arrivals.partials.items() if model in p.models)
        for path in (self._layout.reservation(model), *(p / "meta.json" for p in partials)):
            with suppress(OSError):
                os.utime(path, (now_s, now_s))

    def end_reservation(self, model: ModelId) -> None:
        """End a model's reservation: its fetch is over."""
        self._ledger.arrivals.end_reservation(model)
        _remove(self._layout.reservation(model))

    def pin(self, model: ModelId) -> None:
        """Pin a model. After this returns, the pin survives a power cut."""
        try:
            _touch(self._layout.pin(model))
        except OSError as e:
            raise InternalError(
                f"cannot write the pin of {model} ({e.strerror}); free some space and try again"
            ) from None
        self._ledger.uses.pin(model)

    def unpin(self, model: ModelId) -> None:
        """Unpin a model. Not pinned already is fine."""
        _remove(self._layout.pin(model))
        self._ledger.uses.unpin(model)

    def delete_records(self, model: ModelId) -> None:
        """Delete the records of a deleted model."""
        self._unwritten.discard(model)
        self._ledger.uses.forget_use(model)
        self.unpin(model)
        self._layout.use(model).unlink(missing_ok=True)


def iter_model_files(directory: Path) -> Iterator[tuple[ModelId, Path]]:
    """Yield the files of a directory that are named after a model, with the model. Foreign files are logged."""
    with suppress(FileNotFoundError):
        for path in sorted(directory.iterdir()):
            if path.name.startswith(".") and path.name.endswith(_TEMPORARY_SUFFIX):
                path.unlink(missing_ok=True)
                continue
            try:
                model = model_from_file_name(path.name)
            except BadName:
                log.warning("file name is not a model; left alone", path=path)
                continue
            yield model, path


def _touch(path: Path, mtime_s: float | None = None) -> None:
    """Make an empty file, or set its mtime, durably."""
    make_directory(path.parent)
    fd = open_private(path, os.O_WRONLY)
    try:
        if mtime_s is not None:
            ns = round(mtime_s * _US_PER_S) * _NS_PER_US  # a float of seconds has microsecond precision
            os.utime(fd, ns=(ns, ns))
        os.fsync(fd)
    finally:
        os.close(fd)
    fsync_path(path.parent)


def _remove(path: Path) -> None:
    if path.exists():  # a read-only file system refuses to delete even a missing file
        path.unlink(missing_ok=True)
        fsync_path(path.parent)
