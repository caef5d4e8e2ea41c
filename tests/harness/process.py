"""Real child processes: run from the tree's own code, watched by their log lines, ended by signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from tests.harness import forked
from tests.harness.forked import SERVICES, ForkedService

ROOT = Path(__file__).parents[2]
LINE_DEADLINE_S = 45.0
EXIT_DEADLINE_S = 45.0


def source_path() -> str:
    """Return a PYTHONPATH that puts the tree's own packages first."""
    return os.pathsep.join(
        str(p)
        for p in (ROOT, ROOT / "libs" / "common", ROOT / "cli", ROOT / "demo", *sorted(ROOT.glob("services/*")))
    )


def node_environment(home: Path, nats_url: str, **more: str) -> dict[str, str]:
    """Return the environment of a service of the node at `home`, inheriting nothing but PATH."""
    return {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": source_path(),
        "SHOAL_HOME": str(home),
        "SHOAL_NATS": nats_url,
        "SHOAL_MEMORY_BYTES_PER_S": "10e9",  # given, so that no node of a test measures it
        "SHOAL_FILESERVER_PORT": "0",  # tests do not compete for the usual ports
        "SHOAL_STAGE_PORT": "0",
        "SHOAL_BALLAST_BYTES": "0",  # 64 MiB for every store of every test would fill a disk by themselves
        **more,
    }


def can_be_forked(environment: Mapping[str, str]) -> bool:
    """Return whether a service may be forked: it has no variable that Python or a library reads as it starts."""
    is_usual = environment.get("PYTHONPATH") == source_path() and all(
        name in ("PATH", "PYTHONPATH", "HF_ENDPOINT") or name.startswith("SHOAL_") for name in environment
    )
    return forked.is_enabled and is_usual


def start_service(
    service: str, environment: Mapping[str, str], output: IO[bytes], within: tuple[str, ...] = ()
) -> subprocess.Popen[bytes] | ForkedService:
    """Start a service, by a fork where that makes no difference. `within` is a command that runs it by exec."""
    if not within and can_be_forked(environment):
        return ForkedService(service, environment, output.fileno())
    return subprocess.Popen(
        [*within, sys.executable, "-m", f"shoal_{service}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )


def is_at_work(process: subprocess.Popen[bytes] | ForkedService) -> bool:
    """Return whether a child runs: it has neither ended nor been paused by a signal."""
    return process.poll() is None and not is_paused(process.pid)


def is_paused(pid: int) -> bool:
    """Return whether a process has been paused by a signal; one that has ended is not."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def checked_run(
    *command: str | Path, timeout_s: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. Raises AssertionError with all that it printed when it fails."""
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}:\n{ran.stdout}\n{ran.stderr}"
    return ran


class Process:
    """A running child process. `lines` is its output so far, stdout and stderr."""

    def __init__(self, process: asyncio.subprocess.Process | ForkedService, output: asyncio.StreamReader) -> None:
        self._process, self._output = process, output
        self.lines: list[str] = []
        self._new_line = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for line in self._output:
            self.lines.append(line.decode(errors="replace").rstrip("\n"))
            self._new_line.set()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self._process.returncode is None

    @property
    def output(self) -> str:
        """All its lines, for a failing test."""
        return "\n".join(self.lines)

    async def wait_line(self, *parts: str, deadline_s: float = LINE_DEADLINE_S) -> str:
        """Return the first line with all parts, past or future. Fails if the process or the time ends first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while True:
                    self._new_line.clear()
                    for line in self.lines:
                        if all(part in line for part in parts):
                            return line
                    new_line = asyncio.ensure_future(self._new_line.wait())
                    await asyncio.wait({new_line, self._reading}, return_when=asyncio.FIRST_COMPLETED)
                    new_line.cancel()
                    if self._reading.done() and not self._new_line.is_set():
                        break
        raise AssertionError(f"no line with {parts} (exit code {self._process.returncode}):\n{self.output}")

    async def wait_ready(self) -> None:
        """Return once the service logs that it is ready."""
        await self.wait_line("msg=ready")

    async def wait_exit(self, deadline_s: float = EXIT_DEADLINE_S) -> int:
        """Return its exit code (negative: a signal's number) once it has ended and all its lines are read."""
        try:
            async with asyncio.timeout(deadline_s):
                code = await self._ended()
                await self._reading
                return code
        except TimeoutError:
            raise AssertionError(f"pid {self.pid} has not ended in {deadline_s:.0f} s:\n{self.output}") from None

    async def _ended(self) -> int:
        if not isinstance(self._process, ForkedService):
            return await self._process.wait()
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        return self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.running:
            self._process.send_signal(number)

    async def kill(self) -> None:
        """Kill it (SIGKILL) and wait."""
        self.send(signal.SIGKILL)
        await self.wait_exit()


@asynccontextmanager
async def started(*arguments: str, environment: Mapping[str, str]) -> AsyncIterator[Process]:
    """Run `python <arguments>` while the body runs; kill it afterwards if it still runs."""
    service = arguments[1].removeprefix("shoal_") if arguments[0] == "-m" else ""
    is_forked = service in SERVICES and can_be_forked(environment)
    process = await (_fork(service, environment) if is_forked else _start(arguments, environment))
    try:
        yield process
    finally:
        # No child outlives its test.
        await asyncio.shield(process.kill())


async def _start(arguments: tuple[str, ...], environment: Mapping[str, str]) -> Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        env=dict(environment),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    return Process(process, process.stdout)


async def _fork(service: str, environment: Mapping[str, str]) -> Process:
    read_end, write_end = os.pipe()
    process = ForkedService(service, environment, write_end)
    os.close(write_end)
    output = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(output), os.fdopen(read_end, "rb")
    )
    return Process(process, output)
