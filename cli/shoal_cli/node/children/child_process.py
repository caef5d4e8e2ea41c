"""One child of the supervisor: started, watched, restarted, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shoal_cli.node.children.readiness import Readiness
from shoal_cli.node.children.restart_policy import ChildStatus, ExitHistory, Phase, decide_restart, describe_exit
from shoal_cli.node.logs.log_rotation import RotatingLog, pump
from shoal_cli.node.node_plan import ChildSpec
from shoal_common.logs import StructuredLogger

log = StructuredLogger("supervisor")

_WRAPPER = Path(__file__).parent / "pdeathsig_exec.py"
_CANNOT_START = 127
_LOG_DRAIN_DEADLINE_S = 1.0


class ChildProcess:
    """Keeps one program running.

    `ready` waits until the process is ready; `changed` is called after every change of `status`, with a line for a
    person or ""; `translate` turns each line of its output into Shoal's log format, if it is not.
    Children must be started from the main thread: Linux ties the death signal to the thread that forked.
    """

    def __init__(
        self,
        spec: ChildSpec,
        log_file: RotatingLog,
        ready: Readiness,
        changed: Callable[[str], None],
        translate: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.spec = spec
        self._log_file, self._ready, self._changed, self._translate = log_file, ready, changed, translate
        self._log_pump: threading.Thread | None = None
        self._process: Process | None = None
        self._phase: Phase = "starting"
        self._restart_count = 0
        self._ends_in_a_row = 0
        self._was_ready = False
        self.problem = ""
        """What keeps it from its work although it runs; part of `status`."""
        self._last_code: int | None = None
        self._stopping = asyncio.Event()
        self._restarting = asyncio.Event()

    @property
    def status(self) -> ChildStatus:
        """The child's status."""
        return ChildStatus(
            name=self.spec.name,
            phase=self._phase,
            pid=self._process.pid if self._process else 0,
            restart_count=self._restart_count,
            exits_in_a_row=self._ends_in_a_row,
            was_ready=self._was_ready,
            last_exit_code=self._last_code,
            problem=self.problem,
        )

    async def run(self) -> None:
        """Keep the program running until `stop`."""
        while not self._stopping.is_set():
            started_s = time.monotonic()
            self._enter("starting")
            code = await self._run_once()
            if self._stopping.is_set():
                break
            self._restart_count += 1
            if self._restarting.is_set():
                self._restarting.clear()
                self._ends_in_a_row = 0
                continue
            restart = decide_restart(ExitHistory(started_s, self._ends_in_a_row), time.monotonic(), code)
            self._ends_in_a_row, self._last_code = restart.exits_in_a_row, code
            self._enter("waiting", f"{self.spec.name}: {describe_exit(code)}; restarting in {restart.delay_s:g} s")
            await self._pause(restart.delay_s)
        self._enter("stopped")

    async def _run_once(self) -> int:
        try:
            process = await self._spawn()
        except OSError as e:
            log.error("cannot start", child=self.spec.name, reason=e.strerror)
            return _CANNOT_START
        self._process = process
        if self._stopping.is_set():
            _signal_group(process.pid, signal.SIGKILL)  # stopped while it was starting: it has done nothing
        self._changed("")
        watcher = asyncio.create_task(self._watch_ready(process.pid))
        try:
            code = await process.wait()
        finally:
            watcher.cancel()
            # What it started (an instance's stages) would hold memory and ports that the next run needs.
            _signal_group(process.pid, signal.SIGKILL)
            await self._drain_log()
            self._process = None
        log.info("ended", child=self.spec.name, pid=process.pid, how=describe_exit(code))
        return code

    async def _spawn(self) -> Process:
        self._ready.reset()
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
                cwd=self.spec.directory,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                # Its own session: Ctrl-C in the terminal must not reach it, and its children can be ended with it.
                start_new_session=True,
            )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._log_pump = pump(reading, self._log_file, self._translate)
        log.info("started", child=self.spec.name, pid=process.pid)
        return process

    async def _drain_log(self) -> None:
        """Wait until the last lines are in the log, unless somebody holds the pipe open."""
        if self._log_pump is not None:
            await asyncio.to_thread(self._log_pump.join, _LOG_DRAIN_DEADLINE_S)

    async def _watch_ready(self, pid: int) -> None:
        await self._ready.wait(pid)
        self._was_ready = True
        self._enter("ready", f"{self.spec.name} is running again, pid {pid}" if self._restart_count else "")

    def _enter(self, phase: Phase, news: str = "") -> None:
        self._phase = phase
        if news:
            log.info(news)
        self._changed(news)

    async def _pause(self, delay_s: float) -> None:
        waits = [asyncio.ensure_future(e.wait()) for e in (self._stopping, self._restarting)]
        await asyncio.wait(waits, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._restarting.clear()

    async def restart(self) -> None:
        """Stop this process; the next one starts at once."""
        self._restarting.set()
        self._was_ready = False
        await self._end()

    async def stop(self) -> None:
        """Stop the program for good."""
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
            log.warning("did not stop in time; killing it", child=self.spec.name, deadline_s=self.spec.stop_s)
            _signal_group(process.pid, signal.SIGKILL)
            await process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the program, if it runs."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the program for good."""
        self._stopping.set()
        if self._process is not None:
            _signal_group(self._process.pid, signal.SIGKILL)


def _signal_group(pid: int, number: signal.Signals) -> None:
    # macOS answers EPERM for a group with only zombies left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
