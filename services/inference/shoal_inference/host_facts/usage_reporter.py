"""Report to storage that a model was used: eviction takes the least recently used first.

The host of rank 0 reports to every node with a stage of the instance, when an answer begins and at most once a minute
for each model. So a last use may be up to a minute early, and a long answer counts from its beginning; while it runs,
its instance protects the model anyway.
"""

from __future__ import annotations

import asyncio

from nats.errors import Error as NatsError

from shoal_common.errors import ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages.envelope import Empty
from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.storage import RecordUse
from shoal_common.names import ModelId
from shoal_common.rpc.request_reply import RpcClient

log = StructuredLogger("uses")

_REPORT_INTERVAL_S = 60.0
_REPORT_TIMEOUT_S = 5.0


class UsageReporter:
    """Reports uses in the background. A failed report is logged; a later answer reports again."""

    def __init__(self, rpc: RpcClient, tasks: asyncio.TaskGroup) -> None:
        self._rpc, self._tasks = rpc, tasks
        self._reported_s: dict[str, float] = {}

    def report(self, spec: InstanceSpec, now_s: float) -> None:
        """Report that an answer of this instance has begun. `now_s` is monotonic."""
        # Dropping old entries bounds this by the models used within a minute.
        self._reported_s = {m: at_s for m, at_s in self._reported_s.items() if now_s - at_s < _REPORT_INTERVAL_S}
        if spec.model in self._reported_s:
            return
        self._reported_s[spec.model] = now_s
        for node in {stage.node for stage in spec.stages}:
            self._tasks.create_task(self._report(node, spec.model))

    async def _report(self, node: str, model: ModelId) -> None:
        try:
            await self._rpc(
                "storage", node, "record_use", RecordUse(models=[model]), Empty, deadline_s=_REPORT_TIMEOUT_S
            )
        except (ShoalError, NatsError) as e:
            log.warning("model use not recorded", peer_node=node, model=model, reason=str(e) or type(e).__name__)
