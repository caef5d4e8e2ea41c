"""The parts of a storage service in this process, on a real NATS and a real disk, for what a process cannot show."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shoal_common.bus.kv_mirror import KvMirror, follow_forever
from shoal_common.config import Config
from shoal_common.host.sd_notify import ServiceManagerNotifier
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.liveness.liveness import Liveness
from shoal_common.messages.storage import CommitBlob, EvictionPlan, Reserve, SealModel
from shoal_common.service import ServiceContext
from shoal_common.settings.node import StorageSettings
from shoal_storage.context import StorageContext
from shoal_storage.eviction.disk_full import DiskFullHandler
from shoal_storage.eviction.executor import EvictionExecutor
from shoal_storage.eviction.model_deleter import ModelDeleter
from shoal_storage.handlers.deletion import DeleteCommand
from shoal_storage.handlers.fetch import FetchApi
from shoal_storage.handlers.maintenance import MaintenanceApi
from shoal_storage.handlers.verify import Verifier
from shoal_storage.leases.last_use import UsageView
from shoal_storage.leases.service import LeaseService
from shoal_storage.libraries.service import LibraryService
from shoal_storage.publisher import StatePublisher
from shoal_storage.scan.reconciler import StoreReconciler
from shoal_storage.scan.unverified import UnverifiedBlobHasher
from shoal_storage.shards import ShardService
from shoal_storage.startup import recover_store
from shoal_storage.store.store import Store
from tests.harness.nats import Joined, NatsServer, joined
from tests.storage.store_fixtures import Model, check_invariants, put

GATE_DEADLINE_S = 45.0
UNLIMITED = StorageSettings(quota_bytes=None, headroom_bytes=0)


class GatedDisk(Store):
    """A disk with a gate at which a test may stop a step, and which may hide space that was freed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reached, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.claims_free_bytes: int | None = None

    def free_bytes(self) -> int:
        """The free space that the test sets."""
        return super().free_bytes() if self.claims_free_bytes is None else self.claims_free_bytes

    def close_gate(self) -> None:
        """Stop the next step that comes by."""
        self.reached.clear()
        self.gate.clear()

    def pass_gate(self) -> None:
        """Report that a step has come by, and wait until the gate is open."""
        self.reached.set()
        assert self.gate.wait(GATE_DEADLINE_S)

    async def wait_reached(self) -> None:
        """Return once a step waits at the gate."""
        assert await asyncio.to_thread(self.reached.wait, GATE_DEADLINE_S)


class StorageParts:
    """A service and its collaborators."""

    def __init__(
        self, here: Joined, home: Path, node: str, settings: StorageSettings, identity: NodeIdentity | None = None
    ) -> None:
        config = Config(service="storage", node=node, home=home, nats=[], identity=identity)
        liveness = Liveness(here.buckets.live, node, "storage")
        service = ServiceContext(config, {}, here.nats, liveness, ServiceManagerNotifier({}))
        self.here, self.node = here, node
        self.disk = GatedDisk(config.store)
        self.disk.open()
        self.ledger, self.specs = recover_store(self.disk), KvMirror("spec")
        self.context = StorageContext(service, self.disk, self.ledger, settings, self.specs)
        self.shards = ShardService(self.context)
        self.leases = LeaseService(self.context, self.shards)
        self.usage = UsageView(self.context, self.leases)
        self.deleter = ModelDeleter(self.context, self.shards)
        self.evictions = EvictionExecutor(self.context, self.usage, self.deleter)
        self.fetch = FetchApi(self.context, self.shards, self.deleter, self.evictions)
        self.reconciler = StoreReconciler(self.context, self.shards)
        self.disk_full = DiskFullHandler(self.context, self.evictions)
        self.maintenance = MaintenanceApi(self.context, self.evictions)
        self.delete_command = DeleteCommand(self.context, self.deleter, self.usage)
        self.verifier = Verifier(
            self.context, UnverifiedBlobHasher(self.context, self.reconciler), LibraryService(self.context)
        )
        self.publisher = StatePublisher(self.context, KvMirror("state"), KvMirror("state"), list, list)

    async def fetch_blobs(self, model: Model) -> None:
        """Reserve a model, write its blobs and commit them."""
        for blob in (await self.fetch.reserve(Reserve(manifest=model.manifest))).missing:
            put(self.disk.layout, blob, model.blobs[blob])
            await self.fetch.commit(CommitBlob(blob=blob))

    async def bring_in(self, *models: Model) -> None:
        """Complete models, the first one least recently used."""
        for model in models:
            await self.fetch_blobs(model)
            await self.fetch.seal(SealModel(manifest=model.sealed))
            self.ledger.uses.record_use(model.name, float(len(self.ledger.manifests)))

    async def reserve(self, model: Model) -> EvictionPlan | None:
        """The models evicted so that a model may be admitted."""
        return (await self.fetch.reserve(Reserve(manifest=model.manifest))).evicted

    async def refresh_free_space(self) -> None:
        """Read what the partial blobs occupy."""
        async with self.context.section as held:
            await self.evictions.refresh_free_space(held)


@asynccontextmanager
async def storage_parts(
    server: NatsServer,
    home: Path,
    node: str,
    settings: StorageSettings = UNLIMITED,
    with_specs: bool = True,
    identity: NodeIdentity | None = None,
) -> AsyncIterator[StorageParts]:
    """The parts of a node's storage, which publishes, and learns of instances as they are placed (`with_specs`)."""
    async with joined(server) as here:
        parts = StorageParts(here, home, node, settings, identity)
        running = [asyncio.create_task(parts.publisher.publish_forever())]
        if with_specs:
            running.append(asyncio.create_task(follow_forever(here.nats, parts.specs)))
            await parts.specs.wait_loaded(GATE_DEADLINE_S)
        try:
            yield parts
        finally:
            parts.disk.gate.set()
            for task in running:
                task.cancel()
            check_invariants(parts.disk.layout.root)
