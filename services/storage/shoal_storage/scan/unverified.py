"""Hash files that somebody put in a blob's place before anything uses them (I1), one at a time, at full speed.

An intact file becomes a blob. A corrupt one is left alone and hashed again once its stat changes. A file that is
still being written is not judged: its stat must be the same before and after hashing, or it is hashed again.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import msgspec

from shoal_common.errors import ShoalError
from shoal_common.logs import Log
from shoal_common.store.verification_stamp import disprove, prove
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.atomic_file import sync
from shoal_storage.files.blob_stat import PROVEN_MODE, blob_stamp
from shoal_storage.integrity import blob_check
from shoal_storage.integrity.consequences import forget_useless
from shoal_storage.ledger.entries import Stamp
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.scan.reconciler import Rescan
from shoal_storage.store.store import Disk

log = Log("storage")

SETTLED_AFTER_S = 1.0
"""Seconds without a write after which a file counts as complete: a copy either goes on or has ended."""


class Judged(msgspec.Struct, frozen=True):
    """Result of hashing a file."""

    stamp: Stamp
    intact: bool
    why: str = ""
    leaves: bytes = b""
    """BLAKE3 of each leaf, concatenated."""


class _FileChanged(Exception):
    """The file is being written, or is gone."""


class Prover:
    """Hashes unverified files."""

    def __init__(self, disk: Disk, ledger: Ledger, section: asyncio.Lock, rescan: Rescan) -> None:
        self._disk, self._ledger, self._section, self._rescan = disk, ledger, section, rescan
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Return once no file waits to be hashed, except those still being written."""
        await self._idle.wait()

    async def prove_forever(self) -> None:
        """Hash, forever, each unverified file that was not hashed since it last changed."""
        while True:
            retry = False
            self._rescan.unproven.clear()
            if pending := due_to_prove(self._ledger):
                self._idle.clear()
            for sha256 in pending:
                retry = not await self._verify(sha256) or retry
            self._idle.set()
            try:
                async with asyncio.timeout(SETTLED_AFTER_S if retry else None):
                    await self._rescan.unproven.wait()
            except TimeoutError:
                continue

    async def _verify(self, sha256: str) -> bool:
        """Hash one file and apply the result. Return False if it has to be hashed again."""
        try:
            result = await asyncio.to_thread(judge, self._disk, sha256)
            if result is None:
                return False
            async with self._section:
                return await self._apply(sha256, result)
        except (OSError, ShoalError) as e:
            log.warning("unverified file cannot be hashed", blob=sha256, error=str(e))
            return False

    async def _apply(self, sha256: str, result: Judged) -> bool:
        ledger = self._ledger
        if sha256 not in ledger.unproven:
            return True  # removed, or a blob by now
        if result.intact:
            if not await asyncio.to_thread(accept, self._disk, sha256, result):
                return False
            del ledger.unproven[sha256]
            ledger.wrong.pop(sha256, None)
            ledger.blobs[sha256] = result.stamp.size_bytes
            await forget_useless(self._disk, ledger)
            log.info("verified a copied-in blob", blob=sha256, size_bytes=result.stamp.size_bytes)
            await self._rescan.announce_found()
        else:
            stamp = await asyncio.to_thread(refuse, self._disk, sha256, result.stamp)
            if stamp is None:
                return False
            ledger.unproven[sha256] = ledger.wrong[sha256] = stamp
            path = self._disk.layout.blob(sha256)
            log.warning("copied-in file is corrupt; left in place, not used", path=path, reason=result.why)
        await self._rescan.publish()
        return True


def due_to_prove(ledger: Ledger) -> list[str]:
    """Return unverified files not hashed since they last changed, those incomplete models need first. Pure."""
    needed = {b for m in ledger.broken.values() for b in m.blob_sizes}
    pending = [
        b for b, stamp in ledger.unproven.items() if b not in ledger.wrong or not stamp.same_file(ledger.wrong[b])
    ]
    return sorted(pending, key=lambda b: (b not in needed, b))


def judge(disk: Disk, sha256: str) -> Judged | None:
    """Make a file's bytes durable and hash them; return None if the file is being written or is gone."""
    path = disk.layout.blob(sha256)
    before = _stat_of(path)
    stamp = blob_stamp(disk.layout, path)
    if before is None or stamp is None or 0 <= time.time() - before.st_mtime < SETTLED_AFTER_S:
        return None

    def require_unchanged(_: int) -> None:
        if not _is_unchanged(before, _stat_of(path)):
            raise _FileChanged

    try:
        sync(path)
    except OSError as e:
        return Judged(stamp, intact=False, why=str(e))
    try:
        checked = blob_check.check(disk, sha256, require_unchanged)
        require_unchanged(0)
    except _FileChanged:
        return None
    if checked is None:
        return None
    reason = "" if checked.intact else "its bytes have another hash"
    return Judged(stamp, checked.intact, reason, checked.leaves)


def accept(disk: Disk, sha256: str, judged: Judged) -> bool:
    """Turn an intact file into a blob, durably. Return False if the file has changed since it was hashed."""
    path = disk.layout.blob(sha256)
    stamp = blob_stamp(disk.layout, path)
    if stamp is None or not stamp.same_file(judged.stamp):
        return False
    path.chmod(PROVEN_MODE)
    prove(sha256, path)
    leaf_hash_file.write(disk.layout, sha256, judged.leaves, path.lstat().st_mtime_ns)
    sync(path)
    sync(path.parent)
    sync(path.parent.parent)
    return True


def refuse(disk: Disk, sha256: str, stamp: Stamp) -> Stamp | None:
    """Ensure a corrupt file is never treated as the blob, also after a restart; its bytes are left as they are.

    Returns its stat afterwards, or None if the file has changed since it was hashed.
    """
    path = disk.layout.blob(sha256)
    current = blob_stamp(disk.layout, path)
    if current is None or not current.same_file(stamp):
        return None
    leaf_hash_file.remove(disk.layout, sha256)
    disprove(sha256, path)
    sync(path)
    return blob_stamp(disk.layout, path)


def _stat_of(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _is_unchanged(before: os.stat_result, after: os.stat_result | None) -> bool:
    """Whether the file was neither written nor had its metadata changed in between."""
    identity = (before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    return after is not None and identity == (after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns)
