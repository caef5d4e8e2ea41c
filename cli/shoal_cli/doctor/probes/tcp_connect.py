"""Connecting to an address, and classifying why that fails."""

from __future__ import annotations

import asyncio
import errno
import platform
import socket
import ssl
import sys

from shoal_cli.doctor.probes.timeouts import resolve_host
from shoal_cli.doctor.reachability import ConnectError, OsInfo
from shoal_common.host.interfaces import read_interfaces

_NO_ROUTE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL)
_TIMED_OUT = (errno.ETIMEDOUT, errno.EHOSTDOWN)


def this_os() -> OsInfo:
    """Return what of this machine matters for reaching others. Blocks."""
    version = platform.mac_ver()[0].split(".")[0]
    return OsInfo(sys.platform, int(version) if version.isdigit() else 0, read_interfaces())


def classify_connect_error(error: BaseException) -> tuple[ConnectError, str]:
    """Return what an error of connecting means, and its text."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, socket.gaierror):
        return "unknown_host", reason
    if isinstance(error, TimeoutError):
        return "timeout", "no answer"
    if isinstance(error, OSError):
        if error.errno == errno.ECONNREFUSED:
            return "refused", reason
        if error.errno in _NO_ROUTE:
            return "no_route", reason
        if error.errno in _TIMED_OUT:
            return "timeout", reason
    return "broken", reason


async def connect(
    host: str, port: int, deadline_s: float, tls: ssl.SSLContext | None = None
) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect. Returns the address that was used too. Raises OSError, TimeoutError."""
    async with asyncio.timeout(deadline_s):
        address = await resolve_host(host, deadline_s)
        reader, writer = await asyncio.open_connection(address, port, ssl=tls)
        return address, reader, writer
