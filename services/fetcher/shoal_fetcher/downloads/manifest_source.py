"""The manifest of a download as nodes have it: this one, or another that the hub confirms."""

from __future__ import annotations

from msgspec import structs

from shoal_common.errors import NotFound, ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import GetManifest
from shoal_common.names import ModelRef, is_commit
from shoal_fetcher.downloads.model_fetch import DownloadContext
from shoal_fetcher.sources.manifest_diff import difference, names_itself, with_listed_names

log = StructuredLogger("download")


class ManifestSource:
    """Finds the manifest of one model on nodes."""

    def __init__(self, ref: ModelRef, context: DownloadContext) -> None:
        self._ref, self._context = ref, context
        self.peer = ""
        """The node that the last manifest is from, if the hub confirmed it, which lists no sha256 of small files."""

    async def own(self) -> Manifest | None:
        """Return this node's manifest of a commit, also of an incomplete model: repair needs no other node."""
        self.peer = ""
        if not is_commit(self._ref.revision):
            return None  # only others know which commit a branch names now
        request = GetManifest(model=str(self._ref), include_incomplete=True)
        node = self._context.node
        try:
            manifest = await self._context.rpc("storage", node, "manifest", request, Manifest)
        except ShoalError as e:
            log.debug("no manifest on this node", model=str(self._ref), reason=e.message)
            return None
        return await self._checked(manifest, node) if manifest.commit == self._ref.revision else None

    async def of_nodes(self) -> Manifest | None:
        """Return the manifest of a live node that has the model."""
        for node, model in self._context.cluster_view.nodes_holding(self._ref):
            try:
                manifest = await self._context.rpc("storage", node, "manifest", GetManifest(model=model), Manifest)
            except ShoalError as e:
                log.info("a node did not return its manifest", peer=node, reason=e.message)
                continue
            if manifest.model != model or not manifest.sealed:
                log.warning("a node returned the wrong manifest", peer=node, model=model)
                continue
            if checked := await self._checked(manifest, node):
                return structs.replace(checked, revisions=[self._ref.revision])
        return None

    async def _checked(self, manifest: Manifest, node: str) -> Manifest | None:
        """Return a node's manifest if the hub lists the same, or cannot be asked; None if it differs."""
        is_own = node == self._context.node
        if names_itself(manifest) or (is_own and not manifest.unchecked_from):
            return manifest
        source = manifest.unchecked_from if is_own else node
        try:
            listing = await self._context.listings.listing(ModelRef(manifest.repo, manifest.commit))
            reason = difference(manifest, listing)
        except ShoalError as e:
            if not await self._is_unknown_commit(e):
                log.info("manifest used unchecked", model=manifest.model, peer=source, reason=e.message)
                return structs.replace(manifest, unchecked_from=source)
            reason = "the hub has this model, and no such commit of it"
        if reason:
            log.warning(
                "manifest refused: it differs from the hub's", model=manifest.model, peer=source, reason=reason
            )
            await self._context.events.emit("manifest_refused", model=manifest.model, peer=source, reason=reason)
            return None
        self.peer = source
        return with_listed_names(manifest, listing)

    async def _is_unknown_commit(self, error: ShoalError) -> bool:
        """Return whether the hub shows the revision that was asked for, and not the commit that a node says it is."""
        if is_commit(self._ref.revision) or not isinstance(error, NotFound):
            return False  # private and gated models cannot be checked without a token
        try:
            await self._context.listings.listing(self._ref)
        except ShoalError:
            return False
        return True
