"""Chat templates and tokenizers that loop, build gigabytes or abort: their request fails, and nothing else does."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal_common.errors import BadInput
from shoal_common.messages.generation import ChatMessage
from shoal_inference.stage.encoder.messages import MAX_TEXT_CHARS, EncoderLimits
from shoal_inference.stage.encoder.process import PromptEncoder
from shoal_inference.stage.errors import LoadFailed, UnusableTokenizer
from shoal_inference.stage.ipc.messages import Fatal
from shoal_inference.stage.ipc.parent import StageProcess
from tests.harness.waiting import eventually
from tests.inference.service.conftest import Models, Rings, Run
from tests.inference.stage_ring import RingOfStages
from tests.inference.tiny_models import CHAT_TEMPLATE, write_tokenizer

LIMITS = EncoderLimits(cpu_s=1.0, memory_bytes=256 << 20)
DOES_NOT_END = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{% set n = namespace(s='x' * 999999) %}{% for a in range(32) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
IS_LONG = "{{ 'x' * " + str(MAX_TEXT_CHARS + 1) + " }}"
ON_DEMAND = (
    "{% if messages[0].content == 'loop' %}" + DOES_NOT_END + "{% elif messages[0].content == 'grow' %}" + GROWS + ""
    "{% elif messages[0].content == 'long' %}" + IS_LONG + ""
    "{% elif messages[0].content == 'divide' %}{{ 1 / 0 }}{% endif %}" + CHAT_TEMPLATE
)
PATHOLOGICAL = "(q|qq)+$"


def chat(content: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=content)]


def set_template(directory: Path, template: str) -> None:
    """Give a tokenizer another chat template."""
    (directory / "chat_template.jinja").write_text(template)


def change_tokenizer(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def split_by(pattern: str) -> Callable[[dict[str, Any]], None]:
    """Return a change: the text is split by this regular expression first."""

    def change(content: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}

    return change


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    set_template(tmp_path, ON_DEMAND)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [5]}')
    return tmp_path


@pytest.fixture
def hostile(models: Models, tmp_path: Path) -> Path:
    """A model whose template does what the conversation says."""
    shutil.copytree(models("llama"), tmp_path, dirs_exist_ok=True)
    set_template(tmp_path, ON_DEMAND)
    return tmp_path


async def rejected(encoder: PromptEncoder, content: str) -> str:
    """Return why a conversation is rejected; the next one is not."""
    with pytest.raises(BadInput) as error:
        await encoder.encode(chat(content))
    assert await encoder.encode(chat("turn")) == await encoder.encode(chat("turn"))
    return error.value.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("loop", "longer than 1 s of computing"),
        ("long", f"longer than {MAX_TEXT_CHARS} characters"),
        ("divide", "ZeroDivisionError"),
        pytest.param(
            "grow",
            "more than 256 MiB of memory",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="no limit of data by the kernel"),
        ),
    ],
)
async def test_a_template_beyond_its_limits_fails_its_request(content: str, reason: str, tokenizer: Path) -> None:
    encoder = PromptEncoder(str(tokenizer), LIMITS)
    assert await encoder.load() == {0, 5}
    assert reason in await rejected(encoder, content)
    await encoder.close()


async def test_a_growing_template_is_ended_without_a_kernels_limit(tokenizer: Path) -> None:
    limits = EncoderLimits(cpu_s=20.0, memory_bytes=256 << 20, has_data_limit=False)
    encoder = PromptEncoder(str(tokenizer), limits)
    await encoder.load()
    assert "too much memory" in await rejected(encoder, "grow")
    await encoder.close()


async def test_a_tokenizer_that_aborts_at_a_prompt_fails_its_request(tokenizer: Path) -> None:
    change_tokenizer(tokenizer, split_by(PATHOLOGICAL))
    encoder = PromptEncoder(str(tokenizer), LIMITS)
    await encoder.load()
    assert "retry-limit-in-match over" in await rejected(encoder, "q" * 64 + "!")
    await encoder.close()


async def test_a_tokenizer_that_aborts_at_every_prompt_is_not_loaded(tokenizer: Path) -> None:
    change_tokenizer(tokenizer, split_by("(a|aa)+$"))
    with pytest.raises(UnusableTokenizer, match="retry-limit-in-match over"):
        await PromptEncoder(str(tokenizer), LIMITS).load()


@pytest.mark.parametrize("pattern", [{"Regex": "(a|aa)+$"}, {"String": "a"}])
async def test_a_decoder_that_may_grow_or_loop_is_not_loaded(pattern: dict[str, str], tokenizer: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["decoder"] = {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": pattern, "content": "bb"}],
        }

    change_tokenizer(tokenizer, change)
    with pytest.raises(LoadFailed, match="decoder replaces"):
        await PromptEncoder(str(tokenizer), LIMITS).load()


async def test_a_request_that_is_cancelled_ends_its_encoding(tokenizer: Path) -> None:
    encoder = PromptEncoder(str(tokenizer), EncoderLimits(cpu_s=600.0))
    await encoder.load()
    (child,) = encoders_of(os.getpid())
    encoding = asyncio.create_task(encoder.encode(chat("loop")))
    await eventually(computing(child), "the template is rendered")
    assert not encoding.done()
    encoding.cancel()
    await asyncio.gather(encoding, return_exceptions=True)
    await eventually(ended(child), "its end")


def computing(child: psutil.Process) -> Callable[[], Awaitable[bool]]:
    before_s = child.cpu_times().user

    async def now() -> bool:
        return child.cpu_times().user > before_s + 0.1

    return now


def ended(child: psutil.Process) -> Callable[[], Awaitable[bool]]:
    async def now() -> bool:
        return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

    return now


def encoders_of(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children()
    return [c for c in children if c.status() != psutil.STATUS_ZOMBIE and "encoder" in " ".join(c.cmdline())]


def test_a_stage_computes_while_a_template_does_not_end(hostile: Path, own_ring: Rings, run: Run[Any]) -> None:
    ring = own_ring(hostile, (0, 3, 6), encode_cpu_s=3.0)

    async def asked() -> str:
        request = await ring.ask((), 5, messages=chat("loop"))
        assert len(await ring.generate((7, 21, 40), 20)) == 20, "nobody else waits for it"
        assert not [e for e in ring.children[0].events if getattr(e, "request", "") == request]
        failed = await ring.failure(request)
        assert len(await ring.generate((), 5, messages=chat("turn"))) == 5
        return failed.code

    assert run(asked()) == "bad_input"
    run(ring.check_idle())


def test_a_stage_whose_tokenizer_is_unusable_says_so_and_ends(hostile: Path, run: Run[Any]) -> None:
    change_tokenizer(hostile, split_by("(a|aa)+$"))

    async def fatal_code(rank: int) -> str:
        async with await StageProcess.spawn() as process:
            await process.send(RingOfStages(hostile, (0, 3, 6)).start_for(rank))
            events = [event async for event in process]
            assert isinstance(events[-1], Fatal), events
            return events[-1].error.code

    assert run(fatal_code(0)) == "unsupported"
    assert run(fatal_code(1)) == "unsupported", "the last rank decodes with it"


def test_an_encoder_does_not_outlive_its_stage(hostile: Path, own_ring: Rings, run: Run[Any]) -> None:
    ring = own_ring(hostile, (0, 6), encode_cpu_s=1.0)

    async def killed() -> None:
        (child,) = encoders_of(ring.children[0].process.pid)
        await ring.ask((), 5, messages=chat("loop"))
        await eventually(computing(child), "the template is rendered")
        ring.signal(0, signal.SIGKILL)
        await eventually(ended(child), "its end")

    run(killed())
