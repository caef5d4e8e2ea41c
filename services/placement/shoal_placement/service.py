"""The placement service: wires its parts."""

from __future__ import annotations

import asyncio

from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.identity.peer_tokens import PeerTokens
from shoal_common.messages.placement import (
    ListFits,
    ListRebalances,
    MeasureLinks,
    PlaceCommand,
)
from shoal_common.rpc.request_reply import RpcEndpoint
from shoal_common.service import ServiceContext
from shoal_common.settings.node import EncryptionSettings
from shoal_common.settings.values import read_settings
from shoal_placement.leader.commands import PlacementService
from shoal_placement.leader.node_gc import NodeGarbageCollector
from shoal_placement.network.survey import LinkSurvey
from shoal_placement.settings import PlacementSettings


async def run(context: ServiceContext) -> None:
    """Run the placement service."""
    async with asyncio.TaskGroup() as tasks:
        live = await context.mirror(tasks, "live")
        spec = await context.mirror(tasks, "spec")
        state = await context.mirror(tasks, "state")
        lease = await context.mirror(tasks, "lease", "leader.>")
        settings = read_settings(PlacementSettings, context.config.settings, context.environ)
        collector = NodeGarbageCollector(context, live, spec, state, settings.retire_after_s)
        survey = await _link_survey(context, tasks, live, state)
        placement = PlacementService(context, live, spec, state, collector, survey, settings.replace_after_s)
        context.run_in_background(tasks, placement.lead_forever(lease))
        context.run_in_background(tasks, survey.run())
        endpoints = {
            "preview": RpcEndpoint(PlaceCommand, placement.preview),
            "previews": RpcEndpoint(PlaceCommand, placement.previews),
            "fits": RpcEndpoint(ListFits, placement.list_fits),
            "rebalances": RpcEndpoint(ListRebalances, placement.list_rebalances),
            "links": RpcEndpoint(MeasureLinks, survey.measure_links),
        }
        tasks.create_task(context.serve(endpoints))
        context.ready()


async def _link_survey(
    context: ServiceContext, tasks: asyncio.TaskGroup, live: KvMirror, state: KvMirror
) -> LinkSurvey:
    config = context.config
    settings = read_settings(EncryptionSettings, config.settings, context.environ)
    tokens = PeerTokens(context.node, await context.peer_secrets(tasks))
    peer_links = await asyncio.to_thread(PeerLinks, config.identity, not settings.encrypt_weights)
    return LinkSurvey(context, live, state, tokens, peer_links)
