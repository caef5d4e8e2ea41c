"""What a start does: finishes what a crash interrupted, and reads what the disk holds, by stat alone. Blocking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from shoal_common import leafset
from shoal_common.errors import BadInput, BadName, ShoalError
from shoal_common.layout import Layout
from shoal_common.logs import Log
from shoal_common.messages import decode
from shoal_common.messages.records import Manifest
from shoal_common.names import check_blob, check_commit
from shoal_common.proof import prove
from shoal_storage import leaves, parts
from shoal_storage.decide import Ledger, Partial, left_behind
from shoal_storage.disk import PARTIAL_MODE, Disk, PartialMeta, decoded_tomb
from shoal_storage.doubt import is_whole
from shoal_storage.leases import Lease
from shoal_storage.scan import scan
from shoal_storage.truth import believed
from shoal_storage.views import remove_view

log = Log("disk")


def recover(disk: Disk, leases: Mapping[str, Lease] | None = None) -> Ledger:
    """Finish what a crash interrupted, and say what the disk holds, by stat alone.

    What `leases` need stays, whatever else has gone. Strange files are left where they are, and counted.
    """
    lay = disk.layout
    for unfinished in (*lay.root.glob(".*.new"), *lay.manifests.glob("*/.*.new")):
        unfinished.unlink(missing_ok=True)
    deleted = {m.model: m for m in _read_tombs(lay)}
    ledger = _read(disk)
    ledger.leases = dict(leases or {})
    ledger.parts = parts.read(disk, ledger)
    for manifest in deleted.values():
        for sha256 in left_behind(manifest, ledger):
            disk.remove_blob(sha256)
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
                remove_view(lay, view, deleted.get(model), times)
    for tomb in lay.tombs.iterdir():
        disk.remove(tomb)
    leaves.remove_strays(lay, ledger.blobs)
    return ledger


def _times_of(layout: Layout, blobs: Iterable[str]) -> set[tuple[int, int]]:
    """Size and mtime_ns of blobs: what their reflinks have too."""
    found = (layout.blob(b).lstat() for b in blobs)
    return {(its.st_size, its.st_mtime_ns) for its in found}


def _read_tombs(layout: Layout) -> Iterator[Manifest]:
    for tomb in layout.tombs.glob("*.json"):
        manifest = decoded_tomb(tomb)
        if manifest is not None:
            yield manifest


def _read(disk: Disk) -> Ledger:
    seen = scan(disk.layout)
    ledger = Ledger(unknown=seen.unknown)
    for sha256, stamp in seen.blobs.items():
        if not believed(stamp, listed=leaves.proves(disk.layout, sha256)):
            ledger.unproven[sha256] = stamp
            continue
        ledger.blobs[sha256] = stamp.size_bytes
        if not stamp.proven:
            prove(sha256, disk.layout.blob(sha256))
            leaves.follow_time(disk.layout, sha256)
    for directory in disk.layout.partials.iterdir():
        partial = _read_partial(disk, directory, ledger)
        if partial is not None:
            ledger.partials[directory.name] = partial
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
