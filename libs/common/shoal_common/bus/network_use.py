"""Parts of a service that must not use NATS: a task that waits for the network there would hold up all others.

An assertion, cheap enough to stay: a call that breaks the rule raises at once, in any test that reaches it.
"""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakSet

_offline_tasks: WeakSet[asyncio.Task[Any]] = WeakSet()


def disallow_network() -> None:
    """Let the current task use NATS no more, until `allow_network`."""
    task = asyncio.current_task()
    assert task is not None
    _offline_tasks.add(task)


def allow_network() -> None:
    """Let the current task use NATS again."""
    task = asyncio.current_task()
    assert task is not None
    _offline_tasks.discard(task)


def require_network_allowed() -> None:
    """Raise AssertionError if the current task must not use NATS."""
    if asyncio.current_task() in _offline_tasks:
        raise AssertionError("NATS is used where this task must not wait for the network")
