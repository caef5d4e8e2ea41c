"""Listening on a TCP port, and the reason why one cannot, for a person."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

import psutil

from shoal_common.errors import Unavailable
from shoal_common.host.addresses import is_dual_stack
from shoal_common.host.interfaces import read_interfaces

_MAX_NAMED = 8


def listen(host: str, ports: Sequence[int], what: str, remedy: str, backlog: int | None = None) -> socket.socket:
    """Return a socket that listens on the first of these ports that is free.

    Raises Unavailable naming what wanted to listen, the last port, who has it, and the remedy.
    """
    for i, port in enumerate(ports):
        try:
            return _listen(host, port, backlog)
        except OSError as e:
            if i == len(ports) - 1 or e.errno == errno.EADDRNOTAVAIL:
                raise Unavailable(cannot_listen(what, host, port, e, remedy), port=port) from None
    raise ValueError("no port to try")


def _listen(host: str, port: int, backlog: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=backlog, dualstack_ipv6=is_dual_stack(host))


def cannot_listen(what: str, host: str, port: int, error: OSError, remedy: str) -> str:
    """Return why `what` cannot listen on a port: the address is no address of this machine, or who has the port."""
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{what} cannot listen: {missing_address(host)}"
    reason = error.strerror or str(error)
    return f"{what} cannot listen on {host} port {port} ({reason}): {holder_of(port)}; {remedy}"


def missing_address(host: str) -> str:
    """Return that this machine lacks an address, and which it has."""
    own = [a.partition("/")[0] for i in read_interfaces() for a in i.addresses]
    named = ", ".join(own[:_MAX_NAMED]) + (", …" if len(own) > _MAX_NAMED else "")
    return f"this machine does not have the address {host}; it has {named or 'none'}, and 0.0.0.0 stands for all"


def has_address(host: str) -> bool:
    """Return whether this machine has an address, so that something could listen on it."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as s:
            s.bind((host, 0))
    except OSError as e:
        return e.errno != errno.EADDRNOTAVAIL
    return True


def holder_of(port: int) -> str:
    """Return who listens on a port, as text."""
    try:
        for c in psutil.net_connections("tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid:
                return f"{psutil.Process(c.pid).name()}, pid {c.pid}, has it"
    except psutil.Error:
        pass  # other users' processes are not visible; on macOS none is
    return "a program of another user has it, or the system refuses it"
