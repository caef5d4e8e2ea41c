"""What the parts of storage share."""

from __future__ import annotations

import asyncio

from shoal_common.bus.events import EventEmitter
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.service import ServiceContext, certificates_in
from shoal_common.settings.node import StorageSettings
from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.publish_queue import PublishQueue
from shoal_storage.section import CriticalSection
from shoal_storage.store.seals import BlobSeals
from shoal_storage.store.store import Store


class StorageContext:
    """The service, its disk, its settings, and the critical section. `specs` mirrors all of `spec`."""

    def __init__(
        self, service: ServiceContext, store: Store, ledger: Ledger, settings: StorageSettings, specs: KvMirror
    ) -> None:
        self.service, self.store, self.ledger, self.specs = service, store, ledger, specs
        self.settings = settings
        """The settings in force. `configure` replaces them."""
        self.section = CriticalSection()
        self.metadata = MetadataFiles(store.layout, ledger)
        self.publishing = PublishQueue()
        self.seals = BlobSeals(
            store, service.config.identity, certificates_in(specs), lambda: self.settings.trust_sealers
        )
        self.model_ready = asyncio.Event()
        """Set when a model has become ready: blobs of it may still have to be hashed here."""

    @property
    def node(self) -> str:
        """The node's id."""
        return self.service.node

    @property
    def events(self) -> EventEmitter:
        """Emits the service's events."""
        return self.service.events
