"""The parent's end of a stage: spawn it, talk to it, and never leave it behind."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import IO

from shoal_common.host.own_process import python_environment
from shoal_common.messages import DECODE_ERRORS
from shoal_common.redaction import HUB_TOKENS
from shoal_inference.stage.errors import BadControl, LinkClosed
from shoal_inference.stage.ipc.blas import child_environment
from shoal_inference.stage.ipc.messages import (
    MAX_LINE_BYTES,
    FromChild,
    Stop,
    ToChild,
    decode_from_child,
    encode_line,
)

SEND_S = 10.0
STOP_S = 5.0
KILL_S = 2.0


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """A stage opens local files only: it needs no way to the hub, and must not hold its token."""
    kept = {name: value for name, value in env.items() if name not in HUB_TOKENS}
    return {**child_environment(python_environment(kept)), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class StageProcess:
    """One child. As a context manager it is stopped and reaped on every way out; iterate it for its events.

    Events wait in the stream's buffer, which is bounded; the child gives up on a parent that does not read them.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(
        cls,
        *,
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
        stderr: int | IO[bytes] | None = None,
    ) -> StageProcess:
        """Start a child that waits for `Start`. `env` loses the hub's token and gains `blas.child_environment`."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    python,
                    "-P",
                    "-m",
                    "shoal_inference.stage",
                    "--control-fd",
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    env=_environment(os.environ if env is None else env),
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=stderr,
                )
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.returncode

    async def send(self, message: ToChild) -> None:
        """Say something to the child; LinkClosed when it is gone or does not read."""
        try:
            self._writer.write(encode_line(message))
            async with asyncio.timeout(SEND_S):
                await self._writer.drain()
        except (OSError, TimeoutError) as error:
            raise LinkClosed(f"stage process {self.pid} does not read messages: {error!r}") from error

    def __aiter__(self) -> StageProcess:
        return self

    async def __anext__(self) -> FromChild:
        """The next event; ends when the child has closed its side, which it does only by exiting."""
        try:
            line = await self._reader.readuntil(b"\n")
        except (asyncio.IncompleteReadError, OSError):
            raise StopAsyncIteration from None
        except asyncio.LimitOverrunError as error:
            raise BadControl(f"stage process {self.pid} sent a line beyond {MAX_LINE_BYTES} bytes") from error
        try:
            return decode_from_child(line)
        except DECODE_ERRORS as error:
            raise BadControl(f"a line from stage process {self.pid} does not decode: {error}") from error

    async def wait(self) -> int:
        """Its exit status, once it has one."""
        return await self._process.wait()

    async def stop(self, deadline_s: float = STOP_S) -> int:
        """Ask it to stop, then terminate, then kill; always reaps. At once when it has exited already."""
        try:
            if self.returncode is None:
                self._writer.write(encode_line(Stop()))
            async with asyncio.timeout(deadline_s):
                return await self._process.wait()
        except (TimeoutError, OSError):
            return await self._force()
        finally:
            if self.returncode is None:  # cancelled while waiting
                self._process.kill()
            self._writer.transport.abort()

    async def _force(self) -> int:
        try:
            self._process.terminate()
            async with asyncio.timeout(KILL_S):
                return await self._process.wait()
        except TimeoutError:
            self._process.kill()
        except ProcessLookupError:
            pass
        return await self._process.wait()

    async def __aenter__(self) -> StageProcess:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
