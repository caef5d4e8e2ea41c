"""The stage's end of its encoder: start it, ask it, and end it when it takes too long or too much.

A process of its own, because neither a template in a loop, nor one that builds gigabytes, nor a tokenizer that aborts
can be stopped inside the process that computes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec
import psutil

from shoal_common.errors import BadInput, StageLost
from shoal_common.logs import StructuredLogger
from shoal_common.messages import DECODE_ERRORS
from shoal_common.messages.generation import ChatMessage
from shoal_inference.stage.encoder.messages import (
    MAX_LINE_BYTES,
    EncodePrompt,
    EncoderLimits,
    EncodingFailed,
    FromEncoder,
    LoadTokenizer,
    PromptEncoded,
    TokenizerLoaded,
)
from shoal_inference.stage.errors import LoadFailed, UnreadableModel, UnusableTokenizer

_WATCH_INTERVAL_S = 0.05
_LOAD_ELAPSED_S = 600.0

log = StructuredLogger("stage.encoder")
_decoder: msgspec.json.Decoder[FromEncoder] = msgspec.json.Decoder(FromEncoder)


class _EncoderEnded(Exception):
    """It exceeded a limit, or died: why."""


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """A stage's, without Shoal's settings: nothing in a model needs to know them."""
    return {name: value for name, value in env.items() if not name.startswith("SHOAL_")}


class _EncoderProcess:
    """One child."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._idle_bytes = 0

    @classmethod
    async def spawn(cls) -> _EncoderProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",
                    "-m",
                    "shoal_inference.stage.encoder",
                    "--control-fd",
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    env=_environment(os.environ),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                )
            except BaseException:
                ours.close()
                raise
        return cls(process, *await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES))

    async def load(self, command: LoadTokenizer) -> FromEncoder:
        limits = command.limits
        answer = await self._ask(command, _LOAD_ELAPSED_S, limits.load_bytes, limits.load_cpu_s)
        self._idle_bytes = self._occupied_bytes()
        return answer

    async def encode(self, command: EncodePrompt, limits: EncoderLimits) -> FromEncoder:
        return await self._ask(command, limits.elapsed_s, self._idle_bytes + limits.memory_bytes, limits.cpu_s)

    async def _ask(
        self, command: LoadTokenizer | EncodePrompt, elapsed_s: float, max_bytes: int, cpu_s: float
    ) -> FromEncoder:
        """Its answer. Raises _EncoderEnded; whoever calls it then ends the process, as when it is cancelled."""
        reading = asyncio.ensure_future(self._exchange(command))
        try:
            async with asyncio.timeout(elapsed_s):
                while not (await asyncio.wait({reading}, timeout=_WATCH_INTERVAL_S))[0]:
                    if self._occupied_bytes() > max_bytes:
                        raise _EncoderEnded("it needs too much memory")
            return _decoder.decode(reading.result())
        except TimeoutError:
            raise _EncoderEnded(f"it takes longer than {elapsed_s:g} s") from None
        except asyncio.LimitOverrunError:
            raise _EncoderEnded(f"the answer is longer than {MAX_LINE_BYTES} bytes") from None
        except DECODE_ERRORS as error:
            raise _EncoderEnded(f"its answer does not decode: {error}") from None
        except (asyncio.IncompleteReadError, OSError):
            status = await self._process.wait()
            if status == -signal.SIGPROF:
                raise _EncoderEnded(f"it takes longer than {cpu_s:g} s of computing") from None
            exit_text = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            raise _EncoderEnded(f"the process that does it died: {exit_text}") from None
        finally:
            reading.cancel()

    async def _exchange(self, command: LoadTokenizer | EncodePrompt) -> bytes:
        self._writer.write(msgspec.json.encode(command) + b"\n")
        await self._writer.drain()
        return await self._reader.readuntil(b"\n")

    def _occupied_bytes(self) -> int:
        with suppress(psutil.Error):
            return int(psutil.Process(self._process.pid).memory_info().rss)
        return 0

    async def wait(self) -> None:
        await self._process.wait()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        self._writer.transport.abort()


class PromptEncoder:
    """Encodes a model's prompts, one at a time, in a process that is started again after it has been ended."""

    def __init__(self, model_dir: str, limits: EncoderLimits) -> None:
        self._model_dir, self._limits = model_dir, limits
        self._process: _EncoderProcess | None = None
        self._turn = asyncio.Lock()

    async def load(self) -> frozenset[int]:
        """Start the process, load the tokenizer and try it; return the ids that end an answer.

        Raises UnreadableModel when its files do not load, and UnusableTokenizer when it exceeds the limits or
        aborts: another attempt would end in the same way.
        """
        unusable = f"the tokenizer in {self._model_dir} cannot be used"
        try:
            process = await _EncoderProcess.spawn()
        except OSError as error:
            raise LoadFailed(f"cannot start the process that encodes prompts: {error}") from error
        try:
            answer = await process.load(LoadTokenizer(model_dir=self._model_dir, limits=self._limits))
            if isinstance(answer, EncodingFailed) and answer.fatal:
                raise UnusableTokenizer(f"{unusable}: {answer.reason}")
            if not isinstance(answer, TokenizerLoaded):
                reason = answer.reason if isinstance(answer, EncodingFailed) else "it sent something else"
                raise UnreadableModel(f"cannot load the tokenizer in {self._model_dir}: {' '.join(reason.split())}")
        except _EncoderEnded as error:
            process.kill()
            raise UnusableTokenizer(f"{unusable}: {error}") from None
        except BaseException:
            process.kill()
            raise
        self._process = process
        return frozenset(answer.eos_token_ids)

    async def encode(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation. Raises BadInput when the model's template or tokenizer fails at it."""
        async with self._turn:
            if self._process is None:
                try:
                    await self.load()
                except (LoadFailed, UnusableTokenizer) as error:
                    raise StageLost(f"{error.message}; ask again in a moment") from error
            process = self._process
            assert process is not None
            self._process = None  # until it has answered: cancelled, or ended, it is not asked again
            try:
                answer = await process.encode(EncodePrompt(messages=list(messages)), self._limits)
            except _EncoderEnded as error:
                answer = EncodingFailed(reason=str(error), fatal=True)
            except BaseException:
                process.kill()
                raise
            if isinstance(answer, EncodingFailed) and answer.fatal:
                process.kill()
                log.warning("encoder ended", reason=answer.reason)
            else:
                self._process = process
        if isinstance(answer, PromptEncoded):
            return tuple(answer.tokens)
        reason = answer.reason if isinstance(answer, EncodingFailed) else "it sent something else"
        raise BadInput(f"the model's chat template or tokenizer rejects the messages: {reason}")

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await process.wait()
