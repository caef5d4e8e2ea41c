"""Generation: the request, its acceptance, its tokens."""

from __future__ import annotations

from typing import Literal

from shoal_common.errors import ErrorBody
from shoal_common.messages import WireStruct


class ChatMessage(WireStruct):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    """Who speaks."""
    content: str
    """The text."""


class Generate(WireStruct):
    """`svc.inference.<node>.generate`: generate an answer, on the node with rank 0 of the instance."""

    instance: str
    """The instance's id."""
    request: str
    """Id of the request; tokens go to `shoal.v1.tok.<request>`."""
    messages: list[ChatMessage] = []
    """The conversation, to which the model's chat template is applied."""
    prompt_tokens: list[int] = []
    """The prompt as token ids, instead of messages."""
    generated_tokens: list[int] = []
    """Tokens that an earlier epoch produced: they follow the prompt, and `index` continues after them."""
    max_tokens: int = 512
    """Maximum number of tokens to generate."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling: cumulative probability of the tokens sampled from."""
    seed: int | None = None
    """Seed of the sampler; null means a random one."""


class Accepted(WireStruct):
    """The prompt fits the context, and generation has started."""

    request: str
    """Id of the request."""
    prompt_tokens: int
    """Length of the prompt."""


class CancelGenerate(WireStruct):
    """`svc.inference.<node>.cancel`: stop generating an answer, on the node with rank 0 of the instance."""

    instance: str
    """The instance's id."""
    request: str
    """Id of the request."""


FinishReason = Literal["stop", "length", "cancelled"]


class TokenEvent(WireStruct):
    """One token of an answer, or the error that ended it.

    Subject `shoal.v1.tok.<request>` (core NATS, not stored), published by inference of the last rank's node, or
    of any node of the instance for an error.
    """

    request: str
    """Id of the request."""
    index: int = 0
    """Number of the token, from 0; -1 carries no token: the answer waits for KV cache and will continue."""
    token: int | None = None
    """Token id; null if none was sampled: the answer was cancelled, or complete already."""
    text: str = ""
    """Text that the token completes, in whole characters; may be empty."""
    finish_reason: FinishReason | None = None
    """Why the answer has ended; null while it continues."""
    error: ErrorBody | None = None
    """The error that ended the answer; an event with an error is the last one, whatever its index."""
