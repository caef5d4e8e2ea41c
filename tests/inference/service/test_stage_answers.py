"""A ring of stages answers the same as mlx-lm in one process, token for token."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.generate import generate_step

from shoal_common.messages.generation import Accepted, ChatMessage, TokenEvent
from shoal_common.models.kv_cache import KV_CACHE_STEP_TOKENS
from tests.inference.service.conftest import Models, Rings, Run
from tests.inference.stage_ring import CHUNK_TOKENS, RingOfStages
from tests.inference.tiny_models import CONTEXT_TOKENS, END_OF_TEXT, VOCABULARY

PROMPT = tuple(1 + (17 * i * i + 5 * i) % (VOCABULARY - 1) for i in range(3 * CHUNK_TOKENS + 3))
COUNT = 40


@functools.cache
def whole_model(model_dir: Path) -> Any:
    return load(str(model_dir))


def one_process(model_dir: Path, prompt: Sequence[int], count: int = COUNT) -> list[int]:
    """Return greedy tokens of mlx-lm itself, including the end of text."""
    model, _tokenizer = whole_model(model_dir)
    tokens: list[int] = []
    steps = generate_step(mx.array(list(prompt)), model, max_tokens=count, prefill_step_size=CHUNK_TOKENS)
    for token, _logprobs in steps:
        tokens.append(int(token))
        if token == END_OF_TEXT:
            break
    return tokens


def ids(answer: list[TokenEvent]) -> list[int | None]:
    assert [token.index for token in answer] == list(range(answer[0].index, answer[0].index + len(answer)))
    return [token.token for token in answer]


@pytest.mark.parametrize(
    ("name", "options", "cuts"),
    [
        ("llama", {}, (0, 6)),
        ("llama", {}, (0, 1, 6)),
        ("llama", {}, (0, 2, 4, 6)),
        ("llama-sliding", {}, (0, 3, 6)),
        ("qwen2", {}, (0, 6)),
        ("qwen2-tied", {}, (0, 3, 6)),
        ("qwen2", {}, (0, 2, 4, 6)),
        ("qwen3", {}, (0, 6)),
        ("qwen3", {}, (0, 3, 6)),
        ("qwen3", {}, (0, 1, 4, 6)),
        ("qwen3", {"bits": 4}, (0, 2, 5, 6)),
    ],
)
def test_I11_stages_answer_what_one_process_answers(
    name: str, options: dict[str, Any], cuts: tuple[int, ...], models: Models, rings: Rings, run: Run[Any]
) -> None:
    model_dir = models(name, **options)
    answer = run(rings(model_dir, cuts).generate(PROMPT, COUNT))
    expected = one_process(model_dir, PROMPT)
    assert len(expected) >= 32 and len(set(expected)) > 8, "the model says too little for the test to mean anything"
    assert ids(answer) == expected


@pytest.fixture
def ring(models: Models, rings: Rings) -> RingOfStages:
    return rings(models("llama"), (0, 2, 4, 6))


def test_concurrent_requests_each_get_what_they_get_alone(ring: RingOfStages, run: Run[Any]) -> None:
    prompts = [PROMPT[i : i + 5 + 3 * i] for i in range(8)]

    async def together() -> list[list[TokenEvent]]:
        return list(await asyncio.gather(*(ring.generate(prompt, COUNT) for prompt in prompts)))

    answers = run(together())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert ids(answer) == one_process(ring.model_dir, prompt)


def test_preempted_requests_wait_for_older_ones_and_still_answer(ring: RingOfStages, run: Run[Any]) -> None:
    # The budget holds the prompts of two of them, but only one can grow.
    prompts = [
        tuple(1 + (t * t + 7 * n) % (VOCABULARY - 1) for t in range(KV_CACHE_STEP_TOKENS - 10)) for n in range(3)
    ]
    assert CONTEXT_TOKENS == 2 * KV_CACHE_STEP_TOKENS

    async def together() -> tuple[list[list[TokenEvent]], int]:
        before = await ring.children[0].stats()
        answers = await asyncio.gather(*(ring.generate(prompt, COUNT) for prompt in prompts))
        return answers, (await ring.children[0].stats()).displaced - before.displaced

    answers, preempted = run(together())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert ids(answer) == one_process(ring.model_dir, prompt)
    long = [answer for answer in answers if len(answer) > 10]
    assert len(long) > 1 and preempted > 0, "the answers are too short for the test to mean anything"


def test_eight_at_a_time_are_answered_time_after_time(ring: RingOfStages, run: Run[Any]) -> None:
    async def eight() -> list[list[TokenEvent]]:
        return await asyncio.gather(*(ring.generate(PROMPT[:4], 2) for _ in range(8)))

    expected = one_process(ring.model_dir, PROMPT[:4], 2)
    for _ in range(5):
        assert [ids(answer) for answer in run(eight())] == [expected] * 8


def test_a_ninth_request_is_refused_busy_and_the_others_finish(ring: RingOfStages, run: Run[Any]) -> None:
    async def nine() -> tuple[str, int]:
        ring.signal(1, signal.SIGSTOP)  # so that none of the eight can finish meanwhile
        try:
            asked = [await ring.ask(PROMPT, COUNT) for _ in range(9)]
            refused = await ring.failure(asked[8])
        finally:
            ring.signal(1, signal.SIGCONT)
        return refused.code, sum([len(await ring.answer(request)) for request in asked[:8]])

    code, tokens = run(nine())
    assert (code, tokens) == ("busy", 8 * len(one_process(ring.model_dir, PROMPT)))


@pytest.mark.parametrize("answered", [1, 13, 31])
def test_an_answer_continues_where_an_earlier_epoch_stopped(answered: int, ring: RingOfStages, run: Run[Any]) -> None:
    whole = run(ring.generate(PROMPT, COUNT))
    rest = run(ring.generate(PROMPT, COUNT, generated_tokens=ids(whole)[:answered]))
    assert rest[0].index == answered
    assert ids(rest) == ids(whole)[answered:]
    assert [t.text for t in rest] == [t.text for t in whole[answered:]]


def test_a_complete_answer_is_ended_without_another_token(ring: RingOfStages, run: Run[Any]) -> None:
    async def ended(generated: list[int], max_tokens: int) -> TokenEvent:
        request = await ring.ask(PROMPT, max_tokens, generated_tokens=generated)
        return await ring.children[0].wait(TokenEvent, lambda t: t.request == request)

    for generated, reason in (([5, 6, 7], "length"), ([5, END_OF_TEXT], "stop")):
        last = run(ended(generated, 3))
        assert (last.index, last.token, last.finish_reason) == (len(generated), None, reason)


def test_a_seed_gives_the_same_tokens_on_any_layout_and_replay(
    ring: RingOfStages, rings: Rings, run: Run[Any]
) -> None:
    alone = rings(ring.model_dir, (0, 6))
    options = {"temperature": 1.0, "top_p": 0.9}
    first = run(ring.generate(PROMPT, 20, seed=11, **options))
    assert ids(run(alone.generate(PROMPT, 20, seed=11, **options))) == ids(first)
    rest = run(ring.generate(PROMPT, 20, seed=11, generated_tokens=ids(first)[:7], **options))
    assert ids(rest) == ids(first)[7:]
    assert ids(run(ring.generate(PROMPT, 20, seed=12, **options))) != ids(first)


def test_text_adds_up_to_the_decoded_tokens(ring: RingOfStages, run: Run[Any]) -> None:
    _model, tokenizer = whole_model(ring.model_dir)
    answer = run(ring.generate(tokenizer.encode("the shoal turns"), 24))
    detokenizer = tokenizer.detokenizer
    for token in answer:
        if token.token != END_OF_TEXT:
            detokenizer.add_token(token.token)
    detokenizer.finalize()
    assert "".join(token.text for token in answer) == detokenizer.text


def test_messages_go_through_the_models_chat_template(ring: RingOfStages, run: Run[Any]) -> None:
    _model, tokenizer = whole_model(ring.model_dir)
    turns = [{"role": "user", "content": "turn with the sea"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    answer = run(ring.generate((), 10, messages=[ChatMessage(role="user", content="turn with the sea")]))
    assert ids(answer) == one_process(ring.model_dir, prompt, 10)


def test_a_stop_token_ends_the_answer_and_is_not_text(
    ring: RingOfStages, own_ring: Rings, tmp_path: Path, run: Run[Any]
) -> None:
    whole = run(ring.generate(PROMPT, COUNT))
    stop = whole[9].token
    at = ids(whole).index(stop)
    shutil.copytree(ring.model_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [END_OF_TEXT, stop]}))
    cut = run(own_ring(tmp_path, (0, 3, 6)).generate(PROMPT, COUNT))
    assert ids(cut) == ids(whole)[: at + 1]
    assert cut[-1].finish_reason == "stop"
    held_back = "".join(token.text for token in cut)
    assert "".join(token.text for token in whole[:at]).startswith(held_back.rstrip("\ufffd"))


def test_an_answer_is_trimmed_to_the_context(ring: RingOfStages, run: Run[Any]) -> None:
    prompt = (PROMPT * 20)[: CONTEXT_TOKENS - 4]

    async def trimmed() -> tuple[Accepted, list[TokenEvent]]:
        request = await ring.ask(prompt, 100)
        answer = await ring.answer(request)
        return await ring.children[0].wait(Accepted, lambda a: a.request == request), answer

    accepted, answer = run(trimmed())
    assert accepted.prompt_tokens == CONTEXT_TOKENS - 4
    assert len(answer) <= 4
    assert answer[-1].finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("prompt", "code", "expected"),
    [
        (
            (PROMPT * 20)[:CONTEXT_TOKENS],
            "prompt_too_long",
            f"{CONTEXT_TOKENS} tokens and the context only {CONTEXT_TOKENS}",
        ),
        ((1, VOCABULARY, 2), "bad_input", str(VOCABULARY)),
        ((), "bad_input", "the prompt is empty"),
    ],
)
def test_a_prompt_that_cannot_be_answered_fails_before_prefill(
    prompt: Any, code: str, expected: str, ring: RingOfStages, run: Run[Any]
) -> None:
    async def refused() -> Any:
        return await ring.failure(await ring.ask(prompt, 5))

    failed = run(refused())
    assert failed.code == code
    assert expected in failed.message


def test_cancel_ends_the_answer_and_frees_every_cache(ring: RingOfStages, run: Run[Any]) -> None:
    async def cancelled() -> list[TokenEvent]:
        request = await ring.ask(PROMPT, 400)
        await ring.token(request, 3)
        await ring.cancel(request)
        return await ring.answer(request)

    answer = run(cancelled())
    assert (answer[-1].finish_reason, answer[-1].token, answer[-1].text) == ("cancelled", None, "")
    ids(answer)
    run(ring.check_idle())


def test_cancel_of_an_unknown_request_changes_nothing(ring: RingOfStages, run: Run[Any]) -> None:
    run(ring.cancel("never asked"))
    assert len(run(ring.generate(PROMPT, 3))) == 3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize(
    "options", [{"temperature": 1e-5}, {"temperature": 1e-39}, {"temperature": 5e-324}, {"top_p": 1e-39}], ids=str
)
def test_numbers_too_small_for_a_type_take_the_likeliest_token(
    dtype: mx.Dtype, options: dict[str, float], models: Models, rings: Rings, run: Run[Any]
) -> None:
    answering = rings(models("llama", dtype=dtype), (0, 6))
    greedy = ids(run(answering.generate(PROMPT, 12)))
    for seed in (1, 2):
        chosen = {"temperature": 1.0, "seed": seed, **options}
        assert ids(run(answering.generate(PROMPT, 12, **chosen))) == greedy


def test_a_low_temperature_of_float16_samples_near_the_top(models: Models, rings: Rings, run: Run[Any]) -> None:
    answering = rings(models("llama", dtype=mx.float16), (0, 6))
    greedy = ids(run(answering.generate(PROMPT, 1)))
    sampled = [ids(run(answering.generate(PROMPT, 1, temperature=2e-4, seed=seed))) for seed in range(8)]
    assert sampled == [greedy] * 8
    warm = [ids(run(answering.generate(PROMPT, 1, temperature=2.0, seed=seed))) for seed in range(16)]
    assert len({tuple(tokens) for tokens in warm}) > 1, "it samples"
