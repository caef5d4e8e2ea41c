"""Model use is reported to every node with a stage, once a minute; a failed report does no harm."""

from __future__ import annotations

import asyncio

from shoal_common.messages.envelope import Empty
from shoal_common.messages.instances import InstanceSpec, StageSpec
from shoal_common.messages.storage import RecordUse
from shoal_common.names import ModelId
from shoal_common.rpc.request_reply import RpcClient, RpcEndpoint, serve
from shoal_inference.host_facts.usage_reporter import UsageReporter
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer, joined

DEADLINE_S = 45.0


async def test_an_instances_nodes_hear_of_its_use_each_minute(nats: NatsServer, fresh: Fresh) -> None:
    here, there, down = (fresh(name) for name in ("here", "there", "away"))
    reports: asyncio.Queue[tuple[str, list[ModelId]]] = asyncio.Queue()

    def storage_of(node: str) -> RpcEndpoint:
        async def used(question: RecordUse) -> Empty:
            await reports.put((node, question.models))
            return Empty()

        return RpcEndpoint(RecordUse, used)

    stages = [
        StageSpec(rank=rank, node=node, first_layer=rank, last_layer=rank + 1)
        for rank, node in enumerate((here, there, here, down))
    ]
    spec = InstanceSpec(id="x", repo="org/name", commit="c" * 40, stages=stages, context_tokens=1)
    stopping = asyncio.Event()
    async with joined(nats) as a, joined(nats) as b, asyncio.TaskGroup() as tasks:
        for cluster, node in ((a, here), (b, there)):
            tasks.create_task(serve(cluster.nats, "storage", node, {"record_use": storage_of(node)}, stopping))
        ask = RpcClient(a.nats)
        for node in (here, there):
            await ask(
                "storage", node, "record_use", RecordUse(models=[]), Empty, DEADLINE_S, restart_wait_s=DEADLINE_S
            )
            assert await reports.get() == (node, [])
        uses = UsageReporter(ask, tasks)
        for now_s in (1000.0, 1001.0, 1059.9, 1060.0, 1061.0):
            before = asyncio.all_tasks()
            uses.report(spec, now_s)
            await asyncio.gather(*(asyncio.all_tasks() - before))  # all reports are sent, and nothing was raised
            received = sorted(reports.get_nowait() for _ in range(reports.qsize()))
            assert received == (
                sorted([(here, [spec.model]), (there, [spec.model])]) if now_s in (1000.0, 1060.0) else []
            )
        stopping.set()
