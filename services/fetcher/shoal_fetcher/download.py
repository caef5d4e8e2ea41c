"""One download, from `queued` to its end: resolve, reserve, fetch every missing blob, seal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from msgspec import structs

from shoal_common import clock, telemetry
from shoal_common.buckets import Buckets, download_key
from shoal_common.errors import DiskFull, Failed, HubUnavailable, Paused, ShoalError, Withdrawn
from shoal_common.layout import Layout
from shoal_common.logs import Log
from shoal_common.messages.questions import AskManifest
from shoal_common.messages.records import ENDED, DownloadPhase, DownloadState, Manifest, ManifestFile
from shoal_common.names import ModelRef, is_commit
from shoal_common.questions import Ask
from shoal_fetcher.blobs import BlobFetcher
from shoal_fetcher.blocked import Blockage
from shoal_fetcher.decide import ended_as, retry_delay_s, sealed
from shoal_fetcher.errors import RateLimited, ReservationLost
from shoal_fetcher.hub import Hub
from shoal_fetcher.partial import held_bytes
from shoal_fetcher.parts import Lists, PartFetch, sealed_lists
from shoal_fetcher.progress import Progress
from shoal_fetcher.storage import Storage
from shoal_fetcher.surroundings import Surroundings
from shoal_fetcher.wishes import Wishes

log = Log("download")

_RESOLVE_TRIES = 4
_RESERVE_TRIES = 3
_FILES_IN_HAND = 32
"""Files of one download that wait for a source or arrive; the rest waits for these."""


class Download:
    """A model on its way to this node. `run` it as a task; `ended` tells how it ended."""

    def __init__(
        self,
        ref: ModelRef,
        node: str,
        layout: Layout,
        buckets: Buckets,
        ask: Ask,
        storage: Storage,
        hub: Hub,
        around: Surroundings,
        blobs: BlobFetcher,
        wishes: Wishes,
        leaf_lists: Lists,
        layers: list[list[int]],
        before: DownloadState | None,
        ended: asyncio.Future[DownloadState] | None,
        wanted_elsewhere: Callable[[Download], bool],
    ) -> None:
        self.ref, self._node, self._layout = ref, node, layout
        self._buckets, self._ask, self._storage, self._hub = buckets, ask, storage, hub
        self._around, self._blobs, self._wishes, self._leaf_lists = around, blobs, wishes, leaf_lists
        self.layers = layers
        """Of which layers it brings what is needed; none: all of the model."""
        self._wanted_elsewhere = wanted_elsewhere
        self._key = download_key(node, str(ref))
        self._reserved_commit = before.commit if before else ""
        """Of what, if anything, storage may hold a reservation made for this download, in this life or an earlier."""
        self._blobs_before = before.blobs if before else []
        self._resumed_told = False
        self._ending = False
        now_s = round(clock.now_s(), 3)
        state = before or DownloadState(node=node, model=str(ref), phase="queued", started_at_s=now_s)
        if state.phase in ENDED:
            state = structs.replace(state, sources={}, switched={}, started_at_s=now_s, blocked_since_s=0.0)
        # After a restart of this service the story goes on. What an ended download left on the disk counts as well,
        # until storage says what is there: a hub that is down must not cost what has arrived.
        self.progress = Progress(
            buckets.state, structs.replace(state, phase="queued", resumed_bytes=0, layers=layers)
        )
        self._blockage = Blockage(self.progress, storage, around, layout)
        self.ended = ended or asyncio.get_running_loop().create_future()
        self.ended.add_done_callback(lambda f: f.cancelled() or f.exception())

    @property
    def commit(self) -> str:
        """The commit that is being fetched, once it is known."""
        return self._reserved_commit

    async def run(self) -> None:
        """Bring the model in. Ends with `ended` set, the state written and the wish for it withdrawn."""
        publishing = asyncio.create_task(self.progress.publish_forever())
        try:
            with telemetry.step("transfer", model=str(self.ref)), telemetry.download_under_way():
                await self._bring_in()
            self._ending = True
            await self._end("ready", None)
        except Exception as e:  # noqa: BLE001  # whoever asked is owed an end; one bad download must not end the others
            self._ending = True
            error = _ours(e, self.ref)
            log.warning("download ended", model=str(self.ref), why=error.message, code=error.code)
            if not self.progress.done_bytes:
                with suppress(ShoalError):
                    await self._release()
            await self._end(ended_as(error), error)
        finally:
            publishing.cancel()
            await self.progress.close()

    async def stop(self, running: asyncio.Task[None]) -> bool:
        """Stop, and keep what has arrived and what is reserved. False: it has ended by itself."""
        if not self._ending:  # an end that has begun is not cut in half
            running.cancel()
        await asyncio.wait({running})
        return not self.ended.done()

    async def say_paused(self, why: Paused) -> None:
        """A person has stopped it: say so, to those too who wait for it."""
        if not self.ended.done():
            self.ended.set_exception(why)
        await self.progress.say(phase="paused", error=None, waiting_for="", blocked_since_s=0.0)

    async def withdraw(self, running: asyncio.Task[None]) -> None:
        """Stop, forget the wish and give back what was reserved. Idempotent.

        Raises when storage is away: the state stays then, so that the next attempt, or the next start, goes on here.
        """
        await self.stop(running)
        why = Withdrawn(f"the download of {self.ref} was withdrawn")
        if not self.ended.done():
            self.ended.set_exception(why)
        await self._wishes.end(str(self.ref), why)
        await self._release()
        await self._buckets.state.delete(self._key)

    async def _end(self, phase: DownloadPhase, error: ShoalError | None) -> None:
        body = error.body() if error else None
        await self.progress.say(phase=phase, error=body, waiting_for="", blocked_since_s=0.0)
        # The wish has been answered. Were it kept, a model lost later would come back uninvited.
        await self._wishes.end(str(self.ref), error or self.progress.state)
        if not self.ended.done():
            if error is None:
                self.ended.set_result(self.progress.state)
            else:
                self.ended.set_exception(error)

    async def _release(self) -> None:
        """Give back what was reserved, unless another download here brings the same commit."""
        if not self._reserved_commit or self._wanted_elsewhere(self):
            return
        blobs = {*self._blobs_before, *self.progress.state.blobs}
        try:
            await self._storage.release(self.ref.repo, self._reserved_commit, blobs)
        except ShoalError as e:
            log.warning("a reservation could not be given back", model=str(self.ref), why=e.message)
            raise

    async def _bring_in(self) -> None:
        await self.progress.say(phase="queued", error=None, waiting_for="")
        manifest = await self._resolve()
        if self._reserved_commit not in ("", manifest.commit):
            log.info("the revision has moved on", model=str(self.ref), commit=manifest.commit)
            await self._release()
        self._reserved_commit = manifest.commit
        lost_count, durable_bytes = 0, 0
        while True:
            try:
                return await self._reserve_and_fetch(manifest)
            except ReservationLost as e:
                # It has ended, storage was restarted, or somebody removed files by hand: ask anew what is here.
                lost_count = 1 if self.progress.done_bytes > durable_bytes else lost_count + 1
                durable_bytes = max(durable_bytes, self.progress.done_bytes)
                if lost_count == _RESERVE_TRIES:
                    raise
                log.warning("reserving again", model=str(self.ref), why=e.message)
            except DiskFull as e:
                await self._blockage.wait_for_room(manifest.model, e)

    async def _resolve(self) -> Manifest:
        """The manifest: from this node, where it may be broken, or another that has the model; else from the hub."""
        for attempt in range(1, _RESOLVE_TRIES + 1):
            manifest = await self._from_this_disk() or await self._from_a_node()
            if manifest is not None:
                return manifest
            try:
                return await self._hub.resolve(self.ref)
            except HubUnavailable as e:
                if attempt == _RESOLVE_TRIES or self._hub.offline:
                    raise
                await self.progress.say(waiting_for=e.message)
                await asyncio.sleep(e.retry_after_s if isinstance(e, RateLimited) else retry_delay_s(attempt))
        raise AssertionError("the last try returns or raises")

    async def _from_a_node(self) -> Manifest | None:
        for node, model in self._around.nodes_with(self.ref):
            try:
                manifest = await self._ask("storage", node, "manifest", AskManifest(model=model), Manifest)
            except ShoalError as e:
                log.info("a node could not give its manifest", peer=node, why=e.message)
                continue
            if manifest.model == model and manifest.sealed:
                return structs.replace(manifest, revisions=[self.ref.revision])
            log.warning("a node gave another manifest than was asked for", peer=node, model=model)
        return None

    async def _from_this_disk(self) -> Manifest | None:
        """Of a commit that is here, though it has lost blobs: it is repaired though nobody else has it any more."""
        if not is_commit(self.ref.revision):
            return None  # what a branch stands for now only others can say
        question = AskManifest(model=str(self.ref), broken=True)
        try:
            manifest = await self._ask("storage", self._node, "manifest", question, Manifest)
        except ShoalError as e:
            log.info("this node has no manifest", model=str(self.ref), why=e.message)
            return None
        return manifest if manifest.commit == self.ref.revision else None

    async def _reserve_and_fetch(self, manifest: Manifest) -> None:
        if self.layers and await self._bring_part(manifest):
            return
        await self.progress.say(
            phase="reserving",
            commit=manifest.commit,
            total_bytes=manifest.size_bytes,
            waiting_for="storage",
            error=None,
            layers=self.layers,
        )
        reserved = await self._storage.reserve(manifest)
        known = dict(reserved.known)
        here = set(reserved.present)
        missing: list[ManifestFile] = []
        self.progress.restart()
        for blob, file in {f.blob: f for f in manifest.files}.items():
            sha256 = known.get(blob, blob)
            if sha256 in here:
                self.progress.whole(blob, sha256, file.size_bytes)
            else:
                here_bytes = await asyncio.to_thread(held_bytes, self._layout, blob, file.size_bytes)
                self.progress.durable(blob, here_bytes)
                missing.append(file)
        changes = {} if self._resumed_told else {"resumed_bytes": self.progress.done_bytes}
        self._resumed_told = True
        await self.progress.say(phase="fetching", waiting_for="", **changes)
        await self._fetch_all(manifest, [(file, None) for file in missing], known)
        await self.progress.say(phase="verifying", waiting_for="storage")
        await self._storage.seal(sealed(manifest, known))

    async def _bring_part(self, manifest: Manifest) -> bool:
        """Bring what the layers need. False: nobody says which leaves are right, or all is here: bring all of it."""
        lists = await sealed_lists(manifest, self._around, self._leaf_lists)
        if lists is not None:
            await self.progress.say(commit=manifest.commit, error=None)

            async def fetch(files: list[tuple[ManifestFile, int | None]]) -> None:
                await self._fetch_all(manifest, files, {})

            part = PartFetch(manifest, self.layers, lists, self._layout, self._storage, self.progress, fetch)
            if await part.bring_in():
                return True
        self.layers = []
        return False

    async def _fetch_all(
        self, manifest: Manifest, files: list[tuple[ManifestFile, int | None]], known: dict[str, str]
    ) -> None:
        in_hand = asyncio.Semaphore(_FILES_IN_HAND)

        async def one(file: ManifestFile, wanted: int | None) -> None:
            async with in_hand:
                sha256 = await self._blobs.fetch(manifest, file, self.progress, wanted)
            if sha256 != file.blob:
                known[file.blob] = sha256

        try:
            async with asyncio.TaskGroup() as tasks:
                # Largest first: the last file to finish is then a small one.
                for file, wanted in sorted(files, key=lambda pair: -pair[0].size_bytes):
                    tasks.create_task(one(file, wanted))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first failure has cancelled the others


def _ours(error: Exception, ref: ModelRef) -> ShoalError:
    """What went wrong, as one of our own errors."""
    if isinstance(error, ShoalError):
        return error
    log.error("a download failed", exc=error, model=str(ref))
    return Failed(f"the download of {ref} failed: {type(error).__name__}: {error}; see the fetcher's log")
