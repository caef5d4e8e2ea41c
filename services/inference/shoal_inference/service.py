"""The inference service: wires its parts and serves its requests."""

from __future__ import annotations

import asyncio

from shoal_common.messages.generation import CancelGenerate, Generate
from shoal_common.rpc.request_reply import Question
from shoal_common.service import Context
from shoal_inference.stage_manager import Host


async def run(context: Context) -> None:
    """Run the inference service until it is told to stop."""
    async with asyncio.TaskGroup() as tasks:
        spec = await context.view(tasks, "spec", "instance.>")
        state = await context.view(tasks, "state")
        await context.follow_interfaces()
        host = Host(context, tasks, spec, state)
        await host.remove_leftovers()
        context.background(tasks, host.follow_spec())
        context.background(tasks, host.watch_memory())
        context.background(tasks, host.watch_forced())
        tasks.create_task(
            context.serve(
                {
                    "generate": Question(Generate, host.generate),
                    "cancel": Question(CancelGenerate, host.cancel),
                }
            )
        )
        context.ready(await asyncio.to_thread(host.facts))
        context.background(tasks, host.find_device())
        await context.stopping.wait()
        await host.stop_all()
