"""How the supervisor learns that a child is ready: READY=1, NATS's INFO, or an answer of /health."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Protocol

import httpx2

from shoal_cli.node.children import nats_process
from shoal_cli.node_home import Home
from shoal_common.identity.certificates import node_host
from shoal_common.identity.tls import client_context

_MAX_DATAGRAM_BYTES = 8192
_HEALTH_INTERVAL_S = 0.1
_HEALTH_TIMEOUT_S = 2.0


class Readiness(Protocol):
    """One child's readiness."""

    def reset(self) -> None:
        """Drop what an earlier run of the child published. Called before each start."""

    async def wait(self, pid: int) -> None:
        """Return once the process with this pid is ready. The caller bounds the wait."""


class SdNotifyReadiness:
    """READY=1 in a datagram on NOTIFY_SOCKET, as services send it to systemd (sd_notify(3))."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ready = asyncio.Event()
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
            self._ready.set()
        return True

    def reset(self) -> None:
        """Drop what is still in the socket: an earlier run sent it."""
        while self._read_one():
            pass
        self._ready.clear()

    async def wait(self, pid: int) -> None:
        """Return once READY=1 came."""
        await self._ready.wait()

    def close(self) -> None:
        """Close and remove the socket."""
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self.path.unlink(missing_ok=True)


class HttpHealthReadiness:
    """The gateway's GET /health. `authority`: whose certificate it shows over https."""

    def __init__(self, gateway: str, node: str, authority: bytes) -> None:
        self._gateway, self._host, self._authority = gateway, node_host(node), authority

    def reset(self) -> None:
        """Nothing to drop: each wait asks."""

    async def wait(self, pid: int) -> None:
        """Return once it answers with success."""
        verify = client_context(self._authority) if self._authority else False
        async with httpx2.AsyncClient(trust_env=False, timeout=_HEALTH_TIMEOUT_S, verify=verify) as http:
            while True:
                try:
                    answer = await http.get(f"{self._gateway}/health", extensions={"sni_hostname": self._host})
                    if answer.is_success:
                        return
                except httpx2.TransportError:
                    pass
                await asyncio.sleep(_HEALTH_INTERVAL_S)


class NatsInfoReadiness:
    """NATS's INFO line, on the port of its ports file. `ports`: those of the last run."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.ports: nats_process.NatsPorts | None = None

    def reset(self) -> None:
        """Nothing to drop: each process writes a file of its own."""

    async def wait(self, pid: int) -> None:
        """Return once NATS sends INFO."""
        self.ports = await nats_process.wait_listening(self._home, pid)
