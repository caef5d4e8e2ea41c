"""Startup: finishes what a crash interrupted, and reads what the disk holds, by stat alone. Blocking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_common.errors import BadInput, BadName, ShoalError
from shoal_common.logs import Log
from shoal_common.messages import decode
from shoal_common.messages.manifest import Manifest
from shoal_common.names import check_blob, check_commit
from shoal_common.store import leaf_set
from shoal_common.store.blob_lookup import further_roots
from shoal_common.store.store_paths import Layout
from shoal_common.store.verification_stamp import prove
from shoal_storage import shards
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.blob_stat import blobs_in
from shoal_storage.files.volume_paths import StoreLayout
from shoal_storage.integrity.quarantine import set_aside_in
from shoal_storage.ledger.completeness import is_whole, lose
from shoal_storage.ledger.entries import Partial, Stamp
from shoal_storage.ledger.lease import Lease
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import left_behind
from shoal_storage.scan.diff import believed
from shoal_storage.scan.scanner import scan
from shoal_storage.store.store import PARTIAL_MODE, Disk, PartialMeta, decoded_tomb
from shoal_storage.store.views import remove_view

log = Log("disk")


def recover(disk: Disk, leases: Mapping[str, Lease] | None = None) -> Ledger:
    """Finish what a crash interrupted, and return what the disk holds, by stat alone.

    Blobs that `leases` need stay in any case. Foreign files are left alone and counted.
    """
    paths = disk.layout
    for link in [p for p in paths.partials.iterdir() if p.is_symlink()]:
        link.unlink(missing_ok=True)  # those of present volumes are made again
    for unfinished in (*paths.root.glob(".*.new"), *paths.manifests.glob("*/.*.new")):
        unfinished.unlink(missing_ok=True)
    tombs = dict(_read_tombs(paths))
    deleted = {m.model: m for m in tombs.values()}
    ledger = _read(disk)
    ledger.leases = dict(leases or {})
    ledger.parts = shards.read(disk, ledger)
    for manifest in deleted.values():
        with _log_and_continue(manifest.model, ledger, deleted):
            leftover = left_behind(manifest, ledger)
            try:
                for sha256 in leftover:
                    disk.remove_blob(sha256)
            finally:
                for sha256 in disk.gone(leftover):
                    del ledger.blobs[sha256]
    times: set[tuple[int, int]] | None = None
    for view in paths.views.glob("*/*"):
        # Of a model whose deletion or sealing was interrupted. Its links would keep blobs on the disk.
        with suppress(BadName):
            name, commit = view.parent.name, check_commit(view.name)
            known = paths.manifests / name / f"{commit}.json", paths.adopted_models / f"{name}@{commit}"
            if not any(path.exists() for path in known):
                times = _times_of(paths, ledger.blobs) if times is None else times
                model = f"{name.replace('--', '/')}@{commit}"
                with _log_and_continue(model, ledger, deleted):
                    remove_view(view, deleted.get(model), times)
    for tomb in paths.tombs.iterdir():
        model = tombs[tomb].model if tomb in tombs else tomb.name
        if model not in ledger.leaving:
            with _log_and_continue(model, ledger, deleted):
                disk.remove(tomb)
    if {identity for identity, _ in further_roots(paths)} <= disk.further.keys():
        leaf_hash_file.remove_strays(paths, ledger.blobs)  # the blobs of a missing volume are unknown
    return ledger


def take_in(disk: Disk, ledger: Ledger, volume_id: str) -> None:
    """Read a volume that is present, at start or again: add its contents to the ledger, by stat alone.

    Blobs that the ledger has elsewhere stay there. What a crash left on the volume is finished or deleted.
    """
    volume_paths = disk.layout.of(volume_id)
    for unfinished in volume_paths.root.glob(".*.new"):
        unfinished.unlink(missing_ok=True)
    for sha256, stamp in blobs_in(volume_paths, volume_id).items():
        if sha256 in ledger.blobs:
            if stamp.proven:
                ledger.doubles.setdefault(sha256, {})[volume_id] = stamp.size_bytes
        elif sha256 not in ledger.unproven and (stamp.proven or sha256 not in ledger.partials):
            if ledger.partials.pop(sha256, None) is not None:  # the whole blob is here: none of it has to arrive
                disk.remove_partial(sha256)
            ledger.where[sha256] = volume_id
            _add_blob(disk, ledger, sha256, stamp)
    for directory in volume_paths.partials.iterdir():
        name, known_volume = directory.name, ledger.where.get(directory.name)
        if name in ledger.partials or (name in ledger.blobs and known_volume != volume_id):
            disk.remove(directory)  # it arrives, or is present, elsewhere
            continue
        ledger.where[name] = volume_id
        partial = _read_partial(disk, directory, ledger)
        if partial is not None:
            ledger.partials[name] = partial
            disk.link_partial(name)
        elif known_volume is None:
            del ledger.where[name]
    for tomb in volume_paths.tombs.iterdir():
        disk.remove(tomb)
    ledger.quarantined |= set_aside_in(disk, volume_id)


def let_go(disk: Disk, ledger: Ledger, volume_id: str) -> list[str]:
    """Drop a missing volume's contents from the ledger. Returns the models (`org/name@commit`) now incomplete."""

    def on_volume(blobs: Iterable[str]) -> set[str]:
        return {blob for blob in blobs if ledger.where.get(blob) == volume_id}

    lost = on_volume(ledger.blobs)
    for sha256, copies in list(ledger.doubles.items()):
        copies.pop(volume_id, None)
        if sha256 in lost and copies:
            lost.discard(sha256)
            disk.layout.place(sha256, next(iter(copies)))
            copies.pop(next(iter(copies)))
        if not copies:
            del ledger.doubles[sha256]
    for sha256 in on_volume(ledger.unproven):
        del ledger.unproven[sha256]
        ledger.wrong.pop(sha256, None)
    for blob in on_volume(ledger.partials):
        del ledger.partials[blob]
        disk.layout.partial_link(blob).unlink(missing_ok=True)
    quarantined = on_volume(ledger.quarantined)
    ledger.quarantined -= quarantined
    ledger.repairable = {b: size for b, size in ledger.repairable.items() if b not in quarantined}
    disk.leave(volume_id)
    return lose(lost, ledger)


def _add_blob(disk: Disk, ledger: Ledger, sha256: str, stamp: Stamp) -> None:
    if not believed(stamp, listed=leaf_hash_file.proves(disk.layout, sha256)):
        ledger.unproven[sha256] = stamp
        return
    ledger.blobs[sha256] = stamp.size_bytes
    if not stamp.proven:
        prove(sha256, disk.layout.blob(sha256))
        leaf_hash_file.follow_time(disk.layout, sha256)


def _times_of(layout: StoreLayout, blobs: Iterable[str]) -> set[tuple[int, int]]:
    """Return the size and mtime_ns of the store's blobs: their reflinks have the same."""
    stats = (layout.blob(b).lstat() for b in blobs if b not in layout.where)
    return {(blob_stat.st_size, blob_stat.st_mtime_ns) for blob_stat in stats}


@contextmanager
def _log_and_continue(model: str, ledger: Ledger, deleted: Mapping[str, Manifest]) -> Iterator[None]:
    """Log what the disk refuses to delete, so that the start goes on; the next start retries."""
    try:
        yield
    except OSError as e:
        log.warning("cannot delete the rest of a deleted model", model=model, reason=str(e))
        if model in deleted and model not in ledger.on_disk:
            ledger.leaving[model] = deleted[model]


def _read_tombs(layout: Layout) -> Iterator[tuple[Path, Manifest]]:
    for tomb in layout.tombs.glob("*.json"):
        manifest = decoded_tomb(tomb)
        if manifest is not None:
            yield tomb, manifest


def _read(disk: Disk) -> Ledger:
    scanned = scan(disk.layout)
    ledger = Ledger(unknown=scanned.unknown, where=disk.layout.where)
    for sha256, stamp in scanned.blobs.items():
        if not stamp.further:
            _add_blob(disk, ledger, sha256, stamp)
    for directory in disk.layout.partials.iterdir():
        partial = _read_partial(disk, directory, ledger)
        if partial is not None:
            ledger.partials[directory.name] = partial
    for volume_id in list(disk.further):
        take_in(disk, ledger, volume_id)
    for model, manifest in scanned.manifests.items():
        complete = is_whole(manifest, ledger)
        if not complete:
            log.warning("model incomplete; not published", model=model)
        (ledger.manifests if complete else ledger.broken)[model] = manifest
    if scanned.unknown.count:
        log.warning(
            "foreign files in the store; left alone",
            count=scanned.unknown.count,
            size_bytes=scanned.unknown.size_bytes,
            first=",".join(scanned.unknown.paths),
        )
    return ledger


def _read_partial(disk: Disk, directory: Path, ledger: Ledger) -> Partial | None:
    try:
        blob = check_blob(directory.name)
        meta = decode((directory / "meta.json").read_bytes(), PartialMeta)
        # A commit that was interrupted before its rename made it read-only.
        (directory / "data").chmod(PARTIAL_MODE)
    except BadName:
        return None
    except (ShoalError, FileNotFoundError, NotADirectoryError):
        # Its reservation was never acknowledged, or its data is already a blob.
        log.info("unfinished partial blob deleted", path=directory)
        disk.remove(directory)
        return None
    if ledger.blobs.get(blob) == meta.size_bytes:
        disk.remove(directory)
        return None
    try:
        leaves = {m: leaf_set.of_ranges(ranges, meta.size_bytes) for m, ranges in meta.leaves.items()}
    except BadInput:
        leaves = {}  # all of it, then: never too little
    partial = Partial(meta.size_bytes, models=set(meta.models), leaves=leaves)
    disk.look_at(blob, partial)
    return partial
