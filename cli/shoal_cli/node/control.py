"""The supervisor's control socket: one JSON request per line, one JSON reply per line.

    {"op": "status"}                          {"result": {"node": …, "children": […], …}}
    {"op": "restart", "service": "storage"}   {"result": {"name": "storage", "pid": 4711, …}}
    {"op": "stop"}                            {"result": {"pid": 4700}}, then everything stops
    {"op": "invite", "lifetime_s": 3600}      {"result": {"code": …, "address": …, "until_s": …}}
    {"op": "revoke", "node": "b"}             {"result": {}}
    anything else                             {"error": {"code": …, "message": …}}

The socket is <home>/run/control.sock. A socket's path is limited to about 100 bytes: when that one is longer, the
sockets are in a new private directory under the system's temporary one. <home>/run/control.path holds the path.
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

from shoal_cli.node.children.restart_policy import ChildStatus
from shoal_cli.node_home import Home, RunLock, read_or_empty
from shoal_common.errors import BadMessage, ErrorBody, ShoalError, Unavailable, error_body, from_body
from shoal_common.messages import WireStruct, decode, encode

MAX_LINE_BYTES = 64 << 10
_MAX_PATH_BYTES = 100
"""Linux allows 107 bytes, macOS 103."""
_IDLE_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 2.0
_PREFIX = "shoal-"


class ControlRequest(WireStruct):
    """A request to the supervisor."""

    op: str
    service: str = ""
    node: str = ""
    lifetime_s: float = 0.0


class ControlReply(WireStruct):
    """The supervisor's reply."""

    result: msgspec.Raw = msgspec.Raw(b"{}")
    error: ErrorBody | None = None


class SupervisorStatus(WireStruct):
    """The supervisor and its children. URLs are without credentials."""

    node: str
    pid: int
    started_at_s: float
    stopping: bool
    nats: list[str]
    gateway: str
    logs: str
    children: list[ChildStatus]
    bind: str = ""
    """The address that the node listens on."""
    ports: dict[str, list[int]] = {}
    """By who listens: `nats`, `gateway`, `fileserver`, `stages`."""
    hub: str = ""
    """The hub, if not that of the environment."""
    kept: list[str] = []
    """What node.toml keeps of the options of `shoal up`."""


class InviteReply(WireStruct):
    """An invitation, for a person to carry to the other machine. A secret."""

    code: str
    address: str
    """Of NATS, `host:port`, as other machines reach it."""
    is_local: bool = False
    """Whether only this machine reaches it."""
    until_s: float = 0.0
    """When it expires, seconds since 1970."""


Handler = Callable[[ControlRequest], Awaitable[object]]


class ControlSockets:
    """The directory of this run's sockets: `run` itself, or a short temporary one."""

    def __init__(self, home: Home) -> None:
        self._run = home.run
        _remove_temporary(read_or_empty(home.control_path), home.run)
        longest = home.run / "fileserver.notify"
        too_long = len(os.fsencode(longest)) > _MAX_PATH_BYTES
        # A new directory of mode 0700 under an unguessable name: nobody else can have prepared it.
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX)) if too_long else home.run
        self.control = self.directory / "control.sock"
        self.control.unlink(missing_ok=True)
        home.control_path.write_text(f"{self.control}\n")

    def remove(self) -> None:
        """Remove what this run created."""
        self.control.unlink(missing_ok=True)
        _remove_temporary(str(self.control), self._run)


def _remove_temporary(control: str, run: Path) -> None:
    """Remove the temporary directory of a run, this one or a killed one; not that of a copied home's original."""
    directory = Path(control).parent
    if not control or directory == run or not directory.name.startswith(_PREFIX) or _is_listening(control):
        return
    with suppress(OSError):
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def _is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(_CONNECT_TIMEOUT_S)
        try:
            s.connect(path)
        except (OSError, ValueError):  # ValueError: it cannot be a path
            return False
    return True


async def serve(path: Path, handle: Handler) -> asyncio.Server:
    """Answer requests on the socket until the returned server is closed."""

    async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                async with asyncio.timeout(_IDLE_TIMEOUT_S):
                    line = await reader.readline()
                if not line:
                    return
                writer.write(encode(await _answer(line, handle)) + b"\n")
                await writer.drain()
        except (OSError, TimeoutError, ValueError):
            return  # closed, idle, or a line beyond the limit
        finally:
            writer.close()

    return await asyncio.start_unix_server(answer_all, str(path), limit=MAX_LINE_BYTES)


async def _answer(line: bytes, handle: Handler) -> ControlReply:
    try:
        return ControlReply(result=msgspec.Raw(encode(await handle(decode(line, ControlRequest)))))
    except ShoalError as e:
        return ControlReply(error=e.body())
    except Exception as e:  # noqa: BLE001  # a reply is owed
        return ControlReply(error=error_body(e))


def ask(home: Home, request: ControlRequest, deadline_s: float) -> bytes:
    """Send a request to this home's supervisor. Returns the result as JSON; raises its error, or Unavailable."""
    # A home that is a copy has the path of the original's socket, but not its lock.
    path = "" if RunLock(home).is_free() else read_or_empty(home.control_path)
    if not path:
        raise Unavailable(f"no node is running in {home.root}: start one with `shoal up`")
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
        except (OSError, ValueError):  # nothing listens there, or it cannot be a path
            raise Unavailable(
                f"the supervisor in {home.root} does not answer: start the node with `shoal up`"
            ) from None
    if not line:
        raise Unavailable(f"the supervisor in {home.root} closed the connection; see {home.log('supervisor')}")
    try:
        reply = decode(line, ControlReply)
    except BadMessage:
        raise Unavailable(f"the supervisor in {home.root} sent an invalid reply: is it of another version?") from None
    if reply.error is not None:
        raise from_body(reply.error)
    return bytes(reply.result)
