"""Ports that a test can count on: one that no other test is given, and one where nobody listens."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal_cli.node.ports import bind_problem, free_port

_LOCKS = Path(tempfile.gettempdir()) / f"shoal-test-ports-{os.getuid()}"


class ReservedPort:
    """A free port that no other test on this machine is given while this object exists.

    A server that is told a port takes it some time after it was found to be free, and leaves it while it restarts: a
    lock on a file keeps the port for it meanwhile.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        _LOCKS.mkdir(exist_ok=True)
        while not self._is_reserved(host, free_port(host)):
            pass

    def _is_reserved(self, host: str, number: int) -> bool:
        self.number = number
        self._lock = (_LOCKS / str(number)).open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return bind_problem(host, number) is None


@contextmanager
def held_closed() -> Iterator[int]:
    """Yield a port where nobody listens, nor can begin to, while the body runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
