"""Requests and commands about keeping models: eviction plans, last uses, pins and garbage."""

from __future__ import annotations

import asyncio
import time

from shoal_common.errors import BadInput, NotFound, Refused
from shoal_common.messages.envelope import Empty
from shoal_common.messages.storage import CollectGarbage, EvictionPlan, Pin, PlanEviction, RecordUse
from shoal_common.names import ModelRef
from shoal_storage.context import StorageContext
from shoal_storage.eviction.executor import EvictionExecutor
from shoal_storage.eviction.planner import to_message
from shoal_storage.files.metadata_files import WRITE_INTERVAL_S
from shoal_storage.ledger.references import matching_manifests

MAINTENANCE_DEADLINE_S = 60.0


class MaintenanceApi:
    """Handles them."""

    def __init__(self, context: StorageContext, evictions: EvictionExecutor) -> None:
        self._context, self._node, self._ledger = context, context.node, context.ledger
        self._metadata, self._evictions = context.metadata, evictions

    # Requests

    async def plan(self, request: PlanEviction) -> EvictionPlan:
        """Return what would be evicted for so many new bytes. Changes nothing."""
        if request.need_bytes < 0:
            raise BadInput(f"need_bytes is {request.need_bytes}: expected the number of new bytes, 0 or more")
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
        async with self._context.section as held:
            held.require()
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
        await self._context.publishing.publish_soon()
        return {"models": models, "pinned": command.pinned}

    async def collect_garbage(self, _: CollectGarbage, __: str) -> dict[str, object]:
        """Delete unreferenced blobs."""
        freed, count = await self._evictions.collect_garbage()
        await self._context.publishing.publish_soon()
        return {"freed_bytes": freed, "blobs": count}

    # Background

    async def write_uses_forever(self) -> None:
        """Write the last uses periodically: many answers, few writes."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL_S)
            await self.write_uses()

    async def write_uses(self) -> None:
        """Make the recorded last uses durable."""
        async with self._context.section as held:
            held.require()
            await asyncio.to_thread(self._metadata.write_uses)
