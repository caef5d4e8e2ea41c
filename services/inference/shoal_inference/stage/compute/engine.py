"""Caches, forward passes and sampling of the requests in flight. Everything here runs on the one MLX thread."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx
import msgspec
import numpy as np

from shoal_common.errors import InternalError
from shoal_common.messages.generation import Generate, TokenEvent
from shoal_inference.stage.compute import architectures, mlx_lm_adapter, prefill
from shoal_inference.stage.compute.shard import LoadedShard, load_shard
from shoal_inference.stage.errors import FatalError, LoadFailed, UnreadableModel
from shoal_inference.stage.ipc.messages import Loaded, Start
from shoal_inference.stage.ring.frames import ITEM_BYTES, Dtype, Open

_WIRE = {mx.bfloat16: Dtype.BF16, mx.float16: Dtype.F16, mx.float32: Dtype.F32}
_NUMPY = {Dtype.BF16: np.uint16, Dtype.F16: np.float16, Dtype.F32: np.float32}


class Hidden(msgspec.Struct, frozen=True):
    """A hidden state as bytes: `shape` is (batch, tokens, width), elements little-endian."""

    dtype: Dtype
    shape: tuple[int, int, int]
    data: bytes


def to_hidden(h: mx.array) -> Hidden:
    """An evaluated (batch, tokens, width) array as bytes. numpy has no bf16, so that goes as its bits."""
    batch, tokens, width = h.shape
    dtype = _WIRE.get(h.dtype)
    if dtype is None:
        raise InternalError(f"hidden states of type {h.dtype} cannot be sent: convert the model to bf16")
    bits = h.view(mx.uint16) if dtype is Dtype.BF16 else h
    # `Any`: mx.array exports a buffer, which its stub does not say.
    exported: Any = mx.contiguous(bits)
    return Hidden(dtype, (batch, tokens, width), bytes(memoryview(exported)))


def from_hidden(hidden: Hidden) -> mx.array:
    """The array those bytes are; raises InternalError when they are not one."""
    batch, tokens, width = hidden.shape
    if hidden.dtype not in _NUMPY or len(hidden.data) != batch * tokens * width * ITEM_BYTES[hidden.dtype]:
        raise InternalError(
            f"{len(hidden.data)} bytes of {hidden.dtype.name} do not make a hidden state of shape {hidden.shape}"
        )
    flat = mx.array(np.frombuffer(hidden.data, dtype=_NUMPY[hidden.dtype]).reshape(hidden.shape))
    return flat.view(mx.bfloat16) if hidden.dtype is Dtype.BF16 else flat


def step_seed(seed: int, index: int) -> int:
    """The seed of the index-th token: the same after a replay, which does not draw the earlier ones again."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _Sampler:
    """The last rank's side of a request: numbering, sampling, text."""

    def __init__(self, ask: Open, tokenizer: mlx_lm_adapter.Tokenizer) -> None:
        self.ask = ask
        self.index = ask.first_index
        self.stop = tokenizer.eos_token_ids
        self.sampler = mlx_lm_adapter.make_sampler(ask.temperature, ask.top_p)
        self.detokenizer = tokenizer.detokenizer()
        for token in ask.generated:
            self.detokenizer.add(token)  # said already, by an earlier epoch

    def take(self, token: int) -> TokenEvent:
        reason = prefill.finish_reason(token, self.index, self.ask.max_tokens, self.stop)
        text = "" if reason == "stop" else self.detokenizer.add(token)
        if reason is not None:
            text += self.detokenizer.finish()
        event = TokenEvent(request=self.ask.request, index=self.index, token=token, text=text, finish_reason=reason)
        self.index += 1
        return event


class _SessionState(msgspec.Struct):
    caches: list[mlx_lm_adapter.Cache]
    answer: _Sampler | None


class Engine:
    """One stage's shard and the sessions that run on it."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._shard: LoadedShard | None = None
        self._config: dict[str, Any] = {}
        self._tokenizer: mlx_lm_adapter.Tokenizer | None = None
        self._eos_token_ids: frozenset[int] = frozenset()
        self._sessions: dict[bytes, _SessionState] = {}
        self.context_tokens = 0

    def load(self) -> Loaded:
        """Read config and own weights; raises FatalError."""
        begun_s = monotonic()
        start, model_dir = self._start, Path(self._start.model_dir)
        if not (model_dir / "config.json").is_file():
            raise LoadFailed(f"{model_dir} has no config.json: the model is not on this node, run `shoal pull`")
        try:
            config = mlx_lm_adapter.load_config(model_dir)
            model_type = architectures.resolve(config, mlx_lm_adapter.remapping())
            self.context_tokens = architectures.context_tokens(start.context_tokens, config)
        except FatalError:
            raise
        except Exception as error:  # whatever a file makes mlx-lm raise
            raise UnreadableModel.because(f"the configuration in {model_dir}", error) from error
        mlx_lm_adapter.raise_wired_limit()
        shard = load_shard(model_dir, start.first_layer, start.last_layer, start.leaves)
        if shard.is_first != (start.rank == 0) or shard.is_last != (start.rank == start.stages - 1):
            raise LoadFailed(
                f"rank {start.rank} of {start.stages} was given layers {start.first_layer} to {start.last_layer}: "
                "ranks and layers of the layout do not match"
            )
        mx.clear_cache()
        weights_bytes = mx.get_active_memory()
        self._shard, self._config = shard, config
        return Loaded(
            weight_bytes=shard.weight_bytes,
            active_bytes=weights_bytes,
            peak_bytes=mx.get_peak_memory(),
            load_s=round(monotonic() - begun_s, 3),
            context_tokens=self.context_tokens,
            model_type=model_type,
        )

    def load_tokenizer(self, eos_token_ids: frozenset[int]) -> None:
        """On the last rank, read the tokenizer, which decodes; it has been tried in a process of its own.

        `eos_token_ids`: what the encoder read, for the first rank. Raises LoadFailed.
        """
        self._eos_token_ids = eos_token_ids
        if self._start.rank == self._start.stages - 1:
            model_dir = Path(self._start.model_dir)
            try:
                self._tokenizer = mlx_lm_adapter.Tokenizer(model_dir, self._config)
            except Exception as error:  # the tokenizer's library raises plain ones
                raise UnreadableModel.because(f"the tokenizer in {model_dir}", error) from error

    def plan(self, ask: Generate, prompt: Sequence[int]) -> prefill.PrefillPlan:
        """Rank 0: admit. Raises BadInput, PromptTooLong."""
        if self._shard is None:
            raise InternalError("the stage has not loaded its model yet")
        return prefill.admit(
            ask,
            prompt,
            context_tokens=self.context_tokens,
            vocabulary=self._shard.vocabulary,
            stop_token_ids=self._eos_token_ids,
        )

    def open(self, session: bytes, ask: Open) -> None:
        """Begin a request with empty caches."""
        if self._shard is None or (self._shard.is_last and self._tokenizer is None):
            raise InternalError("the stage has not loaded its model yet")
        answer = None if self._tokenizer is None else _Sampler(ask, self._tokenizer)
        self._sessions[session] = _SessionState(self._shard.make_caches(), answer)

    def run(self, session: bytes, given: Sequence[int] | Hidden, sample: bool) -> Hidden | TokenEvent | None:
        """One pass. On the last rank: the token, or None for a chunk of the prompt. Elsewhere the hidden state."""
        shard, state = self._shard, self._sessions.get(session)
        if shard is None or state is None:
            raise InternalError("the request's caches have been freed")
        if isinstance(given, Hidden) == shard.is_first:
            raise InternalError("tokens go to rank 0 and hidden states to the others")
        if not isinstance(given, Hidden) and not all(0 <= token < shard.vocabulary for token in given):
            raise InternalError("a token id is outside the vocabulary: the stages have different models")
        h = from_hidden(given) if isinstance(given, Hidden) else shard.embed(given)
        h = shard.forward(h, state.caches)
        states = [layer_cache.state for layer_cache in state.caches]
        result: Hidden | TokenEvent | None = None
        if state.answer is None:
            mx.eval(h, states)
            result = to_hidden(h)
        elif sample:
            result = self._sample(shard, state.answer, h)
        else:
            # As generate_step: the head is not computed for a prompt's chunks.
            mx.eval(states)
        if not sample:
            mx.clear_cache()
        return result

    def drop(self, session: bytes) -> None:
        """Free a request's caches; absent is fine."""
        if self._sessions.pop(session, None) is not None:
            mx.clear_cache()

    def memory(self) -> tuple[int, int, int]:
        """Sessions, active bytes and peak bytes."""
        return len(self._sessions), mx.get_active_memory(), mx.get_peak_memory()

    def _sample(self, shard: LoadedShard, answer: _Sampler, h: mx.array) -> TokenEvent:
        if not mlx_lm_adapter.is_greedy(answer.ask.temperature, answer.ask.top_p):
            # mlx-lm samples from the global state; requests interleave, so it is set for each token.
            mx.random.seed(step_seed(answer.ask.seed, answer.index))
        token: Any = answer.sampler(shard.log_probabilities(h)).item()
        return answer.take(int(token))


P = ParamSpec("P")
R = TypeVar("R")


class MlxThread:
    """The one thread that MLX runs on: its streams and default device belong to a thread.

    Work queues in order. Its length is bounded by the requests in flight: each has at most one pass queued.
    """

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlx")

    def post(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run it in its turn, its result wanted by nobody."""
        self.executor.submit(function, *args, **kwargs)
