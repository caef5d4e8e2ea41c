"""What may hang takes no shared thread, and without shared threads a service does not count as alive."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal_common.concurrency.threads import DaemonCalls, shared_threads_work
from shoal_common.host.sd_notify import ServiceManagerNotifier
from shoal_common.liveness import liveness as liveness_module
from shoal_common.liveness.liveness import Liveness

BEAT_S = 0.02
SILENCE_S = 0.5
NEWS_S = 10.0


@asynccontextmanager
async def blocked_threads() -> AsyncIterator[threading.Event]:
    """All of the loop's shared threads, of which there is one, wait for the event."""
    release = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        blocked = asyncio.ensure_future(asyncio.to_thread(release.wait))
        try:
            yield release
        finally:
            release.set()
            await blocked


@asynccontextmanager
async def running(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_hangs_takes_one_thread_of_its_own() -> None:
    release, calls = threading.Event(), DaemonCalls()
    begun = 0

    def hang() -> str:
        nonlocal begun
        begun += 1
        release.wait()
        return "answer"

    for _ in range(3):
        with pytest.raises(TimeoutError):
            await calls.run("key", hang, 0.01)
    assert await calls.run("other", lambda: 7, NEWS_S) == 7
    await shared_threads_work()
    late = asyncio.ensure_future(calls.run("key", hang, NEWS_S))
    release.set()
    assert (await late, begun) == ("answer", 1)


async def test_an_error_of_a_call_is_raised_where_it_is_awaited() -> None:
    with pytest.raises(ZeroDivisionError):
        await DaemonCalls().run("key", lambda: 1 // 0, NEWS_S)


async def test_the_watchdog_hears_nothing_while_shared_threads_hang(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.setblocking(False)
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": str(int(3e6 * BEAT_S))}
        async with blocked_threads() as release, running(ServiceManagerNotifier(environ).watchdog_forever()):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SILENCE_S):
                    await loop.sock_recv(supervisor, 100)
            release.set()
            async with asyncio.timeout(NEWS_S):
                assert await loop.sock_recv(supervisor, 100) == b"WATCHDOG=1"


async def test_liveness_is_not_renewed_while_shared_threads_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness_module, "next_beat_in_s", lambda _, __: BEAT_S)
    renewed = asyncio.Event()

    class Renewals:
        async def compare_and_set(self, key: str, value: object, revision: int) -> int:
            renewed.set()
            return revision + 1

    unpublished: Any = Renewals()
    async with blocked_threads() as release, running(Liveness(unpublished, "a", "gateway").renew_forever()):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE_S):
                await renewed.wait()
        release.set()
        async with asyncio.timeout(NEWS_S):
            await renewed.wait()
