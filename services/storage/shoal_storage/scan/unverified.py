"""Hash files that somebody put in a blob's place before anything uses them (I1), one at a time, at full speed.

An intact file becomes a blob. A corrupt one is left alone and hashed again once its stat changes. A file that is
still being written is not judged: its stat must be the same before and after hashing, or it is hashed again.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from shoal_common.errors import ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.store.verification_stamp import clear_stamp, write_stamp
from shoal_storage.context import StorageContext
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.atomic_file import fsync_path
from shoal_storage.files.blob_stat import VERIFIED_MODE, stat_blob
from shoal_storage.integrity.blob_check import VerificationResult, hash_blob
from shoal_storage.integrity.consequences import drop_obsolete_quarantine
from shoal_storage.ledger.entries import BlobFileStat
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.scan.reconciler import ModelChanges, StoreReconciler
from shoal_storage.section import Held
from shoal_storage.store.store import Store

log = StructuredLogger("storage")

UNMODIFIED_FOR_S = 1.0
"""Seconds without a write after which a file counts as complete: a copy either goes on or has ended."""


class _FileChanged(Exception):
    """The file is being written, or is gone."""


class UnverifiedBlobHasher:
    """Hashes unverified files."""

    def __init__(self, context: StorageContext, reconciler: StoreReconciler) -> None:
        self._context, self._store, self._ledger = context, context.store, context.ledger
        self._reconciler = reconciler
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def wait_idle(self) -> None:
        """Return once no file waits to be hashed, except those still being written."""
        await self._is_idle.wait()

    async def hash_forever(self) -> None:
        """Hash, forever, each unverified file that was not hashed since it last changed."""
        while True:
            retry = False
            self._reconciler.unverified_found.clear()
            if pending := next_to_verify(self._ledger):
                self._is_idle.clear()
            for sha256 in pending:
                retry = not await self._verify(sha256) or retry
            self._is_idle.set()
            try:
                async with asyncio.timeout(UNMODIFIED_FOR_S if retry else None):
                    await self._reconciler.unverified_found.wait()
            except TimeoutError:
                continue

    async def _verify(self, sha256: str) -> bool:
        """Hash one file and apply the result. Return False if it has to be hashed again."""
        try:
            result = await asyncio.to_thread(verify_file, self._store, sha256)
            if result is None:
                return False
            async with self._context.section as held:
                changes = await self._apply(held, sha256, result)
            if changes is not None:
                await self._reconciler.report(changes)
            return changes is not None
        except (OSError, ShoalError) as e:
            log.warning("unverified file cannot be hashed", blob=sha256, error=str(e))
            return False

    async def _apply(self, held: Held, sha256: str, result: VerificationResult) -> ModelChanges | None:
        """Return what it changes; None if the file has to be hashed again."""
        ledger = self._ledger
        if sha256 not in ledger.unverified:
            return ModelChanges()  # removed, or a blob by now
        if result.intact:
            if not await asyncio.to_thread(promote_to_blob, self._store, sha256, result):
                return None
            size_bytes = result.stat.size_bytes
            await asyncio.to_thread(self._context.seals.record_hashed, sha256, size_bytes, result.leaf_hashes)
            ledger.add_blob(sha256, size_bytes)
            await drop_obsolete_quarantine(held, self._context)
            self._context.publishing.notify()
            log.info("verified a copied-in blob", blob=sha256, size_bytes=size_bytes)
            return await self._reconciler.complete_models(held)
        stamp = await asyncio.to_thread(mark_corrupt, self._store, sha256, result.stat)
        if stamp is None:
            return None
        ledger.mark_corrupt(sha256, stamp)
        self._context.publishing.notify()
        path = self._store.layout.blob(sha256)
        log.warning("copied-in file is corrupt; left in place, not used", path=path, reason=result.reason)
        return ModelChanges()


def next_to_verify(ledger: Ledger) -> list[str]:
    """Return unverified files not hashed since they last changed, those incomplete models need first. Pure."""
    needed = {b for m in ledger.incomplete.values() for b in m.blob_sizes}
    return sorted(ledger.unverified.keys() - ledger.corrupt.keys(), key=lambda b: (b not in needed, b))


def verify_file(store: Store, sha256: str) -> VerificationResult | None:
    """Make a file's bytes durable and hash them; return None if the file is being written or is gone."""
    path = store.layout.blob(sha256)
    before = _stat_of(path)
    stamp = stat_blob(store.layout, path)
    if before is None or stamp is None or 0 <= time.time() - before.st_mtime < UNMODIFIED_FOR_S:
        return None

    def require_unchanged(_: int) -> None:
        if not _is_unchanged(before, _stat_of(path)):
            raise _FileChanged

    try:
        fsync_path(path)
    except OSError as e:
        return VerificationResult(sha256, stamp, intact=False, reason=str(e))
    try:
        checked = hash_blob(store, sha256, require_unchanged)
        require_unchanged(0)
    except _FileChanged:
        return None
    return checked


def promote_to_blob(store: Store, sha256: str, result: VerificationResult) -> bool:
    """Turn an intact file into a blob, durably. Return False if the file has changed since it was hashed."""
    path = store.layout.blob(sha256)
    stamp = stat_blob(store.layout, path)
    if stamp is None or not stamp.same_file(result.stat):
        return False
    path.chmod(VERIFIED_MODE)
    write_stamp(sha256, path)
    leaf_hash_file.write(store.layout, sha256, result.leaf_hashes, path.lstat().st_mtime_ns)
    fsync_path(path)
    fsync_path(path.parent)
    fsync_path(path.parent.parent)
    return True


def mark_corrupt(store: Store, sha256: str, stat: BlobFileStat) -> BlobFileStat | None:
    """Ensure a corrupt file is never treated as the blob, also after a restart; its bytes are left as they are.

    Returns its stat afterwards, or None if the file has changed since it was hashed.
    """
    path = store.layout.blob(sha256)
    current = stat_blob(store.layout, path)
    if current is None or not current.same_file(stat):
        return None
    leaf_hash_file.delete(store.layout, sha256)
    clear_stamp(sha256, path)
    # Before the fsync, which may take long: what is written meanwhile was not hashed.
    cleared = stat_blob(store.layout, path)
    fsync_path(path)
    has_only_lost_stamp = cleared is not None and current.is_verified and cleared.size_bytes == current.size_bytes
    return cleared if cleared is not None and (cleared.same_file(current) or has_only_lost_stamp) else None


def _stat_of(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _is_unchanged(before: os.stat_result, after: os.stat_result | None) -> bool:
    """Whether the file was neither written nor had its metadata changed in between."""
    identity = (before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    return after is not None and identity == (after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns)
