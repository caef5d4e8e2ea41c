"""HTTP servers with hand-written answers: hostile peers, misbehaving hubs."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from shoal_common.messages.liveness import NodeAddress


class Asked(NamedTuple):
    """A request."""

    path: str
    headers: dict[str, str]
    body: bytes = b""


class Server:
    """A listening server; `asked` has every request so far."""

    def __init__(self, port: int, asked: list[Asked], tls: bool) -> None:
        self.port, self.asked = port, asked
        self.address, self.url = f"127.0.0.1:{port}", f"http://127.0.0.1:{port}"
        self.link = NodeAddress(address=self.address, tls=tls)


Answer = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


def reply(status: int, body: bytes = b"", **headers: str) -> bytes:
    """Return a complete answer, head and body; header names with `_` for `-`."""
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@asynccontextmanager
async def serving(
    answer: Answer | bytes | Mapping[str, object], tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    """Serve the same bytes to all, JSON by path (404 for others), or what `answer` writes; inside TLS, if given."""
    asked: list[Asked] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                fields = (line.split(": ", 1) for line in head[1:] if line)
                headers = {k.lower(): v for k, v in fields}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                request = Asked(head[0].split(" ")[1], headers, body)
                asked.append(request)
                if isinstance(answer, bytes):
                    writer.write(answer)
                elif isinstance(answer, Mapping):
                    found = answer.get(request.path)
                    writer.write(reply(404) if found is None else reply(200, json.dumps(found).encode()))
                else:
                    await answer(request, writer)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    try:
        yield Server(server.sockets[0].getsockname()[1], asked, tls is not None)
    finally:
        server.close()
