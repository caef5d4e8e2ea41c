"""A ring of real stage processes over real sockets, driven as the inference service drives it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from shoal_common.errors import ErrorBody
from shoal_common.identity.certificates import node_host
from shoal_common.messages.generation import Accepted, Generate, TokenEvent
from shoal_inference.stage.ipc.messages import (
    Cancel,
    FromChild,
    GetStats,
    Linked,
    Listening,
    Loaded,
    RequestAccepted,
    RequestEvent,
    SetSuccessor,
    StageStats,
    StageTls,
    Start,
    StartRequest,
)
from shoal_inference.stage.ipc.parent import StageProcess
from tests.harness.identities import Authority
from tests.harness.process import is_paused

WAIT_TIMEOUT_S = 45.0
"""Deadline of waits that should take far less; exceeding it is a failure."""
IDLE_TIMEOUT_S = 10.0
"""Within which a ring without requests says that it has none."""
SECRETS = (b"of ranks 0 and 1", b"of ranks 1 and 2", b"of ranks 2 and 3", b"of ranks 3 and 4")
"""What each stage shares with the next one; the last one that there is, with rank 0."""
CHUNK_TOKENS = 8

T = TypeVar("T")


Event = FromChild | Accepted | TokenEvent


def unwrapped(event: FromChild) -> Event:
    """Return what the parent would pass on."""
    match event:
        case RequestAccepted(accepted=accepted):
            return accepted
        case RequestEvent(event=token_event):
            return token_event
    return event


class Child:
    """One stage process and its events, in order."""

    def __init__(self, process: StageProcess, rank: int) -> None:
        self.process = process
        self.rank = rank
        self.events: list[Event] = []
        self.exited = False
        self._news = asyncio.Condition()
        self.pump = asyncio.get_running_loop().create_task(self._pump())

    async def _pump(self) -> None:
        async for event in self.process:
            async with self._news:
                self.events.append(unwrapped(event))
                self._news.notify_all()
        async with self._news:
            self.exited = True
            self._news.notify_all()

    async def wait(self, kind: type[T], match: Callable[[T], bool] = lambda _: True, since: int = 0) -> T:
        """Wait for the first event of a kind after the since-th and return it."""
        async with asyncio.timeout(WAIT_TIMEOUT_S), self._news:
            while True:
                while since < len(self.events):
                    event = self.events[since]
                    since += 1
                    if isinstance(event, kind) and match(event):
                        return event
                if self.exited:
                    raise AssertionError(f"rank {self.rank} exited; it said {self.events[-3:]}")
                await self._news.wait()

    async def stats(self) -> StageStats:
        since = len(self.events)
        await self.process.send(GetStats())
        return await self.wait(StageStats, since=since)


class RingOfStages:
    """`cuts` are layer boundaries: (0, 3, 6) is two stages of three layers. With an authority they speak TLS."""

    def __init__(
        self, model_dir: Path, cuts: Sequence[int], authority: Authority | None = None, **settings: Any
    ) -> None:
        self.model_dir, self._authority = model_dir, authority
        self.cuts = tuple(cuts)
        self.settings = settings
        self.children: list[Child] = []
        self._next = 0

    @property
    def stages(self) -> int:
        return len(self.cuts) - 1

    @property
    def last(self) -> Child:
        return self.children[-1]

    def start_for(self, rank: int) -> Start:
        settings = {
            "prefill_chunk_tokens": CHUNK_TOKENS,
            "successor_secret": SECRETS[rank],
            "predecessor_secret": SECRETS[rank - 1 if rank else self.stages - 1],
            "tls": self._tls_of(rank),
            "is_encrypted": self._authority is not None,
            **self.settings,
        }
        return Start(
            instance="i1",
            epoch=3,
            rank=rank,
            stages=self.stages,
            model_dir=str(self.model_dir),
            first_layer=self.cuts[rank],
            last_layer=self.cuts[rank + 1],
            **settings,
        )

    def _tls_of(self, rank: int) -> StageTls | None:
        if self._authority is None:
            return None
        node = self._authority.node(f"rank-{rank}")
        files = {"certificate_file": str(node.certificate_file), "key_file": str(node.key_file)}
        return StageTls(authority=node.authority, **files)

    async def spawn(self, rank: int) -> Child:
        child = Child(await StageProcess.spawn(), rank)
        await child.process.send(self.start_for(rank))
        return child

    async def start(self) -> RingOfStages:
        self.children = [await self.spawn(rank) for rank in range(self.stages)]
        for child in self.children:
            await child.wait(Loaded)
        await self.link()
        return self

    async def link(self, since: Sequence[int] | None = None) -> None:
        if self.stages == 1:
            return
        ports = [(await child.wait(Listening)).port for child in self.children]
        for child in self.children:
            successor = (child.rank + 1) % self.stages
            hostname = node_host(f"rank-{successor}") if self._authority else ""
            await child.process.send(SetSuccessor(host="127.0.0.1", port=ports[successor], server_hostname=hostname))
        for child in self.children:
            await child.wait(Linked, since=since[child.rank] if since else 0)

    async def respawn(self, rank: int) -> None:
        """Replace a dead stage and connect the ring again."""
        await self.children[rank].process.stop()
        since = [len(child.events) for child in self.children]
        since[rank] = 0
        self.children[rank] = await self.spawn(rank)
        await self.children[rank].wait(Loaded)
        await self.link(since)

    async def ask(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> str:
        """Start a request; return its id. `more`: other fields of `Generate`."""
        self._next += 1
        request: str = more.pop("request", f"r{self._next}")
        generate = Generate(instance="i1", request=request, prompt_tokens=list(prompt), max_tokens=max_tokens, **more)
        await self.children[0].process.send(StartRequest(generate=generate))
        return request

    async def token(self, request: str, index: int) -> TokenEvent:
        return await self.last.wait(TokenEvent, lambda t: t.request == request and t.index == index)

    def tokens(self, request: str) -> list[TokenEvent]:
        """Return the tokens of a request so far."""
        events = (e for e in self.last.events if isinstance(e, TokenEvent) and e.request == request)
        return [event for event in events if event.error is None]

    async def answer(self, request: str) -> list[TokenEvent]:
        """Return all tokens of a request that succeeds."""
        last = self.last
        wanted = asyncio.create_task(
            last.wait(TokenEvent, lambda t: t.request == request and t.finish_reason is not None)
        )
        failed = asyncio.create_task(self.failure(request))
        try:
            await asyncio.wait({wanted, failed}, return_when=asyncio.FIRST_COMPLETED)
            if not wanted.done():
                raise AssertionError(f"{request} failed: {failed.result()}")
            await wanted
        finally:
            wanted.cancel()
            failed.cancel()
            await asyncio.gather(wanted, failed, return_exceptions=True)
        return self.tokens(request)

    async def failure(self, request: str, rank: int = 0) -> ErrorBody:
        failed = await self.children[rank].wait(TokenEvent, lambda t: t.request == request and t.error is not None)
        assert failed.error is not None
        return failed.error

    async def generate(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> list[TokenEvent]:
        return await self.answer(await self.ask(prompt, max_tokens, **more))

    async def cancel(self, request: str) -> None:
        await self.children[0].process.send(Cancel(request=request))

    async def works(self) -> bool:
        """Whether every stage runs and is idle."""
        if any(child.exited or is_paused(child.process.pid) for child in self.children):
            return False
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                await self.check_idle()
        except TimeoutError:
            return False
        return True

    async def check_idle(self) -> None:
        """Check the invariant after every test: no stage holds a request or its caches."""
        for child in self.children:
            while (stats := await child.stats()).requests or stats.sessions:
                pass  # END is still going round the ring; each iteration is a round trip

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.children[rank].process.pid, number)

    async def stop(self) -> None:
        for child in self.children:
            await child.process.stop()
            await child.pump
