"""The Unix socket on which this node's user hands over a token for the hub (shoal_common.hub_token)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from shoal_common.errors import BadMessage, Busy, ErrorBody, ShoalError
from shoal_common.host.private_files import FILE_MODE
from shoal_common.hub_token import (
    ANSWER_TIMEOUT_S,
    MAX_LINE_BYTES,
    SOCKET_NAME,
    GivenToken,
    TokenAnswer,
    check_same_user,
)
from shoal_common.logs import StructuredLogger
from shoal_common.messages import DECODE_ERRORS

log = StructuredLogger("token_socket")

_MAX_CONNECTIONS = 16


async def serve_tokens(run: Path, take: Callable[[GivenToken], None]) -> None:
    """Hand tokens to `take`, for ever. `run` is the working directory: a socket's path must be short."""
    try:
        listener = await asyncio.to_thread(_listen, run)
    except OSError as e:  # such as a full disk: the node works all the same
        log.warning("no socket for tokens; only HF_TOKEN of this service counts", path=run, reason=e.strerror)
        return
    connections = set[asyncio.StreamWriter]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                error = await _answer(reader, writer, len(connections), take)
                writer.write(msgspec.json.encode(TokenAnswer(error)) + b"\n")
                await writer.drain()
        except (OSError, TimeoutError):
            return  # it has left, or sends nothing
        finally:
            connections.discard(writer)
            writer.close()

    async with await asyncio.start_unix_server(answer, sock=listener, limit=MAX_LINE_BYTES):
        await asyncio.Event().wait()


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int, take: Callable[[GivenToken], None]
) -> ErrorBody | None:
    try:
        check_same_user(writer.get_extra_info("socket"))
        if count > _MAX_CONNECTIONS:
            raise Busy(f"{_MAX_CONNECTIONS} others hand over tokens now; try again")
        try:
            take(msgspec.json.decode(await reader.readline(), type=GivenToken))
        except (
            ValueError,
            *DECODE_ERRORS,
        ):  # or a line beyond the limit; the text may hold a token
            raise BadMessage("a token is handed over as one line of JSON") from None
    except ShoalError as e:
        return e.body()
    return None


def _listen(run: Path) -> socket.socket:
    """Listen in the working directory, on a socket that no other user may open."""
    if Path.cwd() != run.resolve():
        raise OSError(0, f"{Path.cwd()} is not the run directory")
    path = Path(SOCKET_NAME)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # By the process's umask the file is private from the start; the directory is, too.
        listener.bind(SOCKET_NAME)
        path.chmod(FILE_MODE)
        listener.listen(_MAX_CONNECTIONS)
    except OSError:
        listener.close()
        raise
    return listener
