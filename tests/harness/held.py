"""A way to a server on which a test can hold back what a client says, as a network may, and let it arrive later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

_CHUNK_BYTES = 1 << 16


class Held:
    """What clients say on this way arrives while `flows` is set; what they are told always does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.flows = asyncio.Event()
        self.flows.set()
        self.heard: Callable[[bytes], None] = lambda _: None
        """Told of what arrives, before anything is answered."""
        self.url = ""
        self._waiting = b""

    async def holds(self, text: bytes) -> bool:
        """Whether something with this text waits to arrive."""
        return text in self._waiting

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        with suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                await asyncio.gather(self._say(reader, back), _copy(there, writer))
            finally:
                back.close()
        writer.close()

    async def _say(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hearing = asyncio.create_task(self._hear(reader))
        try:
            while not hearing.done() or self._waiting:
                await self.flows.wait()
                said, self._waiting = self._waiting, b""
                writer.write(said)
                self.heard(said)
                await writer.drain()
                await asyncio.sleep(0.005)  # a network's delay
        finally:
            hearing.cancel()

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            self._waiting += chunk


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()


@asynccontextmanager
async def held_way(url: str) -> AsyncIterator[Held]:
    """A way to the server at `url`, for one client."""
    held = Held(int(url.rpartition(":")[2]))
    server = await asyncio.start_server(held.serve, "127.0.0.1", 0)
    held.url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield held
    finally:
        server.close()
