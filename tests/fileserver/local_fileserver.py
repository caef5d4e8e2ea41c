"""A fileserver in the test's process, with small limits and clocks of the test's own."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn

from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.http.bounds import HttpBounds
from shoal_common.identity.peer_secrets import PeerSecrets
from shoal_common.identity.peer_tokens import PeerTokens
from shoal_common.store.store_paths import StorePaths
from shoal_common.store.verification_stamp import write_stamp
from shoal_fileserver.service import BOUNDS, server_config

NODE = "here"


OUTSIDE_A_CLUSTER = PeerTokens(NODE, PeerSecrets(None, lambda _: None))


@asynccontextmanager
async def local_fileserver(
    store: Path,
    limiter: RateLimiter | None = None,
    bounds: HttpBounds = BOUNDS,
    tokens: PeerTokens = OUTSIDE_A_CLUSTER,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """Run a server over a store, and yield its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = ThreadPoolExecutor(8, "send")
    config = server_config(StorePaths(store), tokens, threads, limiter=limiter, bounds=bounds, tls=tls)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    running = asyncio.create_task(server._serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running
        threads.shutdown()


def hollow_blob(store: Path, size_bytes: int, name: str = "ab" * 32) -> str:
    """Create a sparse blob of zeros with the stamp of a name that is not its hash."""
    path = StorePaths(store).blob(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as f:
        f.truncate(size_bytes)
    write_stamp(name, path)
    return name


async def closed(reader: asyncio.StreamReader, rest_s: float = 0.0) -> int:
    """Return the bytes received before the server closed a connection, to a reader that pauses after each piece."""
    count = 0
    async with asyncio.timeout(45):
        try:
            while data := await reader.read(1 << 16):
                count += len(data)
                await asyncio.sleep(rest_s)
        except ConnectionResetError:
            pass
    return count
