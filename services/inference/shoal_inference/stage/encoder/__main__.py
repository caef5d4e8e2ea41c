"""`python -m shoal_inference.stage.encoder --control-fd N`: started by a stage, not by people."""

from __future__ import annotations

import argparse
import re
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from shoal_common.errors import BadInput
from shoal_inference.stage.compute import mlx_lm_adapter
from shoal_inference.stage.encoder.messages import (
    MAX_REASON_CHARS,
    MAX_TEXT_CHARS,
    EncodePrompt,
    EncoderLimits,
    EncodingFailed,
    FromEncoder,
    LoadTokenizer,
    PromptEncoded,
    TokenizerLoaded,
)

_DATA_BYTES = re.compile(r"^VmData:\s+(\d+) kB", re.MULTILINE)
_TRIAL = "The shoal turns, 12 fish\n\n\tas one: äé 世界 🐟 " + "a" * 64 + "!"
"""Encoded once at load: a tokenizer that fails at this is of no use."""


@contextmanager
def _bounded(cpu_s: float, memory_bytes: int, has_data_limit: bool) -> Iterator[None]:
    # The timer's signal ends the process, whatever it does: Python code may be in a loop inside C or Rust. It counts
    # the time of this process alone, so that a busy or suspended machine does not end it.
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    if has_data_limit and sys.platform == "linux":
        now = _DATA_BYTES.search(Path("/proc/self/status").read_text())
        used_bytes = int(now[1]) << 10 if now else 0
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        wanted = used_bytes + memory_bytes
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS]


def _load(command: LoadTokenizer) -> mlx_lm_adapter.Tokenizer:
    model_dir, limits = Path(command.model_dir), command.limits
    with _bounded(limits.load_cpu_s, limits.load_bytes, limits.has_data_limit):
        tokenizer = mlx_lm_adapter.Tokenizer(model_dir, mlx_lm_adapter.load_config(model_dir))
        tokenizer.tokenize(_TRIAL)
    return tokenizer


def _encode(tokenizer: mlx_lm_adapter.Tokenizer, command: EncodePrompt, limits: EncoderLimits) -> list[int]:
    with _bounded(limits.cpu_s, limits.memory_bytes, limits.has_data_limit):
        text = tokenizer.render(command.messages)
        if len(text) > MAX_TEXT_CHARS:
            raise BadInput(f"the prompt is longer than {MAX_TEXT_CHARS} characters")
        return tokenizer.tokenize(text)


def _answer(tokenizer: mlx_lm_adapter.Tokenizer, command: EncodePrompt, limits: EncoderLimits) -> FromEncoder:
    try:
        return PromptEncoded(tokens=_encode(tokenizer, command, limits))
    except BadInput as error:
        return EncodingFailed(reason=error.message[:MAX_REASON_CHARS])
    except MemoryError:
        reason = f"it needs more than {limits.memory_bytes >> 20} MiB of memory"
        return EncodingFailed(reason=reason, fatal=True)
    except Exception as error:  # noqa: BLE001  # a template raises what it likes
        return EncodingFailed(reason=_reason(error))
    except BaseException as error:  # noqa: BLE001  # a Rust panic is no Exception, and may have left locks behind
        return EncodingFailed(reason=_reason(error), fatal=True)


def _run(lines: BinaryIO, answers: BinaryIO) -> int:
    encode = msgspec.json.Encoder().encode

    def emit(message: FromEncoder) -> None:
        answers.write(encode(message) + b"\n")
        answers.flush()

    command = msgspec.json.decode(lines.readline(), type=LoadTokenizer)
    try:
        tokenizer = _load(command)
    except MemoryError:
        emit(EncodingFailed(reason=f"it needs more than {command.limits.load_bytes >> 20} MiB of memory", fatal=True))
        return 1
    except BaseException as error:  # noqa: BLE001  # as above
        emit(EncodingFailed(reason=_reason(error), fatal=not isinstance(error, Exception)))
        return 1
    emit(TokenizerLoaded(eos_token_ids=sorted(tokenizer.eos_token_ids)))
    decoder = msgspec.json.Decoder(EncodePrompt)
    while line := lines.readline():
        answer = _answer(tokenizer, decoder.decode(line), command.limits)
        emit(answer)
        if isinstance(answer, EncodingFailed) and answer.fatal:
            return 1
    return 0


def main() -> int:
    """Encode prompts until the stage is gone."""
    parser = argparse.ArgumentParser(prog="shoal_inference.stage.encoder", description=__doc__)
    parser.add_argument("--control-fd", type=int, required=True, help="inherited end of the stage's socketpair")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the stage decides what it means
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with (
        socket.socket(fileno=parser.parse_args().control_fd) as control,
        control.makefile("rb") as lines,
        control.makefile("wb") as answers,
    ):
        return _run(lines, answers)


sys.exit(main())
