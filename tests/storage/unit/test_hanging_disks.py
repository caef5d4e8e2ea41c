"""A library or a volume whose file system hangs takes none of the shared threads, and is reported."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from shoal_common.concurrency.threads import shared_threads_work
from shoal_storage import volume_manager
from shoal_storage.libraries import service as library_module
from shoal_storage.libraries.service import LibraryService
from shoal_storage.volume_manager import VolumeManager

PATH = "/mnt/nas"


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the end, so that hanging threads end."""
    event = threading.Event()
    yield event
    event.set()


def share_one_thread() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))


def context() -> Any:
    store = SimpleNamespace(layout=None, volumes={}, ballast=None)
    return SimpleNamespace(store=store, ledger=None, settings=SimpleNamespace(libraries=(PATH,), volumes=(PATH,)))


async def test_a_library_that_hangs_is_reported(released: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "_SCAN_DEADLINE_S", 0.05)
    monkeypatch.setattr(library_module, "resolve_path", lambda _: released.wait())
    share_one_thread()
    libraries = LibraryService(context())
    for _ in range(3):
        assert (await libraries._scan(PATH)).error == "it does not answer"
    await shared_threads_work()


async def test_a_volume_that_hangs_is_as_good_as_unmounted(
    released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_manager, "ANSWER_DEADLINE_S", 0.05)
    monkeypatch.setattr(volume_manager, "resolve_path", lambda _: released.wait())
    share_one_thread()
    threads_before = threading.active_count()
    volumes = VolumeManager(context(), SimpleNamespace(), {})  # type: ignore[arg-type]  # it is not used here
    hanging: Any = SimpleNamespace(id="v", is_mounted=released.wait)
    for _ in range(3):
        assert str(await volumes._resolve(PATH)) == PATH
        assert not await volumes._is_mounted(hanging)
        assert await volumes._open(PATH) == "its disk does not answer"
    assert threading.active_count() - threads_before < 10
    await shared_threads_work()
