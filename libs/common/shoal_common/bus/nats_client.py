"""The client of nats-py without its two ways to lose a cancellation, and one to wait for ever.

A task that is cancelled while it waits for NATS must end; a task is cancelled only once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import nats.aio.client
import nats.aio.subscription
import nats.aio.transport
import nats.js.client
import nats.js.kv
import nats.js.object_store
from nats.aio.client import Client

from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_common.identity.nkey import Nkey

T = TypeVar("T")
_CLOSE_TIMEOUT_S = 1.0

WAITING_MODULES: tuple[ModuleType, ...] = (
    nats.aio.client,
    nats.aio.subscription,
    nats.aio.transport,
    nats.js.client,
    nats.js.kv,
    nats.js.object_store,
)
"""The modules of nats-py that call `asyncio.wait_for`."""


class NatsClient(Client):
    """A client whose publishing can be cancelled, and which may prove itself by a key."""

    def __init__(self, key: Nkey | None = None) -> None:
        super().__init__()
        # nats-py reads keys from files by the package `nkeys` alone; this is what it does with one.
        self._public_nkey = key.public if key else None

    async def _connect_to_server(self, server: Any) -> None:
        await super()._connect_to_server(server)
        # The end of a TLS handshake that timed out is never reported, and nats-py waits for it before it tries again.
        transport: Any = self._transport
        transport.wait_closed = partial(_wait_closed, transport.wait_closed)

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        # nats-py swallows a cancellation that arrives while a full buffer is flushed.
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        flushed = await super()._flush_pending(force_flush)
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
        return flushed


async def _wait_closed(wait_closed: Callable[[], Awaitable[None]]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await wait_closed()


def loses_cancellations(python: tuple[int, ...]) -> bool:
    """Return whether `asyncio.wait_for` of this Python loses a cancellation that arrives together with the result."""
    return python < (3, 12)


class _NotAboutEof(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Drop what asyncio says of each TLS connection that nats-py ends: it changes nothing."""
        return "eof_received" not in str(record.msg)


def silence_eof_warnings() -> None:
    """Keep asyncio from warning that nats-py's plain protocol cannot half-close a TLS connection."""
    logger = logging.getLogger("asyncio")
    if not any(isinstance(f, _NotAboutEof) for f in logger.filters):
        logger.addFilter(_NotAboutEof())


def patch_wait_for() -> None:
    """Give nats-py, and nobody else, the `wait_for` of Python 3.12 if this Python is older."""
    if loses_cancellations(sys.version_info[:2]):
        patched = SimpleNamespace(**{**vars(asyncio), "wait_for": wait_for})
        for module in WAITING_MODULES:
            module.asyncio = patched  # type: ignore[attr-defined]  # the name that the module imported


async def wait_for(awaited: Awaitable[T], timeout: float | None) -> T:
    """Wait `timeout` seconds (None: for ever), as `asyncio.wait_for` of Python 3.12 does. Raises TimeoutError."""
    if timeout is not None and timeout <= 0:
        done = asyncio.ensure_future(awaited)
        if not done.done():
            await cancel_and_wait(done)
        try:
            return done.result()
        except asyncio.CancelledError as e:
            raise TimeoutError from e
    async with asyncio.timeout(timeout):
        return await awaited
