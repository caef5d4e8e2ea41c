"""The context that every endpoint works with."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import cast

from starlette.requests import Request

from shoal_common.bus.kv_mirror import View
from shoal_common.host.process_identity import this_network
from shoal_common.liveness.compatibility import CompanyView
from shoal_common.rpc.command_client import Sender
from shoal_common.service import Context
from shoal_gateway.cluster.snapshot import Picture, read_picture
from shoal_gateway.settings import Settings


class Gateway:
    """The gateway of a node: its context, its mirrors of the cluster's buckets, and its requests in flight."""

    def __init__(
        self,
        context: Context,
        settings: Settings,
        tasks: asyncio.TaskGroup,
        live: CompanyView,
        spec: View,
        state: View,
    ) -> None:
        self.context, self.settings, self.tasks = context, settings, tasks
        self.live, self.spec, self.state = live, spec, state
        self.sender = Sender(context.nats, context.buckets)
        self.network = this_network()
        self.in_flight: Counter[str] = Counter()
        """Requests of this gateway in flight, by instance."""
        self.event_readers = 0
        """Number of clients that follow events."""

    @property
    def node(self) -> str:
        """The id of this gateway's node."""
        return self.context.node

    def picture(self) -> Picture:
        """Return a snapshot of the cluster."""
        return read_picture(self.live, self.spec, self.state)


def gateway_of(request: Request) -> Gateway:
    """Return the gateway that received a request."""
    return cast(Gateway, request.app.state.gateway)
