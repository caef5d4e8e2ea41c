"""A blob whose file system hangs takes none of the shared threads."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.datastructures import Headers

from shoal_common.concurrency.threads import shared_threads_work
from shoal_fileserver import blob_api
from shoal_fileserver.blob_api import BlobApi

REQUESTS = 20


async def test_blobs_that_hang_leave_the_shared_threads_free(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(*_: object) -> None:
        released.wait()
        raise FileNotFoundError

    monkeypatch.setattr(blob_api, "open_content", hang)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    unused: Any = None
    api = BlobApi(unused, unused, unused, unused, unused)
    reads = [asyncio.create_task(api.blob("GET", Headers(), "0" * 64, {})) for _ in range(REQUESTS)]
    try:
        await asyncio.sleep(0)  # each has been begun
        async with asyncio.timeout(10):
            await shared_threads_work()
    finally:
        released.set()
        results = await asyncio.gather(*reads, return_exceptions=True)
    assert all(isinstance(result, FileNotFoundError) for result in results)
