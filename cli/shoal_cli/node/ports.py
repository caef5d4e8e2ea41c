"""TCP ports of this machine: whether one is free, who has it, and a free one."""

from __future__ import annotations

import random
import socket

import psutil

from shoal_common.errors import Refused

_FIRST_PORT, _FIRST_DYNAMIC_PORT = 20000, 32768
_TRIES = 100


def bind_problem(bind: str, port: int) -> str | None:
    """Why nothing could listen there, in the system's words; None when something could. Port 0 always can."""
    try:
        with _bound(bind, port):
            return None
    except OSError as e:
        return e.strerror or str(e)


def free_port(bind: str) -> int:
    """A port that is free now, and that no outgoing connection will be given before a server takes it.

    Outgoing connections get ports from the system's dynamic range (from 32768 on Linux, 49152 on macOS). A server
    that restarts there may find its port taken, even by a client that connects to itself while the server is away.
    """
    for port in random.sample(range(_FIRST_PORT, _FIRST_DYNAMIC_PORT), _TRIES):
        if bind_problem(bind, port) is None:
            return port
    with _bound(bind, 0) as s:
        return int(s.getsockname()[1])


def check_gateway_port(bind: str, port: int) -> None:
    """Raise Refused, saying who has the port and what to do, when the gateway could not listen there."""
    why = bind_problem(bind, port)
    if why is not None:
        raise Refused(
            f"the gateway cannot listen on {bind} port {port} ({why}): {holder_of(port)}; stop that program, or "
            "choose another port with --port (0 takes a free one)",
            port=port,
        )


def holder_of(port: int) -> str:
    """Who listens on a port, in words."""
    try:
        for c in psutil.net_connections("tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid:
                return f"{psutil.Process(c.pid).name()}, pid {c.pid}, has it"
    except psutil.Error:
        pass  # other users' processes are not ours to see; on macOS none is
    return "a program of another user has it, or the system refuses it"


def _bound(bind: str, port: int) -> socket.socket:
    s = socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # As servers do: a port is free although old connections of it are still fading.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((bind, port))
    except OSError:
        s.close()
        raise
    return s
