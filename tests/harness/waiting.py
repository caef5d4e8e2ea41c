"""Wait for what another process does, by polling until a condition holds or the deadline passes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_ASK_S = 0.02


async def eventually(
    ask: Callable[[], Awaitable[T | None]], what: str | Callable[[], str], deadline_s: float = 15.0
) -> T:
    """Return the first result that is not None or False. Fails, naming `what` was awaited, after the deadline.

    A function returns it as it is then, with what there is instead.
    """
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + deadline_s
    while True:
        answer = await ask()
        if answer is not None and answer is not False:
            return answer
        if loop.time() > give_up_s:
            raise AssertionError(f"not within {deadline_s:.0f} s: {what if isinstance(what, str) else what()}")
        await asyncio.sleep(_ASK_S)
