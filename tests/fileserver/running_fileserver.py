"""A real fileserver over a test's store, and plain sockets to talk to it."""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from shoal_common.identity.certificates import node_host
from shoal_common.identity.peer_tokens import PeerTokens
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap
from shoal_common.store.relay_bitmap import RelayBitmapFile
from shoal_common.store.store_paths import StorePaths
from shoal_common.store.verification_stamp import write_stamp
from tests.harness.identities import Authority
from tests.harness.nats import NatsServer, joined
from tests.harness.process import Process, node_environment, started

DEADLINE_S = 45.0


class Reply(msgspec.Struct):
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes


class Fileserver:
    """A running fileserver and its store."""

    def __init__(self, process: Process, node: str, layout: StorePaths, host: str, port: int) -> None:
        self.process, self.node, self.layout, self.host, self.port = process, node, layout, host, port
        self.tls: ssl.SSLContext | None = None
        """To speak TLS with it."""

    def add(self, data: bytes) -> str:
        """Put a blob into the store, as storage does."""
        return add_blob(self.layout, data)

    def begin(self, blob: str, data: bytes, leaves: Collection[int]) -> RelayBitmapFile:
        """Write these leaves of a partial blob, as the fetcher does. The caller closes the returned file."""
        directory = self.layout.partial(blob)
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "data").open("wb") as f:
            for leaf in leaves:
                f.seek(leaf * LEAF_BYTES)
                f.write(data[leaf * LEAF_BYTES : (leaf + 1) * LEAF_BYTES])
        ready = RelayBitmapFile(self.layout, blob, Bitmap(len(data)))
        ready.add(leaves)
        return ready

    async def connect(self, limit_bytes: int = 1 << 16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection without sending anything."""
        async with asyncio.timeout(DEADLINE_S):
            hostname = node_host(self.node) if self.tls else None
            return await asyncio.open_connection(
                self.host, self.port, limit=limit_bytes, ssl=self.tls, server_hostname=hostname
            )

    async def raw(self, request: bytes) -> Reply:
        """Send these bytes, and read one response to its end."""
        reader, writer = await self.connect()
        try:
            writer.write(request)
            return await read_reply(reader, head_only=request.startswith(b"HEAD "))
        finally:
            writer.close()

    async def ask(
        self, path: str, headers: Mapping[str, str] | None = None, method: str = "GET", body: bytes = b""
    ) -> Reply:
        """Send a valid request; the path is sent as given."""
        all_headers = {**(headers or {}), **({"Content-Length": str(len(body))} if body else {})}
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *(f"{k}: {v}" for k, v in all_headers.items())]
        return await self.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    async def blob(self, sha256: str, range_header: str = "", method: str = "GET") -> Reply:
        """Request a blob, or a range of it."""
        return await self.ask(f"/v1/blobs/{sha256}", {"Range": range_header} if range_header else {}, method)

    def open_paths(self) -> list[str]:
        """Return the process's open files, as Linux names them."""
        found = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # just closed
                found.append(str(link.readlink()))
        return found

    def open_file_count(self) -> int:
        """Return the number of the process's open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


def add_blob(layout: StorePaths, data: bytes) -> str:
    """Put a blob into a store, as storage does."""
    sha256 = hashlib.sha256(data).hexdigest()
    path = layout.blob(sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o444)
    write_stamp(sha256, path)
    return sha256


async def read_reply(reader: asyncio.StreamReader, head_only: bool = False) -> Reply:
    """Read one response: the head, and as many bytes as it says."""
    async with asyncio.timeout(DEADLINE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = 0 if head_only else int(headers.get("content-length", 0))
        return Reply(int(status.split()[1]), headers, await reader.readexactly(size))


async def admitted(server: NatsServer, authority: Authority, directory: Path, *nodes: str) -> list[PeerTokens]:
    """Make nodes with homes in this directory members of the cluster, and return the tokens of each."""
    found = [authority.tokens(authority.node(node, directory / node)) for node in nodes]
    async with joined(server) as here:
        await authority.publish(here.buckets)
    return found


@asynccontextmanager
async def serving(
    server: NatsServer, directory: Path, name: str, settings: str = "", **environ: str
) -> AsyncIterator[Fileserver]:
    """Run a fileserver of a node called `name`, with these settings in node.toml, while the body runs."""
    home = directory / name
    home.mkdir(parents=True, exist_ok=True)
    (home / "node.toml").write_text(f'id = "{name}"\n{settings}')
    environment = node_environment(home, server.url, **environ)
    async with started("-m", "shoal_fileserver", environment=environment) as process:
        ready = await process.wait_line("msg=ready")
        found = re.search(r"addresses=([0-9.]+):(\d+)", ready)
        assert found is not None, ready
        # It listens on loopback whatever address it publishes.
        yield Fileserver(process, name, StorePaths(home / "store"), "127.0.0.1", int(found.group(2)))
