"""Shards: every supported architecture computes the same in shards, and a shard holds only its own bytes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.generate import generate_step

from shoal_common.errors import InternalError
from shoal_common.messages.generation import TokenEvent
from shoal_inference.stage.compute.architectures import SUPPORTED, context_tokens, resolve
from shoal_inference.stage.compute.engine import Engine, Hidden
from shoal_inference.stage.compute.mlx_lm_adapter import remapping
from shoal_inference.stage.errors import LoadFailed, UnsupportedArchitecture
from shoal_inference.stage.ipc.messages import Loaded, Start
from shoal_inference.stage.ring.frames import Open
from tests.inference.service.conftest import Models, Rings, Run
from tests.inference.stage_ring import CHUNK_TOKENS
from tests.inference.tiny_models import CONFIGS, LAYERS, own_bytes

PROMPT = [7, 21, 40, 3, 99, 250, 8, 12, 77, 5, 64, 31, 200, 17, 2, 18, 44, 103, 290]
COUNT = 32
KEY = bytes(16)


def engines(model_dir: Path, cuts: tuple[int, ...]) -> list[Engine]:
    made = []
    for rank, (first, last) in enumerate(pairwise(cuts)):
        start = Start(
            instance="i1",
            epoch=1,
            rank=rank,
            stages=len(cuts) - 1,
            model_dir=str(model_dir),
            first_layer=first,
            last_layer=last,
        )
        made.append(Engine(start))
        made[-1].load()
        made[-1].load_tokenizer(frozenset())
    return made


def open_ask(max_tokens: int) -> Open:
    return Open(
        request="r",
        first_index=0,
        max_tokens=max_tokens,
        temperature=0.0,
        top_p=1.0,
        seed=0,
        generated=(),
    )


def in_pieces(pieces: list[Engine], prompt: list[int], count: int) -> list[int]:
    """Return greedy tokens with the shards called one after the other, as the ring does."""
    for piece in pieces:
        piece.open(KEY, open_ask(count))

    def around(tokens: list[int], sample: bool) -> Hidden | TokenEvent | None:
        result: Any = tokens
        for piece in pieces:
            result = piece.run(KEY, result, sample)
        given: Hidden | TokenEvent | None = result
        return given

    for at in range(0, len(prompt) - 1, CHUNK_TOKENS):
        assert around(prompt[at : min(at + CHUNK_TOKENS, len(prompt) - 1)], False) is None
    tokens = [prompt[-1]]
    while len(tokens) <= count:
        sampled = around(tokens[-1:], True)
        assert isinstance(sampled, TokenEvent) and sampled.token is not None
        tokens.append(sampled.token)
        if sampled.finish_reason is not None:
            break
    for piece in pieces:
        piece.drop(KEY)
    return tokens[1:]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in CONFIGS), ("llama", {"bits": 4}), ("qwen3", {"dtype": mx.bfloat16})],
)
def test_slices_of_a_model_compute_what_the_full_model_computes(
    name: str, options: dict[str, Any], models: Models
) -> None:
    model_dir = models(name, **options)
    loaded: Any = load(str(model_dir))
    model, tokenizer = loaded
    expected: list[int] = []
    for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=COUNT, prefill_step_size=CHUNK_TOKENS):
        expected.append(int(token))
        if token in tokenizer.eos_token_ids:
            break
    assert in_pieces(engines(model_dir, (0, 1, 4, LAYERS)), PROMPT, COUNT) == expected


def test_every_supported_architecture_has_a_model_above() -> None:
    assert {resolve(config, remapping()) for config in CONFIGS.values()} == set(SUPPORTED)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
@pytest.mark.parametrize("bits", [0, 4])
def test_a_stage_holds_its_own_tensors_and_no_others(
    name: str, bits: int, models: Models, own_ring: Rings, run: Run[Any]
) -> None:
    # Real child processes: MLX counts active memory per process. Wide enough that allocator rounding does not matter.
    model_dir = models(name, bits=bits, width=256)
    ring = own_ring(model_dir, (0, 1, 4, LAYERS))
    tied = name.endswith("tied")
    for child in ring.children:
        loaded = run(child.wait(Loaded))
        last = child.rank == 2
        expected = own_bytes(
            model_dir,
            ring.cuts[child.rank],
            ring.cuts[child.rank + 1],
            embedding=child.rank == 0 or (last and tied),
            head=last,
        )
        assert loaded.weight_bytes == expected
        assert abs(loaded.active_bytes - expected) <= expected * 0.01


def test_a_token_outside_the_vocabulary_is_refused(models: Models) -> None:
    (engine,) = engines(models("llama"), (0, LAYERS))
    engine.open(KEY, open_ask(3))
    with pytest.raises(InternalError, match="vocabulary"):
        engine.run(KEY, [10**6], True)


def test_a_layout_for_another_model_does_not_load(models: Models) -> None:
    for cuts in ((0, LAYERS + 1), (0, 3)):
        with pytest.raises(LoadFailed, match="lay"):
            engines(models("llama"), cuts)


def test_an_architecture_with_extra_state_is_refused() -> None:
    for model_type in ("gemma3", "deepseek_v3", "qwen3_next", "no-such-model"):
        with pytest.raises(UnsupportedArchitecture, match=model_type):
            resolve({"model_type": model_type}, remapping())


def test_context_is_the_models_own_when_none_is_asked() -> None:
    assert context_tokens(0, {"max_position_embeddings": 99}) == 99
    assert context_tokens(7, {"max_position_embeddings": 99}) == 7
    with pytest.raises(LoadFailed, match="context_tokens"):
        context_tokens(0, {})
