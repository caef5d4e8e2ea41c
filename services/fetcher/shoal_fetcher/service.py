"""The fetcher service: wires its parts and serves its commands."""

from __future__ import annotations

import asyncio

from shoal_common.bus.keys import storage_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.reconcile import republish_after_wipes
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.identity.peer_tokens import PeerTokens
from shoal_common.identity.seals import CLUSTER, SealKeeper
from shoal_common.liveness.peer_failure import PeerFailureReporter
from shoal_common.messages import downloads
from shoal_common.messages.downloads import DownloadRequest, StopDownloads
from shoal_common.messages.model_shape import GetModelShape
from shoal_common.messages.storage import StorageState
from shoal_common.rpc.command_worker import CommandHandler
from shoal_common.rpc.request_reply import RpcEndpoint
from shoal_common.service import ServiceContext, certificates_in
from shoal_common.settings.node import FileserverSettings
from shoal_common.settings.values import read_settings
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.downloads.blob_fetcher import BlobFetcher
from shoal_fetcher.downloads.manager import DownloadManager
from shoal_fetcher.downloads.model_fetch import DownloadContext
from shoal_fetcher.downloads.request_store import DownloadRequests
from shoal_fetcher.hub.client import HubClient, HubSettings
from shoal_fetcher.hub.listings import HubListings
from shoal_fetcher.hub.model_info import ModelShapes
from shoal_fetcher.hub.range_reader import make_hub_client
from shoal_fetcher.hub.token_socket import serve_tokens
from shoal_fetcher.partials.blocking import LeafWorkers
from shoal_fetcher.rate_limits import RateLimits
from shoal_fetcher.storage_client import StorageClient
from shoal_fetcher.swarm.context import NodeFetchContext
from shoal_fetcher.swarm.http_client import PeerHttpClient
from shoal_fetcher.swarm.peer_client import FileserverClient

_DOWNLOAD_DEADLINE_S = 24 * 3600.0
_CONTROL_DEADLINE_S = 60.0


async def run(context: ServiceContext) -> None:
    """Run the fetcher service."""
    config = context.config
    settings = read_settings(FileserverSettings, config.settings, context.environ)
    peer_links = await asyncio.to_thread(PeerLinks, config.identity, not settings.encrypt_weights)
    async with (
        LeafWorkers() as workers,
        make_hub_client() as from_hub,
        PeerHttpClient(peer_links) as from_peers,
        asyncio.TaskGroup() as tasks,
    ):
        live = await context.mirror(tasks, "live", "*.fileserver", "*.storage")
        state = await context.mirror(tasks, "state")
        lease = await context.mirror(tasks, "lease")
        spec = await context.mirror(tasks, "spec", f"download.{context.node}.>", "member.*")
        await context.follow_interfaces()
        cluster_view = ClusterView(
            context.nats, context.node, live, state, lease, spec, context.interfaces, peer_links
        )
        secrets = await context.peer_secrets(tasks)
        rate_limits = RateLimits()
        context.run_in_background(tasks, rate_limits.follow_settings(state, context.node))
        hub = HubClient(HubSettings.read(context.environ), from_hub)
        context.run_in_background(tasks, serve_tokens(context.config.home / "run", hub.tokens.take))
        node_context = NodeFetchContext(
            node=context.node,
            uid=context.liveness.uid,
            nats=context.nats,
            buckets=context.buckets,
            cluster_view=cluster_view,
            hub=hub,
            rate_limits=rate_limits,
            peers=FileserverClient(
                from_peers,
                PeerTokens(context.node, secrets),
                cluster_view.addresses,
                PeerFailureReporter(context.nats, context.node).report,
            ),
            layout=StorePaths(config.store),
            workers=workers,
            serves_peers=settings.serve_peers,
            seals=seals_of(context, spec, state),
        )
        stored = [request for _, request in spec.items("download.", DownloadRequest)]
        fetcher = DownloadManager(download_context(context, node_context, stored), tasks)
        shapes = ModelShapes(node_context.hub, rate_limits.hub)
        await fetcher.resume_pending()
        context.run_in_background(tasks, republish_after_wipes(context.nats.store_wipes, fetcher.republish))
        endpoints = {
            "stop_downloads": RpcEndpoint(StopDownloads, fetcher.stop_downloads),
            "shape": RpcEndpoint(GetModelShape, shapes.shape),
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


def seals_of(context: ServiceContext, spec: KvMirror, state: KvMirror) -> SealKeeper:
    """Return whose seals count on this node, as its storage publishes that."""
    key = storage_key(context.node)

    def trust_sealers() -> str:
        published = state.get(key, StorageState)
        return published.trust_sealers if published and published.trust_sealers else CLUSTER

    def distrusted() -> list[str]:
        published = state.get(key, StorageState)
        return published.distrusted_sealers if published else []

    return SealKeeper(context.config.identity, certificates_in(spec), trust_sealers, distrusted)


def download_context(
    context: ServiceContext, node_context: NodeFetchContext, stored: list[DownloadRequest]
) -> DownloadContext:
    """Return what all downloads of this node share. `stored` are the requests that NATS has."""
    storage = StorageClient(context.rpc, context.node, node_context.cluster_view)
    return DownloadContext(
        node=context.node,
        layout=node_context.layout,
        buckets=context.buckets,
        rpc=context.rpc,
        events=context.events,
        storage=storage,
        hub=node_context.hub,
        cluster_view=node_context.cluster_view,
        blobs=BlobFetcher(node_context, storage),
        leaf_lists=node_context.peers,
        seals=node_context.seals,
        listings=HubListings(node_context.hub),
        requests=DownloadRequests(context.buckets, context.node, stored),
    )
