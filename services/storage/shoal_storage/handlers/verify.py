"""Re-verify stored blobs: the command `verify`, and a slow background scrub.

One blob at a time and outside the critical section; only quarantining a corrupt blob happens inside it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from shoal_common.errors import NotFound, ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import Verify
from shoal_common.names import ModelId, ModelRef
from shoal_storage.context import StorageContext
from shoal_storage.integrity import blob_check, quarantine, repair
from shoal_storage.integrity.consequences import drop_obsolete_quarantine, instances_using, next_to_scrub
from shoal_storage.ledger.references import manifests_with_blob, matching_manifests
from shoal_storage.libraries.service import LibraryService
from shoal_storage.scan.unverified import UnverifiedBlobHasher
from shoal_storage.section import Held

log = StructuredLogger("storage")

VERIFY_DEADLINE_S = 3600.0
"""A terabyte takes about a quarter of it."""
SCRUB_BYTES_PER_S = 20_000_000.0
"""Read rate of the background scrub: a small part of what any disk delivers."""
SEAL_CHECK_BYTES_PER_S = 100_000_000.0
"""Rate at which blobs are hashed that were ready by another node's seal: a fifth of a core at most."""
REVERIFY_AFTER_S = 7 * 86400.0
_SCRUB_INTERVAL_S = 60.0
_SEAL_CHECK_INTERVAL_S = 600.0
_PAUSE_BETWEEN_BLOBS_S = 0.05


class VerifyReport(msgspec.Struct):
    """Result of `verify`. Blobs by sha256, models as `org/name@commit`."""

    checked: int = 0
    checked_bytes: int = 0
    corrupt: list[str] = []
    """Blobs that did not hash to their name, now in quarantine."""
    bad_leaves: int = 0
    """Leaves of the corrupt blobs to download again: all of them where no leaf hashes tell which are good."""
    missing: list[str] = []
    """Blobs whose file is gone."""
    models: list[ModelId] = []
    """Models that this made incomplete: unpublished; pull them again."""
    instances: list[str] = []
    """Instances with stages of those models on this node: stop them, the weights they loaded may be corrupt."""
    incomplete: list[ModelId] = []
    """All incomplete models among those requested, including those found earlier."""


class _VerifyAborted(Exception):
    """Ends hashing in its thread: the blob is gone, or nobody waits for the result."""


class Verifier:
    """Hashes the blobs of this node again."""

    def __init__(
        self,
        context: StorageContext,
        hasher: UnverifiedBlobHasher,
        libraries: LibraryService,
        scrub_bytes_per_s: float = SCRUB_BYTES_PER_S,
        seal_check_bytes_per_s: float = SEAL_CHECK_BYTES_PER_S,
    ) -> None:
        self._context, self._store, self._ledger = context, context.store, context.ledger
        self._hasher, self._libraries = hasher, libraries
        self._scrub_bytes_per_s, self._seal_check_bytes_per_s = scrub_bytes_per_s, seal_check_bytes_per_s
        self._hash_lock = asyncio.Lock()
        self._waiting_commands = 0
        self._verified_s: dict[str, float] = {}
        self._first_name = os.urandom(32).hex()

    async def verify(self, command: Verify, _: str) -> VerifyReport:
        """Hash the blobs of a model, or all blobs, and quarantine the corrupt ones. Raises NotFound."""
        report = VerifyReport()
        # While a command waits for the turn, the background scrub finishes its current blob at full speed.
        self._waiting_commands += 1
        try:
            for sha256 in self._requested_blobs(command.model):
                if self._ledger.blob_size(sha256) is not None:
                    await self._verify_blob(sha256, report)
        finally:
            self._waiting_commands -= 1
        report.incomplete = sorted(m.model for m in self._requested(command.model, self._ledger.incomplete))
        log.info(
            "verify finished",
            checked=report.checked,
            checked_bytes=report.checked_bytes,
            corrupt=len(report.corrupt),
            missing=len(report.missing),
        )
        return report

    def _requested_blobs(self, model: str) -> list[str]:
        if not model:
            return sorted(self._all_blobs())
        manifests = self._requested(model, {**self._ledger.incomplete, **self._ledger.complete_manifests})
        if not manifests:
            raise NotFound(f"{model} is not on node {self._context.node}; `shoal ls` shows what can be verified")
        return sorted({blob for manifest in manifests for blob in manifest.blob_sizes})

    def _requested(self, model: str, manifests: Mapping[ModelId, Manifest]) -> list[Manifest]:
        if not model:
            return list(manifests.values())
        ref = ModelRef.parse(model)
        return matching_manifests(ref.repo, ref.revision if "@" in model else "", manifests.values())

    def _all_blobs(self) -> set[str]:
        return {*self._ledger.blobs, *self._ledger.libraries.blobs}

    async def scrub_forever(self) -> None:
        """Scrub forever: the blob verified longest ago comes first, at a rate that leaves the disk to others."""
        present_at_start = self._all_blobs()
        while True:
            now_s = time.monotonic()
            # Blobs that arrived since the start were hashed on arrival.
            verified_s = {b: self._verified_s.get(b, now_s) for b in self._all_blobs() if b not in present_at_start}
            self._verified_s = verified_s
            for blob in next_to_scrub(self._all_blobs(), verified_s, self._first_name, now_s, REVERIFY_AFTER_S):
                # Recorded first: an unreadable blob must not hold up the others.
                present_at_start.discard(blob)
                self._verified_s[blob] = time.monotonic()
                await self._hasher.wait_idle()  # unverified files come first: nobody can use them yet
                if self._ledger.blob_size(blob) is None:
                    continue
                try:
                    await self._verify_blob(blob, VerifyReport(), self._scrub_bytes_per_s)
                except (OSError, ShoalError) as e:
                    log.warning("blob cannot be verified", blob=blob, error=str(e))
                await asyncio.sleep(_PAUSE_BETWEEN_BLOBS_S)
            await asyncio.sleep(_SCRUB_INTERVAL_S)

    async def check_seals_forever(self) -> None:
        """Hash, forever, the blobs of ready models that only another node has hashed so far, and seal them."""
        if not self._context.seals.signs:
            return
        while True:
            self._context.model_ready.clear()
            needed = {b: size for m in self._ledger.manifests.values() for b, size in m.blob_sizes.items()}
            in_store = {b: size for b, size in needed.items() if b in self._ledger.blobs}  # a library's are hashed
            for blob in await asyncio.to_thread(self._context.seals.not_hashed_here, in_store):
                if blob not in self._ledger.blobs:
                    continue
                try:
                    await self._verify_blob(blob, VerifyReport(), self._seal_check_bytes_per_s)
                except (OSError, ShoalError) as e:
                    log.warning("blob cannot be verified", blob=blob, error=str(e))
                await asyncio.sleep(_PAUSE_BETWEEN_BLOBS_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(_SEAL_CHECK_INTERVAL_S):
                    await self._context.model_ready.wait()

    async def _verify_blob(self, sha256: str, report: VerifyReport, bytes_per_s: float | None = None) -> None:
        """Hash a blob, at this rate in the background, and act on what it finds."""
        abandoned = threading.Event()

        def throttle(chunk_bytes: int) -> None:
            if abandoned.is_set() or self._ledger.blob_size(sha256) is None:
                raise _VerifyAborted
            if bytes_per_s and not self._waiting_commands:
                self._store.stopping.wait(chunk_bytes / bytes_per_s)

        async with self._hash_lock:
            try:
                checked = await asyncio.to_thread(blob_check.hash_blob, self._store, sha256, throttle)
            except _VerifyAborted:
                return
            finally:
                abandoned.set()
        if checked is not None:
            report.checked += 1
            report.checked_bytes += checked.stat.size_bytes
            if checked.intact:
                self._verified_s[sha256] = time.monotonic()
                if sha256 in self._ledger.blobs:
                    await self._record_intact(checked)
                return
        if sha256 not in self._ledger.blobs:
            await self._handle_bad_library_blob(sha256, checked, report)
            return
        # Shielded from the command's deadline: stopping halfway would leave the ledger wrong.
        await self._context.service.detached.run(self._handle_bad_blob(sha256, checked, report))

    async def _record_intact(self, checked: blob_check.VerificationResult) -> None:
        seals, size_bytes = self._context.seals, checked.stat.size_bytes
        async with self._context.section as held:
            held.require()
            try:
                if not checked.has_leaf_hash_file:
                    await asyncio.to_thread(quarantine.write_leaf_hashes, self._store, checked)
                unsealed = await asyncio.to_thread(seals.not_hashed_here, {checked.sha256: size_bytes})
                if seals.signs and unsealed:
                    await asyncio.to_thread(seals.record_hashed, checked.sha256, size_bytes, checked.leaf_hashes)
            except OSError as e:
                log.warning("leaf hashes cannot be written", blob=checked.sha256, error=e.strerror)

    async def _keep_good_leaves(self, held: Held, checked: blob_check.VerificationResult) -> None:
        held.require()
        try:
            kept_bytes = await asyncio.to_thread(repair.record_good_leaves, self._store, checked)
        except OSError as e:  # a full disk: the blob is in quarantine all the same, and is downloaded whole
            log.warning(
                "good leaves cannot be recorded; the blob is downloaded whole", blob=checked.sha256, error=e.strerror
            )
            return
        if kept_bytes:
            self._ledger.set_repairable({**self._ledger.repairable, checked.sha256: kept_bytes})

    async def _handle_bad_library_blob(
        self, sha256: str, checked: blob_check.VerificationResult | None, report: VerifyReport
    ) -> None:
        (report.missing if checked is None else report.corrupt).append(sha256)
        models = await self._libraries.handle_bad_blob(sha256, checked)
        report.models += models
        report.instances += instances_using(self._context, models)

    async def _distrust_sealer(self, sealer: str, sha256: str, models: list[ModelId]) -> None:
        """Let a node's seals count here no more: what it sealed as this blob is not the blob."""
        log.warning(
            "a node sealed a corrupt blob; its seals are not trusted here any more", sealer=sealer, blob=sha256
        )
        try:
            await asyncio.to_thread(self._context.seals.distrust, sealer)
        except OSError as e:
            log.error("cannot record that a sealer is not trusted", sealer=sealer, reason=e.strerror)
        self._context.publishing.notify()
        await self._context.events.emit("sealer_distrusted", sealer=sealer, blob=sha256, models=models)

    async def _handle_bad_blob(
        self, sha256: str, checked: blob_check.VerificationResult | None, report: VerifyReport
    ) -> None:
        sealer = ""
        async with self._context.section as held:
            if sha256 not in self._ledger.blobs:
                return  # deleted while it was hashed
            if checked is not None:
                sealer = await asyncio.to_thread(
                    self._context.seals.sealer_of, sha256, checked.stat.size_bytes, checked.leaf_hashes
                )
                manifests = manifests_with_blob(sha256, self._ledger)
                leases = list(self._ledger.uses.leases.values())
                if not await asyncio.to_thread(quarantine.quarantine_blob, self._store, checked, manifests, leases):
                    return  # deleted and downloaded again while it was hashed: those bytes were verified on arrival
                known_bytes = self._ledger.blobs[sha256]
                models = self._ledger.quarantine(sha256)
                if checked.stat.size_bytes == known_bytes:
                    await self._keep_good_leaves(held, checked)
                report.corrupt.append(sha256)
                report.bad_leaves += checked.bad_leaf_count
            elif await asyncio.to_thread(self._store.layout.blob(sha256).exists):
                return
            elif not await asyncio.to_thread(
                lambda: self._store.is_present() and self._store.is_volume_present(sha256)
            ):
                return  # an unmounted disk loses nothing
            else:
                report.missing.append(sha256)
                models = self._ledger.mark_missing([sha256])
            await drop_obsolete_quarantine(held, self._context)
            self._context.publishing.notify(*models)
            instances = instances_using(self._context, models)
            report.models += models
            report.instances += instances
        log.warning(
            "corrupt blob quarantined; pull the models again"
            if checked
            else "blob file is missing; pull the models again",
            blob=sha256,
            models=",".join(models),
            instances=",".join(instances),
        )
        await self._context.publishing.publish()
        if checked is not None:
            await self._context.events.emit("quarantined", blob=sha256, models=models, instances=instances)
        if sealer:
            await self._distrust_sealer(sealer, sha256, models)
