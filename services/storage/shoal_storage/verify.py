"""Looking again at what is on the disk: when a person asks (`verify`), and slowly all the time.

One blob at a time, and never in the critical section: only setting a corrupt blob aside is done there.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from shoal_common.errors import NotFound, ShoalError
from shoal_common.logs import Log
from shoal_common.messages.commands import Verify
from shoal_common.messages.records import Manifest
from shoal_common.names import ModelRef
from shoal_common.service import Context
from shoal_storage import quarantine, repair
from shoal_storage.announce import Announcer
from shoal_storage.decide import Ledger, matching
from shoal_storage.disk import Disk
from shoal_storage.doubt import due, having, lose
from shoal_storage.losing import Losses
from shoal_storage.proving import Prover

log = Log("storage")

VERIFY_DEADLINE_S = 3600.0
"""A terabyte takes about a quarter of it."""
PACE_BYTES_PER_S = 20_000_000.0
"""Of the pass in the background: a small part of what any disk reads."""
AGAIN_AFTER_S = 7 * 86400.0
_LOOK_S = 60.0
_BETWEEN_S = 0.05


class Report(msgspec.Struct):
    """The outcome of `verify`. Blobs by sha256, models as `org/name@commit`."""

    checked: int = 0
    checked_bytes: int = 0
    corrupt: list[str] = []
    """Blobs that did not hash to their name, now in quarantine."""
    bad_leaves: int = 0
    """Leaves of the corrupt blobs that have to come anew: all of a blob's when nothing tells which are good."""
    missing: list[str] = []
    """Blobs whose file had gone."""
    models: list[str] = []
    """Models that were whole before and are not: no longer announced; pull them again."""
    instances: list[str] = []
    """Instances that have stages of those models here: stop them, what they have loaded may be wrong."""
    broken: list[str] = []
    """Of the models that were asked about, all that are broken here now, those found earlier too."""


class _GivenUp(Exception):
    """Ends a hash in its thread: the blob has gone, or nobody waits any more."""


class Verifier:
    """Hashes blobs of one node again."""

    def __init__(
        self,
        context: Context,
        disk: Disk,
        ledger: Ledger,
        section: asyncio.Lock,
        losses: Losses,
        prover: Prover,
        announcer: Announcer,
        adopted_doubted: Callable[[str, quarantine.Checked | None], Awaitable[list[str]]],
        pace_bytes_per_s: float = PACE_BYTES_PER_S,
    ) -> None:
        self._context, self._disk, self._ledger = context, disk, ledger
        self._section, self._losses, self._prover, self._announcer = section, losses, prover, announcer
        self._adopted_doubted = adopted_doubted
        self._pace_bytes_per_s = pace_bytes_per_s
        self._turn = asyncio.Lock()
        self._hurried = 0
        self._setting_aside: set[asyncio.Task[None]] = set()
        self._verified_s: dict[str, float] = {}
        self._begin = os.urandom(32).hex()

    async def verify(self, command: Verify, _: str) -> Report:
        """Hash the blobs of a model, or all there are, and set aside what is corrupt. Raises NotFound."""
        report = Report()
        # While somebody waits, the pass in the background does not dawdle over the blob it has in hand.
        self._hurried += 1
        try:
            for sha256 in self._asked(command.model):
                if self._ledger.bytes_of(sha256) is not None:
                    await self._look(sha256, report, slowly=False)
        finally:
            self._hurried -= 1
        report.broken = sorted(m.model for m in self._meant(command.model, self._ledger.broken))
        log.info("verified", checked=report.checked, checked_bytes=report.checked_bytes, corrupt=len(report.corrupt))
        return report

    def _asked(self, model: str) -> list[str]:
        if not model:
            return sorted(self._all())
        found = self._meant(model, {**self._ledger.broken, **self._ledger.whole})
        if not found:
            raise NotFound(f"{model} is not on node {self._context.node}: there is nothing to verify")
        return sorted({blob for manifest in found for blob in manifest.blob_sizes})

    def _meant(self, model: str, manifests: Mapping[str, Manifest]) -> list[Manifest]:
        if not model:
            return list(manifests.values())
        ref = ModelRef.parse(model)
        return matching(ref.repo, ref.revision if "@" in model else "", manifests.values())

    def _all(self) -> set[str]:
        return {*self._ledger.blobs, *self._ledger.adopted_blobs}

    async def verify_slowly(self) -> None:
        """Endlessly: the blob that was verified longest ago, at a pace that leaves the disk to others."""
        unseen = self._all()
        while True:
            now_s = time.monotonic()
            # What has come in since the start was hashed as it came.
            known = {b: self._verified_s.get(b, now_s) for b in self._all() if b not in unseen}
            self._verified_s = known
            for blob in due(self._all(), known, self._begin, now_s, AGAIN_AFTER_S):
                # Noted before: a blob that cannot be read now must not keep the others from their turn.
                unseen.discard(blob)
                self._verified_s[blob] = time.monotonic()
                await self._prover.idle()  # what nobody can use yet comes first
                if self._ledger.bytes_of(blob) is None:
                    continue
                try:
                    await self._look(blob, Report(), slowly=True)
                except (OSError, ShoalError) as e:
                    log.warning("a blob could not be verified", blob=blob, why=str(e))
                await asyncio.sleep(_BETWEEN_S)
            await asyncio.sleep(_LOOK_S)

    async def _look(self, sha256: str, report: Report, slowly: bool) -> None:
        abandoned = threading.Event()

        def pace(chunk_bytes: int) -> None:
            if abandoned.is_set() or self._ledger.bytes_of(sha256) is None:
                raise _GivenUp
            if slowly and not self._hurried:
                self._disk.stopping.wait(chunk_bytes / self._pace_bytes_per_s)

        async with self._turn:
            try:
                checked = await asyncio.to_thread(quarantine.check, self._disk, sha256, pace)
            except _GivenUp:
                return
            finally:
                abandoned.set()
        if checked is not None:
            report.checked += 1
            report.checked_bytes += checked.size_bytes
            if checked.intact:
                self._verified_s[sha256] = time.monotonic()
                if not checked.listed:
                    await self._list_leaves(checked)
                return
        if sha256 not in self._ledger.blobs:
            await self._doubted_adopted(sha256, checked, report)
            return
        # Once begun it is finished, though the command's deadline pass: half of it would make the ledger wrong.
        task = asyncio.create_task(self._doubted(sha256, checked, report))
        self._setting_aside.add(task)
        task.add_done_callback(self._setting_aside.discard)
        await asyncio.shield(task)

    async def _list_leaves(self, checked: quarantine.Checked) -> None:
        async with self._section:
            try:
                await asyncio.to_thread(quarantine.list_leaves, self._disk, checked)
            except OSError as e:
                log.warning("the leaves of a blob could not be listed", blob=checked.sha256, why=e.strerror)

    async def _keep_good_leaves(self, checked: quarantine.Checked) -> None:
        try:
            kept_bytes = await asyncio.to_thread(repair.keep_good_leaves, self._disk, checked)
        except OSError as e:  # a full disk: it is out of the way, and comes whole
            log.warning("the good leaves of a blob could not be noted", blob=checked.sha256, why=e.strerror)
            return
        if kept_bytes:
            self._ledger.repairable[checked.sha256] = kept_bytes

    async def _doubted_adopted(self, sha256: str, checked: quarantine.Checked | None, report: Report) -> None:
        (report.missing if checked is None else report.corrupt).append(sha256)
        models = await self._adopted_doubted(sha256, checked)
        report.models += models
        report.instances += self._losses.instances_of(models)

    async def _doubted(self, sha256: str, checked: quarantine.Checked | None, report: Report) -> None:
        async with self._section:
            if sha256 not in self._ledger.blobs:
                return  # deleted while we looked
            if checked is not None:
                manifests = having(sha256, self._ledger)
                leases = list(self._ledger.leases.values())
                if not await asyncio.to_thread(quarantine.set_aside, self._disk, checked, manifests, leases):
                    return  # deleted and fetched anew while we looked: those bytes were verified when they came
                self._ledger.quarantined.add(sha256)
                self._ledger.repairable.pop(sha256, None)
                if checked.size_bytes == self._ledger.blobs[sha256]:
                    await self._keep_good_leaves(checked)
                report.corrupt.append(sha256)
                report.bad_leaves += checked.bad_leaf_count
            elif await asyncio.to_thread(self._disk.layout.blob(sha256).exists):
                return
            elif not await asyncio.to_thread(lambda: self._disk.is_there() and self._disk.has_root(sha256)):
                return  # an unmounted disk has lost nothing
            else:
                report.missing.append(sha256)
            models = lose({sha256}, self._ledger)
            instances = await self._losses.take_back(models)
            report.models += models
            report.instances += instances
        log.warning(
            "a blob is not what its name says; set aside" if checked else "a blob has gone",
            blob=sha256,
            models=",".join(models),
            instances=",".join(instances),
        )
        await self._announcer.publish()
        if checked is not None:
            await self._context.events.tell("quarantined", blob=sha256, models=models, instances=instances)
