"""Offer the models of libraries: scanned by stat every few minutes, hashed once, used in place.

`recognize.py` recognizes the models, `scanner.py` reads the library, `library_records.py` writes the store's records.
Nothing is ever written to a library. Files are hashed outside the critical section, one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from functools import partial

import msgspec
from msgspec import structs

from shoal_common.concurrency.threads import DaemonCalls, start_daemon_call
from shoal_common.errors import ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import LibraryState
from shoal_common.names import ModelId
from shoal_storage.context import StorageContext
from shoal_storage.files.real_path import resolve_path
from shoal_storage.integrity.blob_check import VerificationResult
from shoal_storage.ledger.library_model import LibraryFile, LibraryModel, VerifiedFile, blob_files
from shoal_storage.libraries.recognize import (
    AcceptanceResult,
    ModelCandidate,
    RecognizedModels,
    accept_models,
    is_verified,
    recognize,
)
from shoal_storage.libraries.scanner import LibraryUnreadable, hash_file, list_library
from shoal_storage.section import Held
from shoal_storage.store import library_records
from shoal_storage.store.commit import link_view

log = StructuredLogger("libraries")

SCAN_INTERVAL_S = 300.0
_FIRST_SCAN_TIMEOUT_S = 10.0
"""How long startup waits for the libraries: one that does not answer must not prevent it."""
_SCAN_DEADLINE_S = 300.0
_WRITE_INTERVAL_S = 5.0
_MAX_NAMED = 20


class _LibraryScan(msgspec.Struct):
    """Result of scanning a library. `real` is its path with symbolic links resolved."""

    real: str
    result: RecognizedModels = msgspec.field(default_factory=RecognizedModels)
    error: str = ""


class _HashAborted(Exception):
    """Ends hashing in its thread: the file is no longer needed."""


class LibraryService:
    """Keeps the ledger's library models, and the store's records of them, in step with the libraries."""

    def __init__(self, context: StorageContext) -> None:
        self._context, self._store, self._ledger = context, context.store, context.ledger
        self._libraries = context.settings.libraries
        self._layout = context.store.layout
        self._scans: dict[str, _LibraryScan] = {}
        self._scanning = DaemonCalls()
        self._verified: dict[str, VerifiedFile] = {}
        self._acceptance = AcceptanceResult()
        self._unusable: dict[str, str] = {}
        """Directories whose files cannot be hashed or recorded, with the error; tried again after the next scan."""
        self._needed_paths: frozenset[str] = frozenset()
        """Absolute paths of the files of models that wait for hashing."""
        self._offered_earlier: set[ModelId] = set()
        """Models marked as offered by an earlier process."""
        self._recorded: dict[str, LibraryFile] = {}
        self._unsaved, self._saved_s = False, 0.0
        self._reported_corrupt: set[str] | None = None
        self._states: list[LibraryState] = []
        self._started = False
        self._scan_lock, self._apply_lock = asyncio.Lock(), asyncio.Lock()
        self._scan_now, self._hash_now = asyncio.Event(), asyncio.Event()

    # Public interface

    async def start(self) -> asyncio.Task[None]:
        """Offer models hashed earlier and unchanged since, before anything is published. Return the first scan.

        The scan continues in the background if a library does not answer.
        """
        self._verified = await asyncio.to_thread(library_records.read_verified, self._layout)
        self._offered_earlier = set(await asyncio.to_thread(library_records.offered_models, self._layout))
        first_scan = asyncio.create_task(self._try_refresh())
        done, _ = await asyncio.wait({first_scan}, timeout=_FIRST_SCAN_TIMEOUT_S)
        if not done:
            log.warning("libraries do not answer yet; starting without them")
        self._started = True
        return first_scan

    async def use_libraries(self, libraries: Iterable[str]) -> None:
        """Set the libraries; models of all others are unpublished before this returns."""
        self._scan_now.set()
        if tuple(libraries) == self._libraries:
            return
        self._libraries = tuple(libraries)
        self._scans = {path: scan for path, scan in self._scans.items() if path in self._libraries}
        await self._update()

    async def refresh(self) -> None:
        """Scan all libraries by listing and stat. New files are hashed afterwards, in the background."""
        async with self._scan_lock:
            libraries = self._libraries
            scans = dict(zip(libraries, await asyncio.gather(*map(self._scan, libraries)), strict=True))
            # The setting may have changed meanwhile; a library that came is scanned next.
            self._scans = {path: scan for path, scan in scans.items() if path in self._libraries}
            self._unusable.clear()
            self._drop_obsolete_hashes()
            await self._update()

    async def handle_bad_blob(self, sha256: str, checked: VerificationResult | None) -> list[ModelId]:
        """Handle a library blob that is corrupt, or gone (None); return the models that this makes incomplete."""
        before = set(self._ledger.complete_manifests)
        file = self._ledger.libraries.blobs.get(sha256)
        known = self._verified.get(file.absolute_path) if file else None
        if file and known and checked and checked.stat.mtime_ns == file.stat.mtime_ns and known.stat == file.stat:
            self._verified[file.absolute_path] = structs.replace(known, corrupt=True)
            self._unsaved = True
            await self._save(now=True)
            await self._update()
        else:
            await self.refresh()
        return sorted(before - self._ledger.complete_manifests.keys())

    async def save_hashes(self) -> None:
        """Save the known hashes at shutdown, so that files are not hashed again."""
        await self._save(now=True)

    # Background tasks

    async def scan_forever(self) -> None:
        """Scan the libraries at intervals, forever."""
        while True:
            try:
                async with asyncio.timeout(SCAN_INTERVAL_S):
                    await self._scan_now.wait()
            except TimeoutError:
                pass
            self._scan_now.clear()
            await self._try_refresh()

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except (OSError, ShoalError) as e:
            log.warning("library scan failed; retrying", error=str(e))

    async def hash_forever(self) -> None:
        """Hash new files forever, the smallest model first."""
        while True:
            self._hash_now.clear()
            while waiting := [c for c in self._acceptance.waiting if c.directory not in self._unusable]:
                try:
                    await self._hash(min(waiting, key=lambda c: (self._unhashed_bytes(c), c.directory)))
                    await self._update()
                except (OSError, ShoalError) as e:
                    log.warning("library model cannot be offered; retrying", error=str(e))
                    break
            await self._hash_now.wait()

    # Scanning

    async def _scan(self, library: str) -> _LibraryScan:
        try:
            scan = await self._scanning.run(library, partial(self._scan_blocking, library), _SCAN_DEADLINE_S)
        except TimeoutError:
            scan = _LibraryScan(library, error="it does not answer")
        before = self._scans.get(library)
        if scan.error and (before is None or before.error != scan.error):
            log.warning("library cannot be scanned", library=library, error=scan.error)
        for directory, reason in scan.result.refused.items():
            if before is None or directory not in before.result.refused:
                log.warning("library model not offered", directory=directory, reason=reason)
        return scan

    def _scan_blocking(self, library: str) -> _LibraryScan:
        real = str(resolve_path(library))
        try:
            return _LibraryScan(real, recognize(list_library(library, self._store.check_stopping)))
        except LibraryUnreadable as e:
            return _LibraryScan(real, error=str(e))

    def _drop_obsolete_hashes(self) -> None:
        """Drop the hashes of files that are in no library now; keep those of libraries that cannot be scanned."""
        present = {f.absolute_path for scan in self._scans.values() for c in scan.result.candidates for f in c.files}
        unreadable = tuple(f"{scan.real}/" for scan in self._scans.values() if scan.error)
        current = {path: v for path, v in self._verified.items() if path in present or path.startswith(unreadable)}
        self._unsaved |= len(current) < len(self._verified)
        self._verified = current

    # Hashing

    def _unhashed_bytes(self, candidate: ModelCandidate) -> int:
        return sum(f.stat.size_bytes for f in candidate.files if not is_verified(f, self._verified))

    async def _hash(self, candidate: ModelCandidate) -> None:
        hashed_count = hashed_bytes = 0
        for file in candidate.files:
            if is_verified(file, self._verified):
                continue
            if file.absolute_path not in self._needed_paths:
                return

            def check_needed(path: str = file.absolute_path) -> None:
                self._store.check_stopping()
                if path not in self._needed_paths:
                    raise _HashAborted

            try:
                digests = await start_daemon_call(hash_file, file, check_needed)
            except _HashAborted:
                return
            except OSError as e:
                reason = f"{file.path} cannot be read: {e.strerror}"
                self._unusable[candidate.directory] = reason
                log.warning("library model not offered", directory=candidate.directory, reason=reason)
                return
            if digests is None:
                self._unusable[candidate.directory] = f"{file.path} changes while it is read"
                return
            self._verified[file.absolute_path] = VerifiedFile(
                stat=file.stat, sha256=digests.sha256, git_sha1=digests.git_sha1
            )
            self._unsaved = True
            hashed_count, hashed_bytes = hashed_count + 1, hashed_bytes + digests.size_bytes
            await self._save()
        log.info("library model hashed", directory=candidate.directory, files=hashed_count, bytes=hashed_bytes)

    async def _save(self, now: bool = False) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._unsaved and (now or now_s - self._saved_s >= _WRITE_INTERVAL_S):
            self._unsaved, self._saved_s = False, now_s
            await asyncio.to_thread(library_records.write_verified, self._layout, dict(self._verified))

    # Offering models

    async def _update(self) -> None:
        """Make ledger, store and published state match what was scanned and hashed so far."""
        async with self._apply_lock:
            candidates = [
                c for path in self._libraries if path in self._scans for c in self._scans[path].result.candidates
            ]
            self._acceptance = acceptance = await asyncio.to_thread(accept_models, candidates, dict(self._verified))
            self._needed_paths = frozenset(f.absolute_path for c in acceptance.waiting for f in c.files)
            # Saved before models are published: after a kill nothing has to be hashed again.
            await self._save(now=not acceptance.waiting)
            await self._apply(acceptance.accepted)
            await self._report_corrupt(acceptance)
            self._states = [self._state(path) for path in self._libraries]
            if self._started:  # startup publishes everything once by itself
                await self._context.publishing.publish_soon()
        self._hash_now.set()

    async def _apply(self, accepted: dict[ModelId, LibraryModel]) -> None:
        """Unpublish and offer library models, then update the store's: one model in each hold of the section."""
        ledger = self._ledger
        async with self._context.section as held:
            held.require()
            earlier = dict(ledger.libraries.models)
            ledger.libraries.set_models({m: a for m, a in earlier.items() if m in accepted})
        for model in [m for m in {**earlier, **dict.fromkeys(self._offered_earlier)} if m not in accepted]:
            await self._withdraw(model)
        self._offered_earlier.clear()
        await self._offer({m: a for m, a in accepted.items() if earlier.get(m) != a})
        async with self._context.section as held:
            held.require()
            incomplete, completed = ledger.recompute_completeness()
            self._context.publishing.notify(*incomplete)
        for model in incomplete:
            log.warning("model is incomplete, it used files of a library; pull it again", model=model)
        for model in [m.model for m in ledger.manifests.values() if self._uses_libraries(m)]:
            async with self._context.section as held:
                await self._link(held, model, model in completed)

    def _uses_libraries(self, manifest: Manifest) -> bool:
        return not all(blob in self._ledger.blobs for blob in manifest.blob_sizes)

    async def _link(self, held: Held, model: ModelId, is_completed: bool) -> None:
        """Link the view of a model of the store that uses files of libraries: they may be others now."""
        held.require()
        manifest = self._ledger.manifests.get(model)
        if manifest is None or not self._uses_libraries(manifest):
            return
        try:
            await asyncio.to_thread(link_view, self._store, manifest)
        except OSError as e:
            log.warning("view of a model with library files cannot be built", model=model, error=str(e))
            return
        if is_completed:
            self._context.publishing.notify(model)
            log.info("model is complete again, with files of a library", model=model)

    async def _withdraw(self, model: ModelId) -> None:
        async with self._context.section as held:
            held.require()
            in_store = model in self._ledger.stored_manifests
            await asyncio.to_thread(library_records.unmark_offered, self._layout, model, not in_store)
            self._context.publishing.notify(model)
        log.warning("library model is gone or has changed", model=model)
        await self._context.events.emit("library_model_removed", model=model)

    async def _offer(self, new_models: dict[ModelId, LibraryModel]) -> None:
        """Offer new library models, except those the store cannot record: its disk may be full."""
        # Recorded before the ledger has them: who finds a model there finds its files.
        failed: dict[ModelId, OSError] = {}
        try:
            await self._record_locations(new_models)
        except OSError as e:
            failed = dict.fromkeys(new_models, e)
            log.warning("locations of library blobs cannot be recorded", error=str(e))
        for model in new_models.keys() - failed.keys():
            library_model = new_models[model]
            try:
                is_new = await asyncio.to_thread(library_records.mark_offered, self._layout, model)
                async with self._context.section as held:
                    await self._add(held, library_model)
            except OSError as e:
                failed[model] = e
                continue
            if is_new:
                log.info("library model offered", model=model, directory=library_model.directory)
                await self._context.events.emit("library_model_found", model=model, directory=library_model.directory)
        for model, error in failed.items():
            reason = f"it cannot be recorded in the store: {error.strerror}"
            self._unusable[new_models[model].directory] = reason
            log.warning("library model not offered", directory=new_models[model].directory, reason=reason)
        if failed:
            async with self._context.section as held:
                held.require()
                libraries = self._ledger.libraries
                libraries.set_models({m: a for m, a in libraries.models.items() if m not in failed})
                self._context.publishing.notify(*failed)

    async def _add(self, held: Held, library_model: LibraryModel) -> None:
        held.require()
        ledger, model = self._ledger, library_model.manifest.model
        if model not in ledger.stored_manifests:
            await asyncio.to_thread(library_records.build_view, self._layout, library_model)
        ledger.libraries.set_models({**ledger.libraries.models, model: library_model})
        self._context.publishing.notify(model)

    async def _record_locations(self, new_models: Mapping[ModelId, LibraryModel]) -> None:
        """Record where each library blob is; delete all other records."""
        blobs = blob_files({**self._ledger.libraries.models, **new_models})
        if blobs != self._recorded or not blobs:
            changed = {sha256: f for sha256, f in blobs.items() if self._recorded.get(sha256) != f}
            await asyncio.to_thread(library_records.record_locations, self._layout, changed, blobs)
            self._recorded = blobs

    # Reporting

    async def _report_corrupt(self, acceptance: AcceptanceResult) -> None:
        """Report each corrupt file once; those found by the first scan are logged but emit no event."""
        for path, directory in acceptance.corrupt.items():
            if self._reported_corrupt is None or path not in self._reported_corrupt:
                log.warning("library file is corrupt; its model is not offered", path=path)
                if self._reported_corrupt is not None:
                    await self._context.events.emit("library_model_corrupt", path=path, directory=directory)
        self._reported_corrupt = set(acceptance.corrupt)

    def states(self) -> list[LibraryState]:
        """Return the published state of all libraries, as of the last update."""
        return self._states

    def _state(self, library: str) -> LibraryState:
        scan = self._scans.get(library)
        if scan is None or scan.error:
            return LibraryState(path=library, error=scan.error if scan else "it has not been scanned yet")
        directories = {c.directory for c in scan.result.candidates}
        waiting = [c for c in self._acceptance.waiting if c.directory in directories]
        refused = dict(scan.result.refused)
        refused |= {
            d: reason for d, reason in (self._acceptance.refused | self._unusable).items() if d in directories
        }
        return LibraryState(
            path=library,
            model_count=sum(a.directory in directories for a in self._ledger.libraries.models.values()),
            unhashed_count=len(waiting),
            unhashed_bytes=sum(map(self._unhashed_bytes, waiting)),
            rejected=dict(sorted(refused.items())[:_MAX_NAMED]),
            rejected_count=len(refused),
        )
