"""What all fetches of this node share, and the state of one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from shoal_common.bus.connection import Nats
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_fetcher.cluster_view import Surroundings
from shoal_fetcher.hub.client import Hub
from shoal_fetcher.partials.partial_blob import PartialBlob
from shoal_fetcher.progress import Progress
from shoal_fetcher.rate_limits import Limits
from shoal_fetcher.sources.failure_policy import Holding, Setbacks
from shoal_fetcher.swarm.peer_client import Peers


class Shared(msgspec.Struct):
    """What all fetches of this node share."""

    node: str
    uid: str
    nats: Nats
    buckets: Buckets
    around: Surroundings
    hub: Hub
    limits: Limits
    peers: Peers
    busy: Counter[str]
    """How many blobs are being read whole from a node, by node."""


class Fetch(msgspec.Struct):
    """One attempt to fetch a blob."""

    shared: Shared
    manifest: Manifest
    file: ManifestFile
    partial: PartialBlob
    setbacks: Setbacks
    progress: Progress
    wanted: int
    """LeafSet to fetch."""
    changed: Callable[[], None]
    """Wakes the swarm's main loop."""

    @property
    def blob(self) -> str:
        """The name of the blob."""
        return self.file.blob

    def missing(self) -> int:
        """Return the wanted leaves that are not written yet."""
        return self.wanted & ~self.partial.here

    def holders(self) -> list[Holding]:
        """Return live nodes that have the complete blob and may be asked."""
        return self.setbacks.usable(self.shared.around.holders(self.blob, self.manifest))

    def returning(self) -> list[Holding]:
        """Return nodes that have the complete blob and whose fileserver is starting."""
        return self.setbacks.usable(self.shared.around.returning(self.blob, self.manifest))

    def has_hopes(self) -> bool:
        """Return whether a refusal by the hub is not final, because a node has the blob."""
        return bool(self.setbacks.trusted(self.shared.around.holders(self.blob, self.manifest)))
