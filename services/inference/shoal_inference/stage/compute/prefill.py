"""How a prompt becomes passes, and when an answer ends. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import msgspec

from shoal_common.errors import BadInput, PromptTooLong
from shoal_common.messages.generation import FinishReason, Generate


class PrefillPlan(msgspec.Struct, frozen=True, kw_only=True):
    """An admitted request: what is fed, and how long the answer may become."""

    feed: tuple[int, ...]
    """The prompt's tokens, then those an earlier epoch generated."""
    prompt_tokens: int
    max_tokens: int
    """Of the whole answer, trimmed to the context."""
    first_index: int
    ended: FinishReason | None = None
    """Set when what an earlier epoch generated is the whole answer."""


class Step(msgspec.Struct, frozen=True):
    """Feed tokens[start:stop] in one pass; `sample` on the one whose last position gives a token."""

    start: int
    stop: int
    sample: bool


def admit(
    ask: Generate,
    prompt: Sequence[int],
    *,
    context_tokens: int,
    vocabulary: int,
    stop_token_ids: Collection[int],
) -> PrefillPlan:
    """The plan for a tokenised request, or BadInput or PromptTooLong before anything is computed."""
    if not prompt:
        raise BadInput("the prompt is empty: send at least one token")
    # An id outside the embedding is not an error to MLX: it reads whatever lies there.
    strange = next((t for t in (*prompt, *ask.generated_tokens) if not 0 <= t < vocabulary), None)
    if strange is not None:
        raise BadInput(f"token id {strange} is not in the model's vocabulary of {vocabulary}")
    if ask.max_tokens < 1:
        raise BadInput(f"max_tokens is {ask.max_tokens}; give at least 1")
    if not ask.temperature >= 0 or not 0 < ask.top_p <= 1:
        raise BadInput(
            f"temperature {ask.temperature} or top_p {ask.top_p} is out of range: temperature >= 0, 0 < top_p <= 1"
        )
    if len(prompt) >= context_tokens:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens and the context only {context_tokens}: shorten the prompt, "
            "or run the model with more context"
        )
    max_tokens = min(ask.max_tokens, context_tokens - len(prompt))
    return PrefillPlan(
        feed=(*prompt, *ask.generated_tokens),
        prompt_tokens=len(prompt),
        max_tokens=max_tokens,
        first_index=len(ask.generated_tokens),
        ended=_ended(ask.generated_tokens, max_tokens, stop_token_ids),
    )


def _ended(generated: Sequence[int], max_tokens: int, stop: Collection[int]) -> FinishReason | None:
    if generated and generated[-1] in stop:
        return "stop"
    return "length" if len(generated) >= max_tokens else None


def steps(token_count: int, chunk_tokens: int) -> Iterator[Step]:
    """The passes of a prompt: all but its last token in chunks, then the last alone.

    As mlx-lm's generate_step does it: other shapes round differently, and the answer must be the same.
    """
    start = 0
    while start < token_count - 1:
        stop = min(start + chunk_tokens, token_count - 1)
        yield Step(start, stop, False)
        start = stop
    yield Step(start, token_count, True)


def window(stages: int) -> int:
    """Passes of one request that may be under way at once: one in each stage, and one on the wire."""
    return stages + 1


def finish_reason(token: int, index: int, max_tokens: int, stop: Collection[int]) -> FinishReason | None:
    """Whether the answer ends with this token; the end-of-text id counts before the length."""
    if token in stop:
        return "stop"
    return "length" if index + 1 >= max_tokens else None
