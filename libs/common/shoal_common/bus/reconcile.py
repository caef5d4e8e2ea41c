"""The main loop of a service: bring the actual state to the wanted one, whenever either has changed.

A pass reads everything again (level-triggered), so it does not matter what changed, how often, or whether a change
was missed. Passes cannot run hot: two of them start at least MIN_PASS_INTERVAL_S apart, and a failed one is retried
after a delay that doubles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress

from nats.errors import Error as NatsError

from shoal_common.bus.kv_mirror import KvMirror, any_changed
from shoal_common.concurrency.backoff import Backoff
from shoal_common.concurrency.notifier import Notifier
from shoal_common.errors import ShoalError
from shoal_common.logs import StructuredLogger

log = StructuredLogger("reconcile")

MIN_PASS_INTERVAL_S = 0.05
"""Minimum time from the start of one pass to the next: at most 20 a second."""
RETRY_BACKOFF = Backoff(0.5, 30.0)


def earliest(*waits_s: float | None) -> float | None:
    """Return the shortest of some waits; None is no wait."""
    return min((s for s in waits_s if s is not None), default=None)


async def republish_after_wipes(store_wipes: Notifier, republish: Callable[[], Awaitable[object]]) -> None:
    """Call `republish` each time NATS has lost what it stored, for ever; again if NATS is down meanwhile."""
    handled = 0
    while True:
        count = await store_wipes.wait_after(handled)
        with suppress(ShoalError, NatsError):
            await republish()
            handled = count


async def reconcile_forever(
    activity: str,
    mirrors: Sequence[KvMirror],
    reconcile: Callable[[], Awaitable[float | None]],
    level: Callable[[], Hashable] | None = None,
) -> None:
    """Call `reconcile` now, when a mirror changes, and after the seconds that it returned (None: only on a change).

    `level` is what `reconcile` depends on, if that is less than all mirrors: a change that leaves it equal
    causes no pass. A NatsError, ShoalError or OSError is logged with `activity` and retried. Any other exception ends
    the loop.
    """
    loop, failures = asyncio.get_running_loop(), 0
    while True:
        started_s, seen = loop.time(), tuple(mirror.changes for mirror in mirrors)
        before = level() if level else seen
        try:
            wake_s = await reconcile()
            failures = 0
        except (NatsError, ShoalError, OSError) as e:
            failures += 1
            wake_s = RETRY_BACKOFF.delay_s(failures)
            log.warning(
                f"{activity} is not possible now; trying again", reason=str(e) or type(e).__name__, wait_s=wake_s
            )
            await asyncio.sleep(wake_s)  # changes do not shorten the delay
            continue
        due_s = None if wake_s is None else loop.time() + wake_s
        while True:
            left_s = None if due_s is None else max(due_s - loop.time(), 0.0)
            await any_changed(mirrors, seen, left_s)
            await asyncio.sleep(max(started_s + MIN_PASS_INTERVAL_S - loop.time(), 0.0))
            if due_s is not None and loop.time() >= due_s:
                break
            started_s, seen = loop.time(), tuple(view.changes for view in mirrors)
            if (level() if level else seen) != before:
                break
