"""What all fetches of this node share, and what is known of one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from shoal_common.buckets import Buckets
from shoal_common.connection import Nats
from shoal_common.messages.records import Manifest, ManifestFile
from shoal_fetcher.decide import Holding, Setbacks
from shoal_fetcher.hub import Hub
from shoal_fetcher.limits import Limits
from shoal_fetcher.partial import PartialBlob
from shoal_fetcher.progress import Progress
from shoal_fetcher.surroundings import Surroundings
from shoal_fetcher.swarm.peers import Peers


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
    """How many blobs are read from a node whole, by node."""


class Fetch(msgspec.Struct):
    """A blob on its way, in one attempt."""

    shared: Shared
    manifest: Manifest
    file: ManifestFile
    partial: PartialBlob
    setbacks: Setbacks
    progress: Progress
    wanted: int
    """Set of leaves."""
    changed: Callable[[], None]
    """Wakes whoever decides what is next."""

    @property
    def blob(self) -> str:
        """What it is called."""
        return self.file.blob

    def missing(self) -> int:
        """Leaves that are wanted and not here."""
        return self.wanted & ~self.partial.here

    def holders(self) -> list[Holding]:
        """Live nodes that have it whole and may be asked."""
        return self.setbacks.usable(self.shared.around.holders(self.blob, self.manifest))

    def returning(self) -> list[Holding]:
        """Nodes that have it whole, whose fileserver is starting."""
        return self.setbacks.usable(self.shared.around.returning(self.blob, self.manifest))

    def has_hopes(self) -> bool:
        """Whether a hub that refuses is not the end: somebody has it."""
        return bool(self.setbacks.trusted(self.shared.around.holders(self.blob, self.manifest)))
