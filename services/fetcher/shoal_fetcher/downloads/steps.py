"""The work of one attempt of a download. Each piece of work ends as one event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec import structs

from shoal_common.errors import Denied, InternalError, ShoalError, Unsupported
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelRef, model_id
from shoal_fetcher.downloads import events as ev
from shoal_fetcher.downloads.manifest_source import ManifestSource
from shoal_fetcher.downloads.model_fetch import DownloadContext, FetchPlan, FileFetcher, ModelFetch
from shoal_fetcher.downloads.shard_fetch import ShardFetch, sealed_lists
from shoal_fetcher.downloads.space_check import find_shortage
from shoal_fetcher.downloads.state_machine import NO_PROGRESS_TIMEOUT_S
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.leaf_selection import weight_files
from shoal_fetcher.sources.manifest_diff import by_git_name
from shoal_fetcher.sources.runnable import unsupported_format, unsupported_message

log = StructuredLogger("download")

_POLL_INTERVAL_S = 5.0
_MIN_CHECK_INTERVAL_S = 1.0
"""Between two requests to storage for space, however often the disk changes."""


class DownloadSteps:
    """Resolves, reserves, fetches and seals one model, as it is told to."""

    def __init__(
        self,
        ref: ModelRef,
        layers: list[list[int]],
        context: DownloadContext,
        progress: Progress,
        is_needed_elsewhere: Callable[[str], bool],
    ) -> None:
        self._ref, self._layers, self._context, self._progress = ref, layers, context, progress
        self._is_needed_elsewhere = is_needed_elsewhere
        self._earlier_blobs = set(progress.state.blobs)
        self._source = ManifestSource(ref, context)
        self._manifest: Manifest | None = None
        self._plan: FetchPlan | None = None
        self._disk: tuple[object, ...] = ()

    async def run(self, work: ev.Work) -> ev.DownloadEvent:
        """Do the work. Raises nothing but CancelledError: a failure is an event."""
        try:
            return await self._run(work)
        except Exception as e:  # noqa: BLE001  # one failed download must not end the others
            error = as_shoal_error(e, self._ref)
            what = type(work).__name__
            log.warning("work failed", what=what, model=str(self._ref), reason=error.message, code=error.code)
            return ev.WorkFailed(error, self._progress.done_bytes, may_retry=not self._context.hub.offline)

    async def _run(self, work: ev.Work) -> ev.DownloadEvent:
        match work:
            case ev.Wait(seconds):
                await asyncio.sleep(seconds)
                return ev.WaitOver()
            case ev.Resolve():
                return await self._resolve()
            case ev.AskForSpace():
                return await self._check_space(work)
        assert self._plan is not None, "it is resolved first"
        match work:
            case ev.ReserveSpace(again):
                return await self._reserve(self._plan, again)
            case ev.Fetch():
                self._progress.mark_progress()
                return await self._plan.fetch()
        assert isinstance(work, ev.Seal)
        await self._plan.seal()
        return ev.Sealed()

    async def release(self) -> None:
        """Release the reservation, unless another download of this node needs the same commit. Raises ShoalError."""
        commit = self._progress.state.commit
        if not commit or self._is_needed_elsewhere(commit):
            return
        try:
            blobs = {*self._earlier_blobs, *self._progress.state.blobs}
            await self._context.storage.release(model_id(self._ref.repo, commit), blobs)
        except ShoalError as e:
            log.warning("could not release a reservation", model=str(self._ref), reason=e.message)
            raise

    async def _resolve(self) -> ev.DownloadEvent:
        """Get the manifest: from this node (even if incomplete), another that has the model, or the hub."""
        self._context.hub.tokens.forget_denial(self._ref.repo)
        manifest = await self._source.own()
        if manifest is None:
            manifest = await self._source.of_nodes() or await self._hub_manifest()
            self._require_runnable(manifest)
        if self._progress.state.commit not in ("", manifest.commit):
            log.info("revision moved to another commit", model=str(self._ref), commit=manifest.commit)
            await self.release()
        self._progress.set_state(structs.replace(self._progress.state, commit=manifest.commit))
        self._manifest, lists = manifest, None
        can_verify_parts = not (self._source.peer and any(f.git_sha1 for f in weight_files(manifest)))
        if self._layers and can_verify_parts:
            context = self._context
            lists = await sealed_lists(manifest, context.cluster_view, context.leaf_lists, context.seals)
        if lists is None:
            self._plan = self._whole_model()
            return ev.Resolved([])
        files = FileFetcher(str(self._ref), manifest, self._context, self._progress)
        self._plan = ShardFetch(
            manifest, self._layers, lists, self._context, self._progress, files, self._source.peer
        )
        return ev.Resolved(self._layers)

    def _require_runnable(self, manifest: Manifest) -> None:
        """Raise Unsupported for a model in a format that cannot run here, unless it is here or insisted on."""
        context, request = self._context, self._context.requests.get(str(self._ref))
        is_here = (context.node, manifest.model) in context.cluster_view.nodes_holding(self._ref)
        if not is_here and not (request and request.force) and (formats := unsupported_format(manifest)):
            raise Unsupported(unsupported_message(manifest, formats), size_bytes=manifest.size_bytes)

    async def _hub_manifest(self) -> Manifest:
        """Ask the hub. If it refuses, wait for the model of a node to which it does not."""
        hub, cluster_view, progress = self._context.hub, self._context.cluster_view, self._progress
        try:
            return await hub.resolve(self._ref)
        except Denied as e:
            denied = e
        progress.mark_progress()
        while hub.tokens.denial(self._ref.repo) is not None:
            progress.set_denied(True)
            version = cluster_view.version()
            if (manifest := await self._source.of_nodes()) is not None:
                return manifest
            others = cluster_view.allowed_by_hub(self._ref.repo, "")
            if not others or progress.stalled_s > NO_PROGRESS_TIMEOUT_S:
                raise denied
            progress.wait_for_others(others)
            await cluster_view.wait_changed(version, _POLL_INTERVAL_S)
        return await hub.resolve(self._ref)

    async def _reserve(self, plan: FetchPlan, again: bool) -> ev.DownloadEvent:
        reserved = await plan.reserve(again)
        if reserved.is_whole_model:
            self._plan = self._whole_model()
        return reserved

    def _whole_model(self) -> ModelFetch:
        assert self._manifest is not None
        if self._source.peer:
            self._manifest, sha256_by_git_name = by_git_name(self._manifest)
            self._context.cluster_view.learn_sha256(sha256_by_git_name)
        files = FileFetcher(str(self._ref), self._manifest, self._context, self._progress)
        return ModelFetch(self._manifest, self._context, self._progress, files)

    async def _check_space(self, check: ev.AskForSpace) -> ev.DownloadEvent:
        assert self._manifest is not None, "only a download that is resolved has met a full disk"
        cluster_view = self._context.cluster_view
        if check.after_s:
            await asyncio.sleep(_MIN_CHECK_INTERVAL_S)
            await cluster_view.wait_disk_changed(self._disk, check.after_s)
        self._disk = cluster_view.disk_status()
        storage, layout, model = self._context.storage, self._context.layout, self._manifest.model
        try:
            shortage = await find_shortage(storage, layout, model, check.blob)
        except ShoalError as e:
            log.warning("storage did not report its free space", model=model, reason=e.message)
            return ev.SpaceShort(None)
        if shortage is not None:
            return ev.SpaceShort(shortage)
        log.info("free space again, download resumes", model=model)
        self._progress.mark_progress()
        return ev.SpaceFree()


def as_shoal_error(error: Exception, ref: ModelRef) -> ShoalError:
    """Return an error as a ShoalError; unexpected ones are logged with their traceback."""
    if isinstance(error, ShoalError):
        return error
    log.error("download failed unexpectedly", exc=error, model=str(ref))
    return InternalError(f"the download of {ref} failed: {type(error).__name__}: {error}; see the fetcher's log")
