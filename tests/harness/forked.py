"""Processes that are forked from one that has their code imported.

Tests start some thousand services and short lives; an interpreter that starts and imports a service takes longer than
most of them then run. These are processes like any other but for that: each has its own pid, environment, and end.
What the supervisor starts, and what is started in another namespace or by a benchmark, begins with an interpreter.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import pytest

SERVICES = ("storage", "fetcher", "fileserver", "placement", "inference", "gateway")
_PRELOADED = [
    *(f"shoal_{service}.service" for service in SERVICES),
    "tests.storage.crash_child_lease",
    "tests.harness.forked_last",
]
_context = multiprocessing.get_context("forkserver")
is_enabled = False
"""Whether services are forked: `conftest.py` says so. Benchmarks measure processes as a node starts them."""


def fork(target: Callable[..., None], *arguments: object) -> Any:
    """Run a module's function in a forked process. Returns its `multiprocessing.Process`, started."""
    _ensure_server()
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


def _ensure_server() -> None:
    # Its modules have to be those of this process: the tree's, not installed ones.
    _context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()


class ForkedService:
    """A service, `python -m shoal_<service>`, with what tests use of `subprocess.Popen`."""

    def __init__(self, service: str, environment: Mapping[str, str], output: int) -> None:
        given = Connection(os.dup(output), readable=False)
        self._process = fork(_serve, service, dict(environment), given)
        given.close()
        self.pid: int = self._process.pid
        self.sentinel: int = self._process.sentinel
        """A file that becomes readable when the service ends."""

    @property
    def returncode(self) -> int | None:
        """Its exit code (negative: a signal's number), or None while it runs."""
        return self.poll()

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code once it has ended. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(f"forked pid {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it (SIGKILL)."""
        self.send_signal(signal.SIGKILL)


def _serve(service: str, environment: dict[str, str], output: Connection) -> None:
    os.dup2(output.fileno(), 1)
    os.dup2(1, 2)
    output.close()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [f"shoal_{service}"]
    main = importlib.import_module("shoal_common.service").main
    sys.exit(main(service, importlib.import_module(f"shoal_{service}.service").run))
