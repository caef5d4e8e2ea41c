"""What a start does: finishes what a crash interrupted, and reads what the disk holds, by stat alone. Blocking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_common import leafset
from shoal_common.blobs import further_roots
from shoal_common.errors import BadInput, BadName, ShoalError
from shoal_common.layout import Layout
from shoal_common.logs import Log
from shoal_common.messages import decode
from shoal_common.messages.records import Manifest
from shoal_common.names import check_blob, check_commit
from shoal_common.proof import prove
from shoal_storage import leaves, parts
from shoal_storage.decide import Ledger, Partial, Stamp, left_behind
from shoal_storage.disk import PARTIAL_MODE, Disk, PartialMeta, decoded_tomb
from shoal_storage.doubt import is_whole, lose
from shoal_storage.leases import Lease
from shoal_storage.quarantine import set_aside_in
from shoal_storage.scan import blobs_in, scan
from shoal_storage.store_layout import StoreLayout
from shoal_storage.truth import believed
from shoal_storage.views import remove_view

log = Log("disk")


def recover(disk: Disk, leases: Mapping[str, Lease] | None = None) -> Ledger:
    """Finish what a crash interrupted, and say what the disk holds, by stat alone.

    What `leases` need stays, whatever else has gone. Strange files are left where they are, and counted.
    """
    lay = disk.layout
    for link in [p for p in lay.partials.iterdir() if p.is_symlink()]:
        link.unlink(missing_ok=True)  # those of roots that are there are made again
    for unfinished in (*lay.root.glob(".*.new"), *lay.manifests.glob("*/.*.new")):
        unfinished.unlink(missing_ok=True)
    tombs = dict(_read_tombs(lay))
    deleted = {m.model: m for m in tombs.values()}
    ledger = _read(disk)
    ledger.leases = dict(leases or {})
    ledger.parts = parts.read(disk, ledger)
    for manifest in deleted.values():
        with _left_for_later(manifest.model, ledger, deleted):
            left = left_behind(manifest, ledger)
            try:
                for sha256 in left:
                    disk.remove_blob(sha256)
            finally:
                for sha256 in disk.gone(left):
                    del ledger.blobs[sha256]
    times: set[tuple[int, int]] | None = None
    for view in lay.views.glob("*/*"):
        # Of a model whose deletion, or whose sealing, was interrupted. Its links would keep blobs on the disk.
        with suppress(BadName):
            name, commit = view.parent.name, check_commit(view.name)
            known = lay.manifests / name / f"{commit}.json", lay.adopted_models / f"{name}@{commit}"
            if not any(path.exists() for path in known):
                times = _times_of(lay, ledger.blobs) if times is None else times
                model = f"{name.replace('--', '/')}@{commit}"
                with _left_for_later(model, ledger, deleted):
                    remove_view(view, deleted.get(model), times)
    for tomb in lay.tombs.iterdir():
        model = tombs[tomb].model if tomb in tombs else tomb.name
        if model not in ledger.leaving:
            with _left_for_later(model, ledger, deleted):
                disk.remove(tomb)
    if {identity for identity, _ in further_roots(lay)} <= disk.further.keys():
        leaves.remove_strays(lay, ledger.blobs)  # of a root that is away nothing is known
    return ledger


def take_in(disk: Disk, ledger: Ledger, further: str) -> None:
    """A further root is there, at a start or again: from now on the ledger has what is in it, by stat alone.

    What the ledger has elsewhere already stays there. What a crash has left in the root is finished or removed.
    """
    root = disk.layout.of(further)
    for unfinished in root.root.glob(".*.new"):
        unfinished.unlink(missing_ok=True)
    for sha256, stamp in blobs_in(root, further).items():
        if sha256 in ledger.blobs:
            if stamp.proven:
                ledger.doubles.setdefault(sha256, {})[further] = stamp.size_bytes
        elif sha256 not in ledger.unproven and (stamp.proven or sha256 not in ledger.partials):
            if ledger.partials.pop(sha256, None) is not None:  # it is here: nothing of it has to arrive
                disk.remove_partial(sha256)
            ledger.where[sha256] = further
            _take_in_blob(disk, ledger, sha256, stamp)
    for directory in root.partials.iterdir():
        name, its = directory.name, ledger.where.get(directory.name)
        if name in ledger.partials or (name in ledger.blobs and its != further):
            disk.remove(directory)  # it arrives, or is here, elsewhere
            continue
        ledger.where[name] = further
        partial = _read_partial(disk, directory, ledger)
        if partial is not None:
            ledger.partials[name] = partial
            disk.link_partial(name)
        elif its is None:
            del ledger.where[name]
    for tomb in root.tombs.iterdir():
        disk.remove(tomb)
    ledger.quarantined |= set_aside_in(disk, further)


def let_go(disk: Disk, ledger: Ledger, further: str) -> list[str]:
    """A further root is not there: neither is what is in it. Returns the models, `org/name@commit`, that breaks."""

    def away(blobs: Iterable[str]) -> set[str]:
        return {blob for blob in blobs if ledger.where.get(blob) == further}

    lost = away(ledger.blobs)
    for sha256, copies in list(ledger.doubles.items()):
        copies.pop(further, None)
        if sha256 in lost and copies:
            lost.discard(sha256)
            disk.layout.place(sha256, next(iter(copies)))
            copies.pop(next(iter(copies)))
        if not copies:
            del ledger.doubles[sha256]
    for sha256 in away(ledger.unproven):
        del ledger.unproven[sha256]
        ledger.wrong.pop(sha256, None)
    for blob in away(ledger.partials):
        del ledger.partials[blob]
        disk.layout.partial_link(blob).unlink(missing_ok=True)
    gone = away(ledger.quarantined)
    ledger.quarantined -= gone
    ledger.repairable = {b: size for b, size in ledger.repairable.items() if b not in gone}
    disk.leave(further)
    return lose(lost, ledger)


def _take_in_blob(disk: Disk, ledger: Ledger, sha256: str, stamp: Stamp) -> None:
    if not believed(stamp, listed=leaves.proves(disk.layout, sha256)):
        ledger.unproven[sha256] = stamp
        return
    ledger.blobs[sha256] = stamp.size_bytes
    if not stamp.proven:
        prove(sha256, disk.layout.blob(sha256))
        leaves.follow_time(disk.layout, sha256)


def _times_of(layout: StoreLayout, blobs: Iterable[str]) -> set[tuple[int, int]]:
    """Size and mtime_ns of blobs of the store: what their reflinks have too."""
    found = (layout.blob(b).lstat() for b in blobs if b not in layout.where)
    return {(its.st_size, its.st_mtime_ns) for its in found}


@contextmanager
def _left_for_later(model: str, ledger: Ledger, deleted: Mapping[str, Manifest]) -> Iterator[None]:
    """What the disk refuses to let go does not keep a start from anything else: the next one tries again."""
    try:
        yield
    except OSError as e:
        log.warning("what is left of a deleted model could not be removed", model=model, why=str(e))
        if model in deleted and model not in ledger.on_disk:
            ledger.leaving[model] = deleted[model]


def _read_tombs(layout: Layout) -> Iterator[tuple[Path, Manifest]]:
    for tomb in layout.tombs.glob("*.json"):
        manifest = decoded_tomb(tomb)
        if manifest is not None:
            yield tomb, manifest


def _read(disk: Disk) -> Ledger:
    seen = scan(disk.layout)
    ledger = Ledger(unknown=seen.unknown, where=disk.layout.where)
    for sha256, stamp in seen.blobs.items():
        if not stamp.further:
            _take_in_blob(disk, ledger, sha256, stamp)
    for directory in disk.layout.partials.iterdir():
        partial = _read_partial(disk, directory, ledger)
        if partial is not None:
            ledger.partials[directory.name] = partial
    for further in list(disk.further):
        take_in(disk, ledger, further)
    for model, manifest in seen.manifests.items():
        whole = is_whole(manifest, ledger)
        if not whole:
            log.warning("model is not whole; not announced", model=model)
        (ledger.manifests if whole else ledger.broken)[model] = manifest
    if seen.unknown.count:
        log.warning(
            "unknown files in the store; left alone",
            count=seen.unknown.count,
            size_bytes=seen.unknown.size_bytes,
            first=",".join(seen.unknown.paths),
        )
    return ledger


def _read_partial(disk: Disk, directory: Path, ledger: Ledger) -> Partial | None:
    try:
        blob = check_blob(directory.name)
        meta = decode((directory / "meta.json").read_bytes(), PartialMeta)
        # A commit that was interrupted before its rename has made this read-only.
        (directory / "data").chmod(PARTIAL_MODE)
    except BadName:
        return None
    except (ShoalError, FileNotFoundError, NotADirectoryError):
        # Its reservation was never acknowledged, or its data is a blob by now.
        log.info("a partial that was being made or committed; removed", path=directory)
        disk.remove(directory)
        return None
    if ledger.blobs.get(blob) == meta.size_bytes:
        disk.remove(directory)
        return None
    try:
        leaves = {m: leafset.of_ranges(its, meta.size_bytes) for m, its in meta.leaves.items()}
    except BadInput:
        leaves = {}  # all of it, then: that is never too little
    partial = Partial(meta.size_bytes, models=set(meta.models), leaves=leaves)
    disk.look_at(blob, partial)
    return partial
