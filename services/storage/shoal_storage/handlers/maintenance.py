"""Requests and commands about keeping models: eviction plans, last uses, pins and garbage."""

from __future__ import annotations

import asyncio
import time

from shoal_common.errors import BadInput, NotFound, Refused
from shoal_common.messages.envelope import Empty
from shoal_common.messages.storage import CollectGarbage, EvictionPlan, Pin, PlanEviction, RecordUse
from shoal_common.names import ModelRef
from shoal_common.service import ServiceContext
from shoal_storage.eviction.executor import EvictionExecutor
from shoal_storage.eviction.planner import find_garbage, to_message
from shoal_storage.files.metadata_files import WRITE_INTERVAL_S, MetadataFiles
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import matching_manifests
from shoal_storage.publisher import StatePublisher

MAINTENANCE_DEADLINE_S = 60.0


class MaintenanceApi:
    """Handles them within the section."""

    def __init__(
        self,
        context: ServiceContext,
        ledger: Ledger,
        section: asyncio.Lock,
        evictions: EvictionExecutor,
        metadata: MetadataFiles,
        publisher: StatePublisher,
    ) -> None:
        self._node, self._ledger, self._section = context.node, ledger, section
        self._evictions, self._metadata, self._publisher = evictions, metadata, publisher

    # Requests

    async def plan(self, request: PlanEviction) -> EvictionPlan:
        """Return what would be evicted for so many new bytes. Changes nothing."""
        if request.need_bytes < 0:
            raise BadInput(f"need_bytes is {request.need_bytes}: expected the number of new bytes, 0 or more")
        async with self._section:
            return to_message(await self._evictions.plan_for_new_bytes(request.need_bytes))

    async def record_use(self, request: RecordUse) -> Empty:
        """Record that models of this node were used now. Written to the disk later."""
        self._metadata.record_use(request.models, time.time())
        return Empty()

    # Commands

    async def pin(self, command: Pin, _: str) -> dict[str, object]:
        """Pin or unpin a model: all its commits, or the one named. Durable before it is acknowledged."""
        ref = ModelRef.parse(command.model)
        revision = ref.revision if "@" in command.model else ""
        async with self._section:
            models = [m.model for m in matching_manifests(ref.repo, revision, self._ledger.local_manifests.values())]
            if (
                command.pinned
                and not models
                and matching_manifests(ref.repo, revision, self._ledger.complete_manifests.values())
            ):
                raise Refused(
                    f"{command.model} is in a library of node {self._node}, from which nothing is ever removed: it "
                    "needs no pin"
                )
            if command.pinned and not models:
                raise NotFound(
                    f"{command.model} is not on node {self._node}, and only models on the node can be pinned: "
                    "pull it first"
                )
            for model in models:
                await asyncio.to_thread(self._metadata.pin if command.pinned else self._metadata.unpin, model)
        await self._publisher.publish_storage()
        return {"models": models, "pinned": command.pinned}

    async def collect_garbage(self, _: CollectGarbage, __: str) -> dict[str, object]:
        """Delete unreferenced blobs."""
        async with self._section:
            garbage = find_garbage(self._ledger)
            freed = await self._evictions.delete_garbage(garbage)
        await self._publisher.publish_storage()
        return {"freed_bytes": freed, "blobs": len(garbage)}

    # Background

    async def write_uses_forever(self) -> None:
        """Write the last uses periodically: many answers, few writes."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL_S)
            await self.write_uses()

    async def write_uses(self) -> None:
        """Make the recorded last uses durable."""
        async with self._section:
            await asyncio.to_thread(self._metadata.write_uses)
