"""The inference service: wires its parts and serves its requests."""

from __future__ import annotations

import asyncio

from shoal_common.bus.reconcile import republish_after_wipes
from shoal_common.identity.peer_links import PeerLinks
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
        secrets = await context.peer_secrets(tasks)
        peer_links = await asyncio.to_thread(PeerLinks, context.config.identity)
        stage_manager = StageManager(context, tasks, spec, state, secrets, peer_links)
        await stage_manager.unpublish_stale_stages()
        context.run_in_background(tasks, stage_manager.reconcile_stages_forever())
        context.run_in_background(tasks, republish_after_wipes(context.nats.store_wipes, stage_manager.republish))
        context.run_in_background(tasks, stage_manager.publish_memory_forever())
        context.run_in_background(tasks, stage_manager.guard_memory_forever())
        tasks.create_task(
            context.serve(
                {
                    "generate": RpcEndpoint(Generate, stage_manager.generate),
                    "cancel": RpcEndpoint(CancelGenerate, stage_manager.cancel),
                }
            )
        )
        context.ready(await asyncio.to_thread(stage_manager.facts))
        context.run_in_background(tasks, stage_manager.detect_device())
        await context.stopping.wait()
        await stage_manager.stop_all()
