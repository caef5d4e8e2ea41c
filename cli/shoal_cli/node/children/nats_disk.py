"""The disk under this node's NATS: its ballast, and a restart of a server that refuses to store although it may."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from shoal_cli.node.children.child_process import ChildProcess
from shoal_cli.node.children.nats_storing import NatsStoring
from shoal_cli.node_home import Home
from shoal_common.concurrency.threads import DaemonCalls
from shoal_common.errors import ShoalError
from shoal_common.host.disk_space import device_of, free_bytes_of
from shoal_common.logs import StructuredLogger
from shoal_common.store.ballast import BallastFile, next_step

log = StructuredLogger("supervisor")

_CHECK_INTERVAL_S = 5.0
_ANSWER_DEADLINE_S = 10.0


class NatsDisk:
    """Watches it. `store`: where storage keeps models, with a ballast of its own; "" if storage does not run here."""

    def __init__(self, home: Home, store: Path | None, ballast_bytes: int) -> None:
        self._directory, self._home, self._store = home.nats_store, home.root, store
        self._ballast_bytes = ballast_bytes
        self._ballast = BallastFile(home.nats_ballast, ballast_bytes)
        self._storing, self._calls = NatsStoring(), DaemonCalls()

    def read_log_line(self, line: bytes) -> None:
        """Take note of what NATS logs. Called from the thread that reads it."""
        self._storing.read_line(line)

    async def watch_forever(self, nats: ChildProcess, on_change: Callable[[str], None]) -> None:
        """Watch the disk of a running server, and set its `problem`.

        `on_change` gets each new one, and "" when there is none.
        """
        while True:
            try:
                free_bytes = await self._calls.run("NATS's disk", self._check, _ANSWER_DEADLINE_S)
            except (OSError, ShoalError) as e:
                log.warning("the disk of NATS cannot be read", path=self._directory, reason=str(e))
            else:
                await self._act(nats, free_bytes, on_change)
            await asyncio.sleep(_CHECK_INTERVAL_S)

    async def _act(self, nats: ChildProcess, free_bytes: int, on_change: Callable[[str], None]) -> None:
        problem = self._storing.problem(str(self._directory), free_bytes)
        if bool(problem) != bool(nats.problem):
            if problem:
                log.warning("NATS cannot store", path=self._directory, free_bytes=free_bytes)
            else:
                log.info("NATS can store again", path=self._directory, free_bytes=free_bytes)
            nats.problem = problem
            on_change(problem)
        if self._storing.decide(free_bytes, time.monotonic()) == "restart":
            log.warning("NATS refuses to store, restarting it", path=self._directory, free_bytes=free_bytes)
            self._storing.restarting(time.monotonic())
            await nats.restart()

    def _check(self) -> int:
        """Keep the ballast as it should be. Returns the free bytes. Blocking."""
        directory = self._directory if self._directory.exists() else self._home
        free_bytes = free_bytes_of(directory)
        self._ballast.size_bytes = 0 if self._has_stores_ballast(directory) else self._ballast_bytes
        self._ballast.read_size()
        step = next_step(self._ballast.held_bytes, self._ballast.size_bytes, free_bytes, 0, 0)
        if step == "give up" or (self._storing.refuses and self._ballast.held_bytes):
            log.warning("ballast given up for NATS", freed_bytes=self._ballast.release())
            free_bytes = free_bytes_of(directory)
        elif step == "make" and self._directory.exists():
            self._ballast.make()
        return free_bytes

    def _has_stores_ballast(self, directory: Path) -> bool:
        """Whether storage's ballast is on this disk: one is enough."""
        return self._store is not None and device_of(self._store) == directory.stat().st_dev
