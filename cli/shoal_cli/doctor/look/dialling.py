"""Connecting to an address, and what is wrong when that fails."""

from __future__ import annotations

import asyncio
import errno
import platform
import socket
import sys

from shoal_cli.doctor.look.waiting import resolve
from shoal_cli.doctor.reaching import System, Trouble
from shoal_common.interfaces import read_interfaces

_NO_ROUTE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL)
_SILENT = (errno.ETIMEDOUT, errno.EHOSTDOWN)


def this_system() -> System:
    """What of this machine matters for reaching others. Blocks."""
    version = platform.mac_ver()[0].split(".")[0]
    return System(sys.platform, int(version) if version.isdigit() else 0, read_interfaces())


def trouble_of(error: BaseException) -> tuple[Trouble, str]:
    """What an error of connecting means, and its words."""
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, socket.gaierror):
        return "no_name", why
    if isinstance(error, TimeoutError):
        return "silent", "no answer"
    if isinstance(error, OSError):
        if error.errno == errno.ECONNREFUSED:
            return "refused", why
        if error.errno in _NO_ROUTE:
            return "no_route", why
        if error.errno in _SILENT:
            return "silent", why
    return "broken", why


async def dial(host: str, port: int, deadline_s: float) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect; returns the address used too. Raises OSError, TimeoutError."""
    async with asyncio.timeout(deadline_s):
        address = await resolve(host, deadline_s)
        reader, writer = await asyncio.open_connection(address, port)
        return address, reader, writer
