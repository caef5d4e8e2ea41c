"""Which thread a blocking call takes: one of the loop's shared ones, or one of its own if it may never return.

A stat on a network file system whose server is down may take for ever. The shared threads are few, all work needs
them, and they are joined at exit: such a call gets a thread that nobody waits for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def start_daemon_call(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
    """Start a blocking call in a thread of its own; return its result to come. Cancelling that leaves the call."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def resolve(result: T | None, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
            answer.exception()  # retrieved: maybe nobody waits any more
        else:
            answer.set_result(result)  # type: ignore[arg-type]  # without an error there is a result

    def run() -> None:
        result, error = None, None
        try:
            result = call(*args, **kwargs)
        except BaseException as e:  # noqa: BLE001  # raised where the result is awaited
            error = e
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(resolve, result, error)

    threading.Thread(target=run, daemon=True, name=f"daemon {getattr(call, '__name__', '')}").start()
    return answer


class DaemonCalls:
    """One such call at a time of each key: what hangs takes one thread, and not one more at each attempt."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Future[Any]] = {}

    async def run(self, key: Hashable, call: Callable[[], T], deadline_s: float) -> T:
        """Return the result of a call, or of the one of its key that still runs. Raises TimeoutError."""
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = start_daemon_call(call)
            running.add_done_callback(lambda _: self._running.pop(key, None))
        if not (await asyncio.wait({running}, timeout=deadline_s))[0]:
            raise TimeoutError(f"no answer within {deadline_s:g} s")
        result: T = running.result()
        return result


async def shared_threads_work() -> None:
    """Return when one of the loop's shared threads has had time for us: without them a running loop does no work."""
    await asyncio.to_thread(int)
