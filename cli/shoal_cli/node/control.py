"""The supervisor's control socket: one JSON request a line, one JSON answer a line.

    {"op": "status"}                          {"result": {"node": …, "children": […], …}}
    {"op": "restart", "service": "storage"}   {"result": {"name": "storage", "pid": 4711, …}}
    {"op": "stop"}                            {"result": {"pid": 4700}}, then everything stops
    anything else                             {"error": {"code": …, "message": …}}

The socket is <home>/run/control.sock. A socket's path may have some 100 bytes only: when that one is too long, the
sockets are in a fresh private directory under the system's temporary one. <home>/run/control.path says which.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from shoal_cli.home import Home, read_or_empty
from shoal_cli.node.decide import ChildStatus
from shoal_common.errors import BadMessage, ErrorBody, ShoalError, Unavailable, as_body, from_body
from shoal_common.messages import Message, decode, encode

MAX_LINE_BYTES = 64 << 10
_MAX_PATH_BYTES = 100
"""Linux allows 107 bytes, macOS 103."""
_IDLE_S = 60.0
_PREFIX = "shoal-"


class Request(Message):
    """What a client of the socket asks."""

    op: str
    service: str = ""


class Reply(Message):
    """What it is answered."""

    result: msgspec.Raw = msgspec.Raw(b"{}")
    error: ErrorBody | None = None


class Status(Message):
    """The supervisor and its children. URLs are without credentials."""

    node: str
    pid: int
    started_at_s: float
    stopping: bool
    nats: list[str]
    gateway: str
    logs: str
    children: list[ChildStatus]


Handler = Callable[[Request], Awaitable[object]]


class Sockets:
    """The directory for this run's sockets: `run` itself, or a short one elsewhere."""

    def __init__(self, home: Home) -> None:
        self._run = home.run
        _clear_elsewhere(read_or_empty(home.control_path), home.run)
        longest = home.run / "fileserver.notify"
        too_long = len(os.fsencode(longest)) > _MAX_PATH_BYTES
        # A fresh directory of mode 0700 under a name nobody can guess: nobody else can have prepared it.
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX)) if too_long else home.run
        self.control = self.directory / "control.sock"
        self.control.unlink(missing_ok=True)
        home.control_path.write_text(f"{self.control}\n")

    def remove(self) -> None:
        """Remove what this run made."""
        self.control.unlink(missing_ok=True)
        _clear_elsewhere(str(self.control), self._run)


def _clear_elsewhere(control: str, run: Path) -> None:
    """Remove the short directory of a run, this one or one that was killed."""
    directory = Path(control).parent
    if not control or directory == run or not directory.name.startswith(_PREFIX):
        return
    with suppress(OSError):
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


async def serve(path: Path, handle: Handler) -> asyncio.Server:
    """Answer requests on the socket until the server is closed."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                async with asyncio.timeout(_IDLE_S):
                    line = await reader.readline()
                if not line:
                    return
                writer.write(encode(await _answer(line, handle)) + b"\n")
                await writer.drain()
        except (OSError, TimeoutError, ValueError):
            return  # gone, silent, or a line beyond the limit
        finally:
            writer.close()

    return await asyncio.start_unix_server(talk, str(path), limit=MAX_LINE_BYTES)


async def _answer(line: bytes, handle: Handler) -> Reply:
    try:
        return Reply(result=msgspec.Raw(encode(await handle(decode(line, Request)))))
    except ShoalError as e:
        return Reply(error=e.body())
    except Exception as e:  # noqa: BLE001  # a reply is owed
        return Reply(error=as_body(e))


def ask(home: Home, request: Request, deadline_s: float) -> bytes:
    """Ask this home's supervisor. Returns the result as JSON; raises what it answered, or Unavailable."""
    path = read_or_empty(home.control_path)
    if not path:
        raise Unavailable(f"no supervisor runs in {home.root}: start one with `shoal up`")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(deadline_s)
        try:
            s.connect(path)
            s.sendall(encode(request) + b"\n")
            with s.makefile("rb") as answers:
                line = answers.readline(MAX_LINE_BYTES)
        except TimeoutError:
            raise Unavailable(
                f"the supervisor in {home.root} did not answer {request.op} in {deadline_s:.0f} s; "
                f"see {home.log('supervisor')}"
            ) from None
        except OSError:
            raise Unavailable(f"no supervisor answers in {home.root}: start one with `shoal up`") from None
    if not line:
        raise Unavailable(f"the supervisor in {home.root} closed the connection; see {home.log('supervisor')}")
    try:
        reply = decode(line, Reply)
    except BadMessage:
        raise Unavailable(
            f"the supervisor in {home.root} answered something else: is it of another version?"
        ) from None
    if reply.error is not None:
        raise from_body(reply.error)
    return bytes(reply.result)
