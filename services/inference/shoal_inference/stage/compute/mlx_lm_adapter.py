"""The only module that calls mlx-lm. It ships no types: what comes out of here has some."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from mlx import utils as mlx_utils

from shoal_common.errors import BadInput
from shoal_common.host.own_process import limits_kept
from shoal_common.messages.generation import ChatMessage

# mlx-lm sets the limit of open files to 2,048 of 4,096 when it is imported, which fails under a lower hard limit.
with limits_kept():
    from mlx_lm import sample_utils as _untyped_sample_utils
    from mlx_lm import utils as _untyped_utils
    from mlx_lm.models import base as _untyped_base
    from mlx_lm.models import cache as _untyped_cache

# mlx-lm has py.typed and no annotations worth the name; as Any its calls are not checked against guesses.
utils: Any = _untyped_utils
sample_utils: Any = _untyped_sample_utils
base: Any = _untyped_base
cache: Any = _untyped_cache

Model = Any
"""An mlx-lm model: `mlx.nn.Module` reaches its name through star imports that mypy does not follow."""

Sampler = Callable[[mx.array], mx.array]
"""Log probabilities (1, vocabulary), float32, to token ids (1,)."""


class Cache(Protocol):
    """One layer's keys and values; `state` is what must be evaluated."""

    state: Any


def remapping() -> Mapping[str, str]:
    """mlx-lm's `model_type` to module name, where they differ."""
    names: dict[str, str] = utils.MODEL_REMAPPING
    return names


def check_object(path: Path) -> None:
    """Raise ValueError naming a JSON file that does not hold an object."""
    try:
        held = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path.name} holds a {type(held).__name__}, not an object")


def load_config(model_dir: Path) -> dict[str, Any]:
    """config.json, with generation_config.json's end-of-text ids over its own, as mlx-lm has it.

    Raises OSError, and ValueError naming the file.
    """
    check_object(model_dir / "config.json")
    if (model_dir / "generation_config.json").exists():
        check_object(model_dir / "generation_config.json")
    config: dict[str, Any] = utils.load_config(model_dir)
    return config


def load_lazy(model_dir: Path) -> Model:
    """The whole model with mlx-lm's renaming and quantisation applied, and not one tensor read yet."""
    model: Model
    model, _config = utils.load_model(model_dir, lazy=True)
    return model


def raise_wired_limit() -> None:
    """On Metal, keep weights resident as mlx-lm does when it generates; nothing elsewhere."""
    utils.maybe_set_recommended_wired_limit()


def parameters(model: Model) -> list[mx.array]:
    """Every tensor the model has left."""
    flat: Any = mlx_utils.tree_flatten(model.parameters())
    return [array for _name, array in flat]


def make_caches(model: Model) -> list[Cache]:
    """Fresh caches for the layers the model has left."""
    caches: list[Cache] = cache.make_prompt_cache(model)
    return caches


def attention_mask(h: mx.array, layer_cache: Cache, window: int | None) -> mx.array | str | None:
    """The mask for `h` (batch, tokens, width) after what the cache holds."""
    mask: mx.array | str | None = base.create_attention_mask(h, layer_cache, window_size=window)
    return mask


GREEDY_TEMPERATURE = 1e-4
GREEDY_TOP_P = 1e-6
"""Below either, the likeliest token is taken: in MLX's float32 1 / 1e-39 is infinite, and 1e-39 itself is 0."""


def is_greedy(temperature: float, top_p: float) -> bool:
    """Whether the likeliest token is always taken."""
    return temperature < GREEDY_TEMPERATURE or top_p < GREEDY_TOP_P


def make_sampler(temperature: float, top_p: float) -> Sampler:
    """Takes float32; greedy where `is_greedy`."""
    temperature = 0.0 if is_greedy(temperature, top_p) else temperature
    sampler: Sampler = sample_utils.make_sampler(temp=temperature, top_p=top_p)
    return sampler


class Detokenizer:
    """Streaming detokenisation of one answer."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def add(self, token: int) -> str:
        """Text that became certain with this token; may be empty."""
        self._inner.add_token(token)
        segment: str = self._inner.last_segment
        return segment

    def finish(self) -> str:
        """What was held back."""
        self._inner.finalize()
        segment: str = self._inner.last_segment
        return segment


def check_decoder(decoder: object) -> None:
    """Raise ValueError unless decoding takes time and memory in proportion to the tokens: a pattern of a `Replace`
    must be a plain string, its replacement no longer."""
    if isinstance(decoder, list):
        for part in decoder:
            check_decoder(part)
    elif isinstance(decoder, dict):
        check_decoder(list(decoder.values()))
        if "pattern" in decoder:
            pattern, content = decoder["pattern"], str(decoder.get("content", ""))
            plain = pattern.get("String") if isinstance(pattern, dict) else None
            if plain is None or len(content.encode()) > len(plain.encode()):
                raise ValueError(f"the tokenizer's decoder replaces {pattern} by {content[:80]!r}: not supported")


class Tokenizer:
    """The model's tokenizer, chat template and end-of-text ids."""

    def __init__(self, model_dir: Path, config: Mapping[str, Any]) -> None:
        # mlx-lm takes a path that does not exist for a repository and downloads it: the caller has checked.
        for path in map(model_dir.joinpath, ("tokenizer_config.json", "tokenizer.json")):
            if path.exists():
                check_object(path)
        try:
            self._inner: Any = utils.load_tokenizer(model_dir, eos_token_ids=config.get("eos_token_id"))
        except Exception as error:
            raise ValueError(
                f"tokenizer.json, or a file beside it, is of a format that tokenizers {version('tokenizers')} does "
                f"not know ({type(error).__name__}: {error})"
            ) from error
        # Decoding runs on the thread that computes.
        backend = getattr(self._inner, "backend_tokenizer", None)
        if backend is not None and backend.decoder is not None:
            check_decoder(json.loads(backend.decoder.__getstate__()))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(self._inner.eos_token_ids)

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one answer."""
        return Detokenizer(self._inner.detokenizer)

    def render(self, chat: Sequence[ChatMessage]) -> str:
        """The text that the chat template makes of a conversation; raises BadInput, or what the template raises."""
        if not self._inner.has_chat_template:
            raise BadInput("the model has no chat template: send token ids, or use an instruct model")
        turns = [{"role": message.role, "content": message.content} for message in chat]
        text: str = self._inner.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return text

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text with its special tokens in it."""
        tokens: list[int] = self._inner.encode(text, add_special_tokens=False)
        return tokens
