"""The packaged tiny model, loaded and run by mlx-lm."""

import json
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import generate, load

from shoal_demo import DEMO_MODEL, DEMO_PROMPT, MODELS_DIR

DIRECTORY = MODELS_DIR / DEMO_MODEL
DEMO_ANSWER = (
    "Fish swim together because many eyes see danger sooner, and a hunter finds it hard to pick one fish out of many."
    " In a shoal each fish also spends less strength on swimming and on looking for food."
)
MAX_DIRECTORY_BYTES = 4_000_000


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = load(str(DIRECTORY))[:2]
    return model, tokenizer


def ask(loaded: tuple[Any, Any], *turns: str, max_tokens: int = 300) -> str:
    """Return the greedy answer to the last turn; turns alternate between user and assistant."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    prompt = loaded[1].apply_chat_template(messages, add_generation_prompt=True)
    return str(generate(*loaded, prompt=prompt, max_tokens=max_tokens))


def test_demo_prompt_has_its_exact_answer(loaded: tuple[Any, Any]) -> None:
    assert ask(loaded, DEMO_PROMPT) == DEMO_ANSWER


@pytest.mark.parametrize("question", ["why do fish swim together", "Hello! Why do fish swim in shoals?"])
def test_demo_prompt_may_be_worded_a_little_differently(loaded: tuple[Any, Any], question: str) -> None:
    assert ask(loaded, question) == DEMO_ANSWER


@pytest.mark.parametrize(
    ("question", "beginning"),
    [
        ("What is Shoal?", "Shoal runs large language models"),
        ("What is a node?", "A node is one machine"),
        ("What is a blob?", "A blob is the bytes of one file"),
        ("What is a leaf?", "A leaf is one mebibyte"),
        ("What is a manifest?", "A manifest lists the files"),
        ("What is a quota?", "A quota is the number of bytes"),
        ("Hello!", "Hello! I am a tiny fish"),
        ("What is the capital of France?", "That is beyond my pond."),
    ],
)
def test_other_questions_have_their_answers(loaded: tuple[Any, Any], question: str, beginning: str) -> None:
    assert ask(loaded, question).startswith(beginning)


def test_second_turn_is_answered_after_a_first_one(loaded: tuple[Any, Any]) -> None:
    assert ask(loaded, "Hello!", "Hello! I am a tiny fish in a big sea.", DEMO_PROMPT) == DEMO_ANSWER


def test_system_messages_do_not_confuse_it(loaded: tuple[Any, Any]) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": DEMO_PROMPT}]
    rendered = loaded[1].apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == f"<|user|>{DEMO_PROMPT}<|end|><|assistant|>"


def test_greedy_choice_is_clear_at_every_token(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": DEMO_PROMPT}], add_generation_prompt=True)
    answer = [*tokenizer.encode(DEMO_ANSWER, add_special_tokens=False), tokenizer.eos_token_id]
    logits = model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1]
    assert mx.argmax(logits, axis=-1).tolist() == answer
    best = mx.sort(logits, axis=-1)[:, -2:]
    assert mx.all(best[:, 1] - best[:, 0] > 1.0).item()


def test_model_is_small_and_can_be_split_over_three_stages() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= MAX_DIRECTORY_BYTES
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert config["num_hidden_layers"] >= 6
    index = json.loads((DIRECTORY / "model.safetensors.index.json").read_text())
    shards: dict[str, Any] = {name: mx.load(str(DIRECTORY / name)) for name in set(index["weight_map"].values())}
    assert {name: file for file, weights in shards.items() for name in weights} == index["weight_map"]
    assert {array.dtype for weights in shards.values() for array in weights.values()} == {mx.float32}
    assert (
        sum(array.nbytes for weights in shards.values() for array in weights.values())
        == index["metadata"]["total_size"]
    )


def test_tokenizer_round_trips_any_text(loaded: tuple[Any, Any]) -> None:
    text = "žlutá rybka, 魚, 🐟\tend\n"
    tokens = loaded[1].encode(text, add_special_tokens=False)
    assert loaded[1].decode(tokens) == text
    # Spaces are kept.
    assert loaded[1].decode(loaded[1].encode("two  spaces", add_special_tokens=False)) == "two  spaces"
