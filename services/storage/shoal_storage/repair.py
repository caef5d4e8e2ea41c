"""A corrupt blob repaired in place: only its bad leaves come anew. Blocking: runs in threads.

    quarantine/<sha256>         the whole file, bad leaves and good ones
    quarantine/<sha256>.have    bitmap of the leaves that are good, as `have` of a partial

When the blob is wanted back, that file becomes the data of its partial, the bitmap its `have`, and the fetcher goes
on from there as with any other partial. The commit hashes the whole as always: should the bitmap have claimed too
much, all of it is discarded and comes anew.

Order of keeping: the file is in quarantine, durably; then the bitmap, with fsync. Order of taking back: `have` and
`meta.json` into the partial's directory, each with fsync of its bytes; the file last, by rename; fsync of both
directories. A directory without `data` is no partial, and goes at a start: whatever stops this leaves the file in
quarantine with its bitmap, or the partial, or at worst neither, and then all comes anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shoal_common.layout import Bitmap
from shoal_common.messages import encode
from shoal_storage.disk import PARTIAL_MODE, Disk, PartialMeta
from shoal_storage.durable import put_file, sync, write_file
from shoal_storage.quarantine import Checked


def keep_good_leaves(disk: Disk, checked: Checked) -> int:
    """Note which leaves of a blob that was set aside are good. Returns bytes that a repair need not find room for."""
    if checked.good is None:
        return 0
    write_file(disk.layout.set_aside_have(checked.sha256), checked.good.to_bytes())
    return repairable_bytes(disk, checked.sha256)


def repairable(disk: Disk, blobs: Iterable[str]) -> dict[str, int]:
    """At start: those of the blobs in quarantine that are repaired by leaf, and the bytes that this goes on from."""
    return {blob: found for blob in blobs if (found := repairable_bytes(disk, blob))}


def repairable_bytes(disk: Disk, sha256: str) -> int:
    """Bytes on the disk that a repair of this blob goes on from; 0 when it has to come whole."""
    try:
        found = disk.layout.set_aside(sha256).lstat()
    except FileNotFoundError:
        return 0
    return min(found.st_blocks * 512, found.st_size) if _good_leaves(disk, sha256, found.st_size) else 0


def _good_leaves(disk: Disk, sha256: str, size_bytes: int) -> Bitmap | None:
    """The good leaves of what is in quarantine, if it has this size and a bitmap that fits it."""
    lay = disk.layout
    try:
        if lay.set_aside(sha256).lstat().st_size != size_bytes:
            return None
        said = lay.set_aside_have(sha256).read_bytes()
    except OSError:
        return None
    good = Bitmap(size_bytes, said)
    return good if said == good.to_bytes() and good.have_bytes else None


def make_partial(
    disk: Disk, blob: str, size_bytes: int, models: Iterable[str], wanted: Mapping[str, int] | None = None
) -> bool:
    """Make a partial that is not there: of the good leaves in quarantine (True), or where none are, an empty one."""
    lay, directory = disk.layout, disk.layout.partial(blob)
    good = _good_leaves(disk, blob, size_bytes)
    if good is None:
        disk.write_partial(blob, size_bytes, models, wanted)
        return False
    disk.require_root(blob)
    if directory.exists():  # without data: whatever else is there is of other bytes
        disk.remove_partial(blob)
    directory.mkdir()
    put_file(directory / "have", good.to_bytes())
    put_file(directory / "meta.json", encode(PartialMeta(size_bytes=size_bytes, models=sorted(models))))
    sync(directory.parent)
    lay.set_aside(blob).chmod(PARTIAL_MODE)
    lay.set_aside(blob).replace(directory / "data")
    sync(directory)
    lay.set_aside_have(blob).unlink(missing_ok=True)
    sync(lay.set_aside(blob).parent)
    disk.link_partial(blob)
    return True
