"""OpenAI's chat completions on the wire: parse requests, encode answers. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from shoal_common.errors import BadInput
from shoal_common.messages import decode
from shoal_common.messages.generation import ChatMessage, FinishReason, Generate
from shoal_common.messages.instances import InstanceSpec
from shoal_gateway.errors import UnsupportedParameter

MAX_STOPS = 4
DEFAULT_TEMPERATURE = 1.0
"""OpenAI's default; 0 means greedy decoding."""


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message's content. Only text is supported."""

    type: str
    text: str | None = None


class InputMessage(msgspec.Struct, frozen=True):
    """One message."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str | list[ContentPart] | None = None
    tool_calls: Any = None
    function_call: Any = None


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream contains besides text."""

    include_usage: bool = False


_Count = Annotated[int, msgspec.Meta(ge=1)]
_StopString = Annotated[str, msgspec.Meta(min_length=1)]


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of `POST /v1/chat/completions`. Unknown fields are ignored; `UNSUPPORTED` ones are refused."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    messages: Annotated[list[InputMessage], msgspec.Meta(min_length=1)]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: _StopString | Annotated[list[_StopString], msgspec.Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    top_k: Any = None
    min_p: Any = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "logprobs": (),
    "top_logprobs": (0,),
    "logit_bias": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (0, 1),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "top_k": (0, -1),
    "min_p": (0,),
}
"""Parameters that would change the answer and that Shoal lacks, each with the values that have no effect. Null, false
and empty values have no effect either."""


def parse_request(body: bytes) -> ChatRequest:
    """Parse a request's body. Raises BadMessage naming the field, or UnsupportedParameter naming the parameter."""
    request = decode(body, ChatRequest)
    for name, neutral in UNSUPPORTED.items():
        _refuse(name, getattr(request, name), neutral)
    for i, turn in enumerate(request.messages):
        _refuse(f"messages[{i}].tool_calls", turn.tool_calls)
        _refuse(f"messages[{i}].function_call", turn.function_call)
    return request


def _refuse(name: str, value: Any, neutral: tuple[Any, ...] = ()) -> None:
    if value is None or value is False or value in ([], {}, "") or value in neutral:
        return
    raise UnsupportedParameter(f"{name} is not supported by this version of Shoal: leave it out", param=name)


def to_chat_messages(request: ChatRequest) -> list[ChatMessage]:
    """Return the messages, each content as one text. Raises UnsupportedParameter for anything but text."""
    return [ChatMessage(role=t.role, content=_text(t.content, i)) for i, t in enumerate(request.messages)]


def _text(content: str | list[ContentPart] | None, index: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for j, part in enumerate(content):
        param = f"messages[{index}].content[{j}]"
        if part.type != "text":
            raise UnsupportedParameter(f"{param} is {part.type[:40]!r}: only text is supported", param=param)
        if part.text is None:
            raise BadInput(f"{param} has no text", param=param)
    return "".join(part.text or "" for part in content)


def to_generate(request: ChatRequest, spec: InstanceSpec, request_id: str) -> Generate:
    """Return the request to the instance. Without a limit the answer may fill the context; the instance trims it."""
    given = request.max_completion_tokens or request.max_tokens
    return Generate(
        instance=spec.id,
        request=request_id,
        messages=to_chat_messages(request),
        max_tokens=given or max(spec.context_tokens, 1),
        temperature=DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
    )


class AnswerHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that all parts of one answer share."""

    request: str
    created: int
    model: str
    fingerprint: str
    with_usage: bool = False
    """As with OpenAI, a stream that ends with usage has `usage: null` in its earlier chunks."""


def fingerprint(spec: InstanceSpec) -> str:
    """Return the instance and epoch that answer."""
    return f"{spec.id}-{spec.epoch}"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the `usage` object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def completion(head: AnswerHeader, text: str, reason: FinishReason, counts: dict[str, int]) -> dict[str, Any]:
    """Return a complete answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {**_common(head, "chat.completion"), "choices": [choice], "usage": counts}


def role_chunk(head: AnswerHeader) -> bytes:
    """Return the first chunk, with the role."""
    return _chunk(head, {"role": "assistant", "content": ""}, None)


def text_chunk(head: AnswerHeader, text: str) -> bytes:
    """Return a chunk of text."""
    return _chunk(head, {"content": text}, None)


def finish_chunk(head: AnswerHeader, reason: FinishReason) -> bytes:
    """Return the chunk with the finish reason."""
    return _chunk(head, {}, reason)


def usage_chunk(head: AnswerHeader, counts: dict[str, int]) -> bytes:
    """Return the chunk with the token counts."""
    return sse({**_common(head, "chat.completion.chunk"), "choices": [], "usage": counts})


DONE = b"data: [DONE]\n\n"


def sse(value: object) -> bytes:
    """Return a value as one server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _chunk(head: AnswerHeader, delta: dict[str, str], reason: FinishReason | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    empty_usage = {"usage": None} if head.with_usage else {}
    return sse({**_common(head, "chat.completion.chunk"), "choices": [choice], **empty_usage})


def _common(head: AnswerHeader, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{head.request}",
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }
