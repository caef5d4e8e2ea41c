"""Files that somebody put in a blob's place, hashed before anything believes them (I1): one at a time, not slowly.

An intact one becomes a blob. One that is not stays where it is, and is hashed again when its stat has changed. One
that is still being written to is not judged: its stat is the same before and after, or it is looked at again.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import msgspec

from shoal_common.errors import ShoalError
from shoal_common.logs import Log
from shoal_common.proof import disprove, prove
from shoal_storage import leaves, quarantine
from shoal_storage.decide import Ledger, Stamp
from shoal_storage.disk import Disk
from shoal_storage.durable import sync
from shoal_storage.losing import forget_useless
from shoal_storage.rescan import Rescan
from shoal_storage.scan import blob_stamp
from shoal_storage.truth import PROVEN_MODE

log = Log("storage")

SETTLED_AFTER_S = 1.0
"""Without a write; a copy goes on or ends."""


class Judged(msgspec.Struct, frozen=True):
    """What hashing has shown of a file."""

    stamp: Stamp
    intact: bool
    why: str = ""
    leaves: bytes = b""
    """BLAKE3 of each leaf, one after the other."""


class _Unsettled(Exception):
    """Somebody writes to the file, or it has gone."""


class Prover:
    """Hashes the unproven."""

    def __init__(self, disk: Disk, ledger: Ledger, section: asyncio.Lock, rescan: Rescan) -> None:
        self._disk, self._ledger, self._section, self._rescan = disk, ledger, section, rescan
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Return once nothing waits to be hashed but what is still being written."""
        await self._idle.wait()

    async def prove_forever(self) -> None:
        """Endlessly: hash what is unproven and was not judged as it is now."""
        while True:
            unsettled = False
            self._rescan.unproven.clear()
            if due := due_to_prove(self._ledger):
                self._idle.clear()
            for sha256 in due:
                unsettled = not await self._settle(sha256) or unsettled
            self._idle.set()
            try:
                async with asyncio.timeout(SETTLED_AFTER_S if unsettled else None):
                    await self._rescan.unproven.wait()
            except TimeoutError:
                continue

    async def _settle(self, sha256: str) -> bool:
        """Hash one, and draw the consequence. False: it has to be looked at again."""
        try:
            judged = await asyncio.to_thread(judge, self._disk, sha256)
            if judged is None:
                return False
            async with self._section:
                return await self._conclude(sha256, judged)
        except (OSError, ShoalError) as e:
            log.warning("a file in a blob's place could not be looked at", blob=sha256, why=str(e))
            return False

    async def _conclude(self, sha256: str, judged: Judged) -> bool:
        ledger = self._ledger
        if sha256 not in ledger.unproven:
            return True  # removed, or a blob by now
        if judged.intact:
            if not await asyncio.to_thread(accept, self._disk, sha256, judged):
                return False
            del ledger.unproven[sha256]
            ledger.wrong.pop(sha256, None)
            ledger.blobs[sha256] = judged.stamp.size_bytes
            await forget_useless(self._disk, ledger)
            log.info("a file in a blob's place is that blob", blob=sha256, size_bytes=judged.stamp.size_bytes)
            await self._rescan.announce_found()
        else:
            stamp = await asyncio.to_thread(refuse, self._disk, sha256, judged.stamp)
            if stamp is None:
                return False
            ledger.unproven[sha256] = ledger.wrong[sha256] = stamp
            path = self._disk.layout.blob(sha256)
            log.warning("a file in a blob's place is not that blob; left alone", path=path, why=judged.why)
        await self._rescan.publish()
        return True


def due_to_prove(ledger: Ledger) -> list[str]:
    """Unproven files that were not judged as they are now, those that broken models wait for first. Pure."""
    waited = {b for m in ledger.broken.values() for b in m.blob_sizes}
    due = [b for b, stamp in ledger.unproven.items() if b not in ledger.wrong or not stamp.same_file(ledger.wrong[b])]
    return sorted(due, key=lambda b: (b not in waited, b))


def judge(disk: Disk, sha256: str) -> Judged | None:
    """Make a file's bytes durable and hash them; None while somebody writes to it, or when it has gone."""
    path = disk.layout.blob(sha256)
    before = _stat_of(path)
    stamp = blob_stamp(disk.layout, path)
    if before is None or stamp is None or 0 <= time.time() - before.st_mtime < SETTLED_AFTER_S:
        return None

    def unchanged(_: int) -> None:
        if not _same(before, _stat_of(path)):
            raise _Unsettled

    try:
        sync(path)
    except OSError as e:
        return Judged(stamp, intact=False, why=str(e))
    try:
        checked = quarantine.check(disk, sha256, unchanged)
        unchanged(0)
    except _Unsettled:
        return None
    if checked is None:
        return None
    why = "" if checked.intact else "its bytes hash to something else"
    return Judged(stamp, checked.intact, why, checked.leaves)


def accept(disk: Disk, sha256: str, judged: Judged) -> bool:
    """Make a file that was found intact a blob, durably. False: it is not that file any more."""
    path = disk.layout.blob(sha256)
    now = blob_stamp(disk.layout, path)
    if now is None or not now.same_file(judged.stamp):
        return False
    path.chmod(PROVEN_MODE)
    prove(sha256, path)
    leaves.write(disk.layout, sha256, judged.leaves, path.lstat().st_mtime_ns)
    sync(path)
    sync(path.parent)
    sync(path.parent.parent)
    return True


def refuse(disk: Disk, sha256: str, stamp: Stamp) -> Stamp | None:
    """See to it that a file that is not what it is called is not taken for it, after a restart neither.

    Returns how it stands then; None: it is not that file any more. Not a byte of it is changed.
    """
    path = disk.layout.blob(sha256)
    now = blob_stamp(disk.layout, path)
    if now is None or not now.same_file(stamp):
        return None
    leaves.remove(disk.layout, sha256)
    disprove(sha256, path)
    sync(path)
    return blob_stamp(disk.layout, path)


def _stat_of(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _same(one: os.stat_result, other: os.stat_result | None) -> bool:
    """Whether nothing was written, or changed about a file, in between."""
    facts = (one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns)
    return other is not None and facts == (other.st_ino, other.st_size, other.st_mtime_ns, other.st_ctime_ns)
