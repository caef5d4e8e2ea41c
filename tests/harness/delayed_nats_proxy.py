"""A proxy to a server that can delay what a client or the server sends, as a network may, and deliver it later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

_CHUNK_BYTES = 1 << 16


class Held:
    """What clients send is delivered while `flows` is set, and what the server sends while `answers` is."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.flows = asyncio.Event()
        self.flows.set()
        self.answers = asyncio.Event()
        self.answers.set()
        self.on_bytes: Callable[[bytes], None] = lambda _: None
        """Called with what arrives, before anything is answered."""
        self.url = ""
        self._waiting = b""

    async def holds(self, text: bytes) -> bool:
        """Return whether something with this text waits to be delivered."""
        return text in self._waiting

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection."""
        with suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                await asyncio.gather(self._forward(reader, back), self._answer(there, writer))
            finally:
                back.close()
        writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hearing = asyncio.create_task(self._hear(reader))
        try:
            while not hearing.done() or self._waiting:
                await self.flows.wait()
                pending, self._waiting = self._waiting, b""
                writer.write(pending)
                self.on_bytes(pending)
                await writer.drain()
                await asyncio.sleep(0.005)  # a network's latency
        finally:
            hearing.cancel()

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            self._waiting += chunk

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            await self.answers.wait()
            writer.write(chunk)
            await writer.drain()


@asynccontextmanager
async def delayed_nats_proxy(url: str) -> AsyncIterator[Held]:
    """Run a proxy to the server at `url`, for one client."""
    held = Held(int(url.rpartition(":")[2]))
    server = await asyncio.start_server(held.serve, "127.0.0.1", 0)
    held.url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield held
    finally:
        server.close()
