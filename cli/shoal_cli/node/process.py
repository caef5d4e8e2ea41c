"""One child of the supervisor: started, watched, started again, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shoal_cli.node.decide import ChildStatus, History, Phase, how_it_ended, on_exit
from shoal_cli.node.plan import ChildSpec
from shoal_cli.node.readiness import Readiness
from shoal_cli.node.rotate import RotatingLog, pump
from shoal_common.logs import Log

log = Log("supervisor")

_WRAPPER = Path(__file__).parent / "child.py"
_CANNOT_START = 127


class Child:
    """Keeps one program running.

    `ready` tells when an incarnation does its work; `changed` is called after every change of
    `status`, with a line for a person or "".
    Children must be started from the main thread: Linux ties the death signal to the thread that forked.
    """

    def __init__(
        self,
        spec: ChildSpec,
        log_file: RotatingLog,
        ready: Readiness,
        changed: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self._log_file, self._ready, self._changed = log_file, ready, changed
        self._process: Process | None = None
        self._phase: Phase = "starting"
        self._restart_count = 0
        self._ends_in_a_row = 0
        self._was_ready = False
        self._last_code: int | None = None
        self._stopping = asyncio.Event()
        self._again = asyncio.Event()

    @property
    def status(self) -> ChildStatus:
        """How it is doing."""
        return ChildStatus(
            name=self.spec.name,
            phase=self._phase,
            pid=self._process.pid if self._process else 0,
            restart_count=self._restart_count,
            ends_in_a_row=self._ends_in_a_row,
            was_ready=self._was_ready,
            last_code=self._last_code,
        )

    async def run(self) -> None:
        """Keep it running until `stop`."""
        while not self._stopping.is_set():
            began_s = time.monotonic()
            self._enter("starting")
            code = await self._live_once()
            if self._stopping.is_set():
                break
            self._restart_count += 1
            if self._again.is_set():
                self._again.clear()
                self._ends_in_a_row = 0
                continue
            restart = on_exit(History(began_s, self._ends_in_a_row), time.monotonic(), code)
            self._ends_in_a_row, self._last_code = restart.ends_in_a_row, code
            self._enter(
                "waiting", f"{self.spec.name}: {how_it_ended(code)}; starting it again in {restart.delay_s:g} s"
            )
            await self._pause(restart.delay_s)
        self._enter("stopped")

    async def _live_once(self) -> int:
        try:
            process = await self._spawn()
        except OSError as e:
            log.error("cannot start", service=self.spec.name, why=e.strerror)
            return _CANNOT_START
        self._process = process
        if self._stopping.is_set():
            _signal_group(process.pid, signal.SIGKILL)  # asked to stop while it was being made: it has done nothing
        self._changed("")
        watching = asyncio.create_task(self._watch_ready(process.pid))
        try:
            code = await process.wait()
        finally:
            watching.cancel()
            # What it left behind (an instance's stages) would hold memory and ports that its successor needs.
            _signal_group(process.pid, signal.SIGKILL)
            self._process = None
        log.info("ended", service=self.spec.name, pid=process.pid, how=how_it_ended(code))
        return code

    async def _spawn(self) -> Process:
        self._ready.forget()
        reading, writing = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(_WRAPPER),
                str(os.getpid()),
                *self.spec.argv,
                env=self.spec.environ,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                # Its own session: Ctrl-C in our terminal is for us, and its children can be ended with it.
                start_new_session=True,
            )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        pump(reading, self._log_file)
        log.info("started", service=self.spec.name, pid=process.pid)
        return process

    async def _watch_ready(self, pid: int) -> None:
        await self._ready.wait(pid)
        self._was_ready = True
        self._enter("ready", f"{self.spec.name} is back, pid {pid}" if self._restart_count else "")

    def _enter(self, phase: Phase, news: str = "") -> None:
        self._phase = phase
        if news:
            log.info(news)
        self._changed(news)

    async def _pause(self, delay_s: float) -> None:
        waits = [asyncio.ensure_future(e.wait()) for e in (self._stopping, self._again)]
        await asyncio.wait(waits, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._again.clear()

    async def restart(self) -> None:
        """End this incarnation in good order; the next one starts at once."""
        self._again.set()
        self._was_ready = False
        await self._end()

    async def stop(self) -> None:
        """End it for good."""
        self._stopping.set()
        await self._end()

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.spec.stop_s):
                await process.wait()
        except TimeoutError:
            log.warning("did not stop in time; killing it", service=self.spec.name, deadline_s=self.spec.stop_s)
            _signal_group(process.pid, signal.SIGKILL)
            await process.wait()

    def kill(self) -> None:
        """End it for good, now."""
        self._stopping.set()
        if self._process is not None:
            _signal_group(self._process.pid, signal.SIGKILL)


def _signal_group(pid: int, number: signal.Signals) -> None:
    # macOS answers EPERM for a group of which only zombies are left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
