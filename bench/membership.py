"""`--tls`: the same measurement with nodes that are members of a cluster, so that all their connections are TLS.

Without it no node is a member, NATS speaks plain TCP, and all ports are on loopback.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.harness.identities import Authority
from tests.harness.nats import Joined, NatsServer
from tests.harness.node import Node

TLS = "--tls" in sys.argv


class Cluster:
    """Makes the NATS server and the nodes of one measurement."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = Authority(directory) if TLS else None

    def nats(self) -> NatsServer:
        """Return the server, not started yet."""
        return NatsServer(self._directory / "nats", authority=self._authority)

    def node(self, home: Path, name: str, url: str, services: tuple[str, ...], **environment: str) -> Node:
        """Return a node, not started yet; a member listens on all addresses. `publish` makes it known."""
        if self._authority is None:
            return Node(home, name, url, services, **environment)
        self._authority.node(name, home)
        return Node(home, name, url, services, SHOAL_BIND="0.0.0.0", **environment)

    async def publish(self, here: Joined) -> None:
        """Publish who is a member."""
        if self._authority is not None:
            await self._authority.publish(here.buckets)
