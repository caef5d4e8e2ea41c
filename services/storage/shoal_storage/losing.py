"""Unpublish models that became incomplete, whoever found out. Runs within the critical section."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable

from shoal_common.messages.records import InstanceSpec
from shoal_common.service import Context
from shoal_common.watch import View
from shoal_storage.announce import Announcer
from shoal_storage.decide import Ledger
from shoal_storage.disk import Disk
from shoal_storage.doubt import of_no_more_use


class Losses:
    """Unpublishes models whose bytes can no longer be trusted."""

    def __init__(self, context: Context, disk: Disk, ledger: Ledger, specs: View, announcer: Announcer) -> None:
        self._node, self._disk, self._ledger = context.node, disk, ledger
        self._specs, self._announcer = specs, announcer

    async def take_back(self, models: Iterable[str]) -> list[str]:
        """Unpublish models (`org/name@commit`); return the instances with stages of them on this node."""
        await forget_useless(self._disk, self._ledger)
        lost = set(models)
        for model in sorted(lost):
            await self._announcer.take_back(model)
        return self.instances_of(lost)

    def instances_of(self, models: Collection[str]) -> list[str]:
        """Return the instances with stages of these models on this node."""
        return [
            spec.id
            for _, spec in self._specs.items("instance.", InstanceSpec)
            if spec.model in models and any(s.node == self._node for s in spec.stages)
        ]


async def forget_useless(disk: Disk, ledger: Ledger) -> None:
    """Delete quarantined files that nothing needs or that good bytes have replaced. Within the critical section."""
    for sha256 in of_no_more_use(ledger):
        await asyncio.to_thread(disk.drop_set_aside, sha256)
        ledger.quarantined.discard(sha256)
        ledger.repairable.pop(sha256, None)
