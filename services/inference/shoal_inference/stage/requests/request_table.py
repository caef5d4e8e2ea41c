"""The requests in flight at one stage, and how each comes to its end here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import msgspec

from shoal_common.errors import ShoalError
from shoal_common.messages.generation import TokenEvent
from shoal_inference.stage.compute.engine import Engine, MlxThread
from shoal_inference.stage.ipc.messages import FromChild, RequestEvent

UNKNOWN_REMEMBERED = 256
"""Requests whose late frames have been logged; the count goes on without the log."""


class PassResult(msgspec.Struct, frozen=True):
    """What came back around the ring for one pass; `token` is None for a chunk of the prompt."""

    seq: int
    token: int | None
    finished: bool


class RequestState:
    """One attempt at a request. `key` is drawn afresh for each, so frames of an earlier one never match."""

    def __init__(self, key: bytes, request: str, now_s: float) -> None:
        self.key = key
        self.request = request
        self.next_seq = 0
        """Passes begun here; OPEN is 0, so the first pass is 1."""
        self.next_index = 0
        """Of the next token of the answer."""
        self.touched_s = now_s
        self.opened = False
        """Rank 0: whether the other stages have heard of it."""
        self.driver: asyncio.Task[None] | None = None
        self.answers: asyncio.Queue[PassResult] = asyncio.Queue(maxsize=64)
        self.said: list[int] = []
        """Rank 0: the tokens of the answer that this attempt has generated."""
        self.again = False
        """Rank 0: whether it was displaced, and goes before those that wait for the first time."""


class RequestTable:
    """The one place that begins and ends requests; ending frees the caches, on the MLX thread, in its turn."""

    def __init__(self, engine: Engine, thread: MlxThread, emit: Callable[[FromChild], None]) -> None:
        self._engine = engine
        self._thread = thread
        self._emit = emit
        self._by_key: dict[bytes, RequestState] = {}
        self._by_name: dict[str, RequestState] = {}
        self._unknown: dict[bytes, None] = {}
        self.unknown_frames = 0
        self.displaced = 0
        self.some = asyncio.Event()
        """Set while any request is in flight."""

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(list(self._by_key.values()))

    def add(self, entry: RequestState) -> None:
        """Know it from now on; a name that is in flight already belongs to the newer attempt."""
        self._by_key[entry.key] = entry
        self._by_name[entry.request] = entry
        self.some.set()

    def get(self, key: bytes) -> RequestState | None:
        """By the id in frames."""
        return self._by_key.get(key)

    def named(self, request: str) -> RequestState | None:
        """By the parent's name for it."""
        return self._by_name.get(request)

    def end(self, entry: RequestState) -> None:
        """Forget it and free its caches. Absent is fine."""
        if self._by_key.pop(entry.key, None) is None:
            return
        if self._by_name.get(entry.request) is entry:
            del self._by_name[entry.request]
        if not self._by_key:
            self.some.clear()
        self._thread.post(self._engine.drop, entry.key)
        if entry.driver is not None and entry.driver is not asyncio.current_task():
            entry.driver.cancel()

    def fail(self, entry: RequestState, error: ShoalError) -> None:
        """Say the error, once, and end it."""
        if entry.key in self._by_key:
            self._emit(RequestEvent(event=TokenEvent(request=entry.request, error=error.body())))
            self.end(entry)

    def say(self, entry: RequestState, event: TokenEvent) -> None:
        """Last rank: one token to the parent; the last one ends the request."""
        entry.next_index = event.index + 1
        self._emit(RequestEvent(event=event))

    def say_cancelled(self, entry: RequestState) -> None:
        """The last word of a cancelled answer, and its end."""
        event = TokenEvent(request=entry.request, index=entry.next_index, finish_reason="cancelled")
        self._emit(RequestEvent(event=event))
        self.end(entry)

    def unknown(self, key: bytes) -> bool:
        """Count a frame that nobody waits for; true the first time for its request."""
        self.unknown_frames += 1
        if key in self._unknown or len(self._unknown) >= UNKNOWN_REMEMBERED:
            return False
        self._unknown[key] = None
        return True
