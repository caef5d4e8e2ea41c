"""A chat with an instance: the turns that are sent, and the answer as it streams."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import msgspec

from shoal_cli.api.client import GatewayClient


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are sampled, and how many at most."""

    max_tokens: int
    temperature: float


class Conversation:
    """The turns so far, the beginning of a stopped answer included."""

    def __init__(self, gateway: GatewayClient, model: str, sampling: Sampling) -> None:
        self._gateway, self._model, self._sampling = gateway, model, sampling
        self.turns: list[dict[str, str]] = []
        self.completion_tokens = 0
        self.finish_reason = ""

    def clear(self) -> None:
        """Drop all turns."""
        self.turns.clear()

    def ask(self, prompt: str) -> Generator[str, None, None]:
        """Yield the answer, piece by piece. A prompt without any answer is dropped, so that it can be sent again."""
        self.turns.append({"role": "user", "content": prompt})
        pieces: list[str] = []
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
                        pieces.append(text)
                        yield text
        finally:
            if pieces:
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
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
