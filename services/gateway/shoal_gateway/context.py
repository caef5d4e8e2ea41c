"""The context that every endpoint works with."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import cast

from starlette.requests import Request

from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.host.process_identity import network_id
from shoal_common.liveness.compatibility import CompatibleLiveMirror
from shoal_common.rpc.command_client import CommandClient
from shoal_common.service import ServiceContext
from shoal_gateway.cluster.snapshot import ClusterSnapshot, take_snapshot
from shoal_gateway.settings import GatewaySettings


class GatewayContext:
    """The gateway of a node: its context, its mirrors of the cluster's buckets, and its requests in flight."""

    def __init__(
        self,
        context: ServiceContext,
        settings: GatewaySettings,
        tasks: asyncio.TaskGroup,
        live: CompatibleLiveMirror,
        spec: KvMirror,
        state: KvMirror,
    ) -> None:
        self.context, self.settings, self.tasks = context, settings, tasks
        self.live, self.spec, self.state = live, spec, state
        self.sender = CommandClient(context.nats, context.buckets)
        self.network = network_id()
        self.in_flight: Counter[str] = Counter()
        """Requests of this gateway in flight, by instance."""
        self.event_client_count = 0
        """Number of clients that follow events."""

    @property
    def node(self) -> str:
        """The id of this gateway's node."""
        return self.context.node

    def snapshot(self) -> ClusterSnapshot:
        """Return a snapshot of the cluster."""
        return take_snapshot(self.live, self.spec, self.state)


def gateway_of(request: Request) -> GatewayContext:
    """Return the gateway that received a request."""
    return cast(GatewayContext, request.app.state.gateway)


HAS_LOGIN = "shoal.has_login"
"""Key in a request's state: whether the cookie of a login let it in."""


def has_login(request: Request) -> bool:
    """Return whether a login in a browser let a request in."""
    return bool(request.scope["state"].get(HAS_LOGIN))
