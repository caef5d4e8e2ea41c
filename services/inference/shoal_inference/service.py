"""The inference service: wires its parts and serves its requests."""

from __future__ import annotations

import asyncio

from shoal_common.messages.generation import CancelGenerate, Generate
from shoal_common.rpc.request_reply import RpcEndpoint
from shoal_common.service import ServiceContext
from shoal_inference.stage_manager import StageManager


async def run(context: ServiceContext) -> None:
    """Run the inference service until it is told to stop."""
    async with asyncio.TaskGroup() as tasks:
        spec = await context.mirror(tasks, "spec", "instance.>")
        state = await context.mirror(tasks, "state")
        await context.follow_interfaces()
        host = StageManager(context, tasks, spec, state)
        await host.unpublish_stale_stages()
        context.run_in_background(tasks, host.reconcile_stages_forever())
        context.run_in_background(tasks, host.publish_memory_forever())
        context.run_in_background(tasks, host.guard_memory_forever())
        tasks.create_task(
            context.serve(
                {
                    "generate": RpcEndpoint(Generate, host.generate),
                    "cancel": RpcEndpoint(CancelGenerate, host.cancel),
                }
            )
        )
        context.ready(await asyncio.to_thread(host.facts))
        context.run_in_background(tasks, host.detect_device())
        await context.stopping.wait()
        await host.stop_all()
