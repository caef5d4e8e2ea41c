"""What all fetches of this node share, and the state of one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from shoal_common.bus.connection import Nats
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.errors import Denied
from shoal_common.identity.seals import SealKeeper
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.hub.client import HubClient
from shoal_fetcher.partials.blocking import LeafWorkers
from shoal_fetcher.partials.partial_blob import PartialBlob
from shoal_fetcher.progress import Progress
from shoal_fetcher.rate_limits import RateLimits
from shoal_fetcher.sources.failure_policy import BlobHolder, SourceHealth
from shoal_fetcher.swarm.peer_client import FileserverClient


class NodeFetchContext(msgspec.Struct):
    """What all fetches of this node share."""

    node: str
    uid: str
    nats: Nats
    buckets: Buckets
    cluster_view: ClusterView
    hub: HubClient
    rate_limits: RateLimits
    peers: FileserverClient
    layout: StorePaths
    workers: LeafWorkers
    seals: SealKeeper
    serves_peers: bool = True
    """Whether others may read from this node: else it must not be the one that reads for all."""
    read_counts: Counter[str] = msgspec.field(default_factory=Counter)
    """How many blobs are being read whole from a node, by node."""

    def is_denied(self, manifest: Manifest, progress: Progress) -> bool:
        """Return whether the hub refuses us this model, so that we wait for a node that may read it there.

        Raises Denied if there is no such node.
        """
        denial = self.hub.tokens.denial(manifest.repo)
        progress.set_denied(denial is not None)
        if denial is None:
            return False
        others = self.allowed_by_hub(manifest)
        if not others:
            raise Denied(denial.message, **denial.details)
        progress.wait_for_others(others)
        return True

    def allowed_by_hub(self, manifest: Manifest) -> dict[str, int]:
        """Return the nodes that may read this model from the hub for us, with the bytes that they have."""
        return self.cluster_view.allowed_by_hub(manifest.repo, manifest.commit)

    def partial_blob(self, file: ManifestFile) -> PartialBlob:
        """Return the partial blob of a file, not yet open."""
        return PartialBlob(self.layout, self.workers, file.blob, file.size_bytes)


class BlobFetchContext(msgspec.Struct):
    """One attempt to fetch a blob."""

    node_context: NodeFetchContext
    manifest: Manifest
    file: ManifestFile
    partial: PartialBlob
    health: SourceHealth
    progress: Progress
    wanted: int
    """The leaves to fetch."""
    notify: Callable[[], None]
    """Wakes the swarm's main loop."""

    @property
    def blob(self) -> str:
        """The name of the blob."""
        return self.file.blob

    def missing(self) -> int:
        """Return the wanted leaves that are not written yet."""
        return self.wanted & ~self.partial.written

    def holders(self) -> list[BlobHolder]:
        """Return live nodes that have the complete blob and may be asked."""
        return self.health.askable(self.node_context.cluster_view.holders(self.blob, self.manifest))

    def holders_restarting(self) -> list[BlobHolder]:
        """Return nodes that have the complete blob and whose fileserver is starting."""
        return self.health.askable(self.node_context.cluster_view.holders_restarting(self.blob, self.manifest))

    def has_other_source(self) -> bool:
        """Return whether a refusal by the hub is not final: a node has the blob, or may read it there."""
        node_context = self.node_context
        holders = node_context.cluster_view.holders(self.blob, self.manifest)
        return bool(self.health.not_banned(holders) or node_context.allowed_by_hub(self.manifest))
