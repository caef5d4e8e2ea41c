"""The fetcher service: wires its parts and serves its commands."""

from __future__ import annotations

import asyncio

from shoal_common.messages import downloads
from shoal_common.messages.downloads import DownloadRequest, StopDownloads
from shoal_common.messages.model_shape import GetModelShape
from shoal_common.rpc.command_worker import CommandHandler
from shoal_common.rpc.request_reply import RpcEndpoint
from shoal_common.service import ServiceContext
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.downloads.manager import DownloadManager
from shoal_fetcher.downloads.request_store import DownloadRequests
from shoal_fetcher.hub.range_reader import make_hub_client
from shoal_fetcher.rate_limits import RateLimits
from shoal_fetcher.swarm.http_client import PeerHttpClient

_DOWNLOAD_DEADLINE_S = 24 * 3600.0
_CONTROL_DEADLINE_S = 60.0


async def run(context: ServiceContext) -> None:
    """Run the fetcher service."""
    async with make_hub_client() as from_hub, PeerHttpClient() as from_peers, asyncio.TaskGroup() as tasks:
        live = await context.mirror(tasks, "live", "*.fileserver", "*.storage")
        state = await context.mirror(tasks, "state")
        lease = await context.mirror(tasks, "lease")
        spec = await context.mirror(tasks, "spec", f"download.{context.node}.>")
        await context.follow_interfaces()
        cluster_view = ClusterView(context.nats, context.node, live, state, lease, spec, context.interfaces)
        requests = DownloadRequests(
            context.buckets, context.node, [request for _, request in spec.items("", DownloadRequest)]
        )
        rate_limits = RateLimits()
        context.run_in_background(tasks, rate_limits.follow_settings(state, context.node))
        fetcher = DownloadManager(context, tasks, cluster_view, requests, rate_limits, from_hub, from_peers)
        await fetcher.resume_pending()
        context.run_in_background(tasks, fetcher.republish_after_wipes())
        endpoints = {
            "stop_downloads": RpcEndpoint(StopDownloads, fetcher.stop_downloads),
            "shape": RpcEndpoint(GetModelShape, fetcher.shape),
        }
        tasks.create_task(context.serve(endpoints))
        tasks.create_task(
            context.run_commands(
                {
                    "download": CommandHandler(downloads.DownloadCommand, fetcher.download, _DOWNLOAD_DEADLINE_S),
                    "pause": CommandHandler(downloads.PauseDownload, fetcher.pause, _CONTROL_DEADLINE_S),
                    "resume": CommandHandler(downloads.ResumeDownload, fetcher.resume, _CONTROL_DEADLINE_S),
                    "cancel": CommandHandler(downloads.CancelDownload, fetcher.cancel, _CONTROL_DEADLINE_S),
                }
            )
        )
        context.ready()
        await context.stopping.wait()
        fetcher.stop()
