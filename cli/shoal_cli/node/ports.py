"""TCP ports of this machine: whether one is free, who has it, and a free one."""

from __future__ import annotations

import random
import socket

import psutil

from shoal_common.errors import Refused

_FIRST_PORT, _FIRST_DYNAMIC_PORT = 20000, 32768
_MAX_TRIES = 100


def bind_problem(bind: str, port: int) -> str | None:
    """Return the system's reason why nothing could listen there; None when it could. Port 0 always can."""
    try:
        with _bound(bind, port):
            return None
    except OSError as e:
        return e.strerror or str(e)


def free_port(bind: str) -> int:
    """Return a free port that no outgoing connection will be given before a server takes it.

    Outgoing connections get ports from the system's dynamic range (from 32768 on Linux, 49152 on macOS). A server
    that restarts there may find its port taken, even by a client that connects to itself while the server is down.
    """
    for port in random.sample(range(_FIRST_PORT, _FIRST_DYNAMIC_PORT), _MAX_TRIES):
        if bind_problem(bind, port) is None:
            return port
    with _bound(bind, 0) as s:
        return int(s.getsockname()[1])


def check_gateway_port(bind: str, port: int) -> None:
    """Raise Refused, naming who has the port and what to do, when the gateway could not listen there."""
    reason = bind_problem(bind, port)
    if reason is not None:
        raise Refused(
            f"the gateway cannot listen on {bind} port {port} ({reason}): {holder_of(port)}; stop that program, or "
            "choose another port with --port (0: any)",
            port=port,
        )


def holder_of(port: int) -> str:
    """Return who listens on a port, as text."""
    try:
        for c in psutil.net_connections("tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid:
                return f"{psutil.Process(c.pid).name()}, pid {c.pid}, has it"
    except psutil.Error:
        pass  # other users' processes are not visible; on macOS none is
    return "a program of another user has it, or the system refuses it"


def _bound(bind: str, port: int) -> socket.socket:
    s = socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # As servers do: old connections in TIME_WAIT do not keep a port taken.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((bind, port))
    except OSError:
        s.close()
        raise
    return s
