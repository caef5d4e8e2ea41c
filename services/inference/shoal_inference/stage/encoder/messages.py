"""What a stage and its encoder say to each other: one JSON object a line, over the inherited socketpair.

`LoadTokenizer` first, once, answered by `TokenizerLoaded` or `EncodingFailed`; then each `EncodePrompt` by
`PromptEncoded` or `EncodingFailed`.
"""

from __future__ import annotations

import msgspec

from shoal_common.messages.generation import ChatMessage

MAX_LINE_BYTES = 16 * 1024 * 1024
"""Longest line either side accepts: two million token ids fit."""
MAX_TEXT_CHARS = 16 * 1024 * 1024
"""Longest text that a chat template may make of a conversation."""
MAX_REASON_CHARS = 500


class EncoderLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the encoder may use. It ends itself beyond, and is ended by its stage."""

    load_cpu_s: float = 120.0
    load_bytes: int = 2 << 30
    cpu_s: float = 10.0
    """For one prompt; a prompt of a million tokens takes about 5 s."""
    elapsed_s: float = 25.0
    """For one prompt on a busy machine: less than a request waits to be accepted."""
    memory_bytes: int = 1 << 30
    """Growth while it encodes one prompt; a prompt of a million tokens takes about 600 MiB."""
    has_data_limit: bool = True
    """Whether the kernel is asked to hold it to that, where it can: Linux. The stage watches it everywhere."""


class LoadTokenizer(msgspec.Struct, frozen=True, kw_only=True):
    """Load the tokenizer of a model."""

    model_dir: str
    limits: EncoderLimits


class EncodePrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Apply the chat template to a conversation, and tokenize the text."""

    messages: list[ChatMessage]


class TokenizerLoaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The tokenizer has been loaded and tried."""

    eos_token_ids: list[int]


class PromptEncoded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The token ids of a prompt."""

    tokens: list[int]


class EncodingFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Why not. After a reason that is `fatal` the encoder exits."""

    reason: str
    fatal: bool = False


FromEncoder = TokenizerLoaded | PromptEncoded | EncodingFailed
