"""The placement service: wires its parts."""

from __future__ import annotations

import asyncio

from shoal_common.messages.placement import (
    AskFits,
    AskLinks,
    AskRebalances,
    Place,
)
from shoal_common.rpc.request_reply import Question
from shoal_common.service import Context
from shoal_placement.leader.commands import Placement
from shoal_placement.leader.node_gc import Collector
from shoal_placement.settings import read_settings


async def run(context: Context) -> None:
    """Run the placement service."""
    async with asyncio.TaskGroup() as tasks:
        live = await context.view(tasks, "live")
        spec = await context.view(tasks, "spec")
        state = await context.view(tasks, "state")
        lease = await context.view(tasks, "lease", "leader.>")
        settings = read_settings(context.config.settings.get("placement", {}), context.environ)
        collector = Collector(context, live, spec, state, settings.retire_after_s)
        placement = Placement(context, live, spec, state, collector, settings.replace_after_s)
        context.background(tasks, placement.lead_forever(lease))
        context.background(tasks, placement.survey.run())
        questions = {
            "preview": Question(Place, placement.preview),
            "previews": Question(Place, placement.previews),
            "fits": Question(AskFits, placement.fits),
            "rebalances": Question(AskRebalances, placement.rebalances),
            "links": Question(AskLinks, placement.survey.links),
        }
        tasks.create_task(context.serve(questions))
        context.ready()
