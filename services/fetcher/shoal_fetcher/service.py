"""The fetcher service: wires its parts and serves its commands."""

from __future__ import annotations

import asyncio

from shoal_common.messages import downloads
from shoal_common.messages.downloads import DownloadSpec, Withdraw
from shoal_common.messages.model_shape import AskShape
from shoal_common.rpc.command_worker import Verb
from shoal_common.rpc.request_reply import Question
from shoal_common.service import Context
from shoal_fetcher.cluster_view import Surroundings
from shoal_fetcher.downloads.manager import Fetcher
from shoal_fetcher.downloads.request_store import Wishes
from shoal_fetcher.hub.range_reader import hub_client
from shoal_fetcher.rate_limits import Limits
from shoal_fetcher.swarm.http_client import PeerClient

_DOWNLOAD_DEADLINE_S = 24 * 3600.0
_CONTROL_DEADLINE_S = 60.0


async def run(context: Context) -> None:
    """Run the fetcher service."""
    async with hub_client() as from_hub, PeerClient() as from_peers, asyncio.TaskGroup() as tasks:
        live = await context.view(tasks, "live", "*.fileserver", "*.storage")
        state = await context.view(tasks, "state")
        lease = await context.view(tasks, "lease")
        spec = await context.view(tasks, "spec", f"download.{context.node}.>")
        await context.follow_interfaces()
        around = Surroundings(context.nats, context.node, live, state, lease, spec, context.interfaces)
        wishes = Wishes(context.buckets, context.node, [wish for _, wish in spec.items("", DownloadSpec)])
        limits = Limits()
        context.background(tasks, limits.follow(state, context.node))
        fetcher = Fetcher(context, tasks, around, wishes, limits, from_hub, from_peers)
        await fetcher.take_up()
        context.background(tasks, fetcher.say_again_after_wipes())
        questions = {"withdraw": Question(Withdraw, fetcher.withdraw), "shape": Question(AskShape, fetcher.shape)}
        tasks.create_task(context.serve(questions))
        tasks.create_task(
            context.work(
                {
                    "download": Verb(downloads.Download, fetcher.download, _DOWNLOAD_DEADLINE_S),
                    "pause": Verb(downloads.PauseDownload, fetcher.pause, _CONTROL_DEADLINE_S),
                    "resume": Verb(downloads.ResumeDownload, fetcher.resume, _CONTROL_DEADLINE_S),
                    "cancel": Verb(downloads.CancelDownload, fetcher.cancel, _CONTROL_DEADLINE_S),
                }
            )
        )
        context.ready()
        await context.stopping.wait()
        fetcher.stop()
