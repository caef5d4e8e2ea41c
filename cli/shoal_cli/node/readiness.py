"""How the supervisor learns that a child does its work: it says so, it greets, or it answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import httpx2

from shoal_cli.home import Home
from shoal_cli.node import natsd

_MAX_DATAGRAM_BYTES = 8192
_HEALTH_POLL_S = 0.1
_HEALTH_TIMEOUT_S = 2.0


class Readiness(Protocol):
    """One child's."""

    def forget(self) -> None:
        """Whatever an earlier incarnation said no longer counts. Called before each start."""

    async def wait(self, pid: int) -> None:
        """Return once the incarnation with this pid is ready. The caller bounds the wait."""


class SaysReady:
    """READY=1 in a datagram on NOTIFY_SOCKET, as services say it to systemd (sd_notify(3))."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._said = asyncio.Event()
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(path))
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read_one)

    def _read_one(self) -> bool:
        try:
            data = self._socket.recv(_MAX_DATAGRAM_BYTES)
        except OSError:
            return False
        if b"READY=1" in data.split(b"\n"):
            self._said.set()
        return True

    def forget(self) -> None:
        """What is still in the socket is of the dead too."""
        while self._read_one():
            pass
        self._said.clear()

    async def wait(self, pid: int) -> None:
        """Return once it was said."""
        await self._said.wait()

    def close(self) -> None:
        """Stop listening."""
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self.path.unlink(missing_ok=True)


class AnswersHealth:
    """The gateway's GET /health."""

    def __init__(self, gateway: str, headers: Mapping[str, str]) -> None:
        self._gateway, self._headers = gateway, headers

    def forget(self) -> None:
        """Each wait asks anew."""

    async def wait(self, pid: int) -> None:
        """Return once it answers with a success."""
        async with httpx2.AsyncClient(
            trust_env=False, timeout=_HEALTH_TIMEOUT_S, headers=dict(self._headers)
        ) as http:
            while True:
                try:
                    if (await http.get(f"{self._gateway}/health")).is_success:
                        return
                except httpx2.TransportError:
                    pass
                await asyncio.sleep(_HEALTH_POLL_S)


class Greets:
    """NATS, once its ports file is there and it greets on its port. `ports` are those of the last incarnation."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.ports: natsd.Ports | None = None

    def forget(self) -> None:
        """A new incarnation writes a file of its own."""

    async def wait(self, pid: int) -> None:
        """Return once it greets."""
        self.ports = await natsd.listening(self._home, pid)
