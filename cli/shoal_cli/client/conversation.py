"""A conversation with an instance: what is sent, and the answer as it comes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import msgspec

from shoal_cli.client.gateway import Gateway


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are chosen, and how many at most."""

    max_tokens: int
    temperature: float


class Conversation:
    """The turns so far. What was said of an answer that was stopped stays in it."""

    def __init__(self, gateway: Gateway, model: str, sampling: Sampling) -> None:
        self._gateway, self._model, self._sampling = gateway, model, sampling
        self.turns: list[dict[str, str]] = []
        self.completion_tokens = 0
        self.finish_reason = ""

    def clear(self) -> None:
        """Forget everything said."""
        self.turns.clear()

    def ask(self, words: str) -> Generator[str, None, None]:
        """The answer, piece by piece. A question without any answer is taken back, so that it can be asked again."""
        self.turns.append({"role": "user", "content": words})
        said: list[str] = []
        self.completion_tokens, self.finish_reason = 0, ""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": self.turns,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": self._sampling.max_tokens,
            "temperature": self._sampling.temperature,
        }
        try:
            with self._gateway.events("/v1/chat/completions", body) as events:
                for event in events:
                    text = self._read(event)
                    if text:
                        said.append(text)
                        yield text
        finally:
            if said:
                self.turns.append({"role": "assistant", "content": "".join(said)})
            else:
                self.turns.pop()

    def _read(self, event: dict[str, Any]) -> str:
        usage = event.get("usage")
        if usage:
            self.completion_tokens = int(usage.get("completion_tokens", 0))
        for choice in event.get("choices", []):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            return str((choice.get("delta") or {}).get("content") or "")
        return ""
