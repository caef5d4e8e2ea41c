"""A node that belongs to a cluster of its own: its identity, and the NATS that lets it in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from shoal_common.bus.connection import connected, login_of
from shoal_common.bus.streams import ensure_streams
from shoal_common.identity.certificates import NATS_HOST, create_authority, issue
from shoal_common.identity.node_identity import CLI, NodeIdentity
from tests.harness.nats import NatsServer

_DEADLINE_S = 45.0


def make_member(home: Path, node: str, *hosts: str) -> NodeIdentity:
    """Make the node of a new home the first member of a new cluster; its certificate has these names too."""
    home.mkdir()
    key, authority = create_authority("test")
    identity = NodeIdentity(home, node)
    identity.create()
    certificate = issue(key, authority, identity.signing_request(), node, [NATS_HOST, *hosts])
    identity.save({"ca.crt": authority.decode(), "node.crt": certificate})
    return identity


@contextmanager
def member_nats(directory: Path, identity: NodeIdentity) -> Iterator[NatsServer]:
    """Run a NATS server with this node's certificate, for its services alone, as a supervisor leaves it."""
    users = ", ".join(f"{{nkey: {public}}}" for public in identity.public_nkeys().values())
    settings = (
        f'tls {{ cert_file: "{identity.certificate_file}", key_file: "{identity.key_file}"\n'
        "handshake_first: true }\n"
        f"authorization {{ users: [{users}] }}\n"
    )
    with NatsServer(directory, settings=settings) as nats, ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, _make_streams(nats.url, identity)).result()
        yield nats


async def _make_streams(url: str, identity: NodeIdentity) -> None:
    async with connected([url], "test", _DEADLINE_S, login_of(identity, CLI)) as nats:
        await ensure_streams(nats.js)
