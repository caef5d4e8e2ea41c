"""The one form of a service's loop: what is, is made like what is wanted, again whenever either has changed.

A pass looks at everything anew (it is level-triggered), so it does not matter what it was that changed, how often, or
whether word of it was lost. Passes cannot run hot: whatever happens, two of them begin APART_S apart, and one that
fails is tried again after a pause that doubles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence

from nats.errors import Error as NatsError

from shoal_common.errors import ShoalError
from shoal_common.logs import Log
from shoal_common.watch import View, any_changed

log = Log("reconcile")

APART_S = 0.05
"""At least, from the begin of one pass to that of the next: at most 20 in a second."""
BACK_OFF_S = (0.5, 30.0)
"""After the first failure, and at most."""


def back_off_s(failures: int) -> float:
    """How long to wait after so many failures in a row."""
    first_s, most_s = BACK_OFF_S
    return min(first_s * 2.0 ** min(failures - 1, 16), most_s)


def soonest(*waits_s: float | None) -> float | None:
    """The shortest of some waits, of which None is none."""
    return min((s for s in waits_s if s is not None), default=None)


async def reconcile_forever(
    what: str,
    views: Sequence[View],
    reconcile: Callable[[], Awaitable[float | None]],
    level: Callable[[], Hashable] | None = None,
) -> None:
    """Call `reconcile` now, when a view changes, and after the seconds that it returned (None: only then).

    `level` is what it goes by, where that is less than all of the views: a change that leaves it as it is causes no
    pass. An error of NATS or of the disk (NatsError, ShoalError, OSError) is logged with `what` could not be done.
    Whatever else it raises ends the loop.
    """
    loop, failures = asyncio.get_running_loop(), 0
    while True:
        began_s, seen = loop.time(), tuple(view.changes for view in views)
        before = level() if level else seen
        try:
            wake_s = await reconcile()
            failures = 0
        except (NatsError, ShoalError, OSError) as e:
            failures += 1
            wake_s = back_off_s(failures)
            log.warning(f"{what} is not possible now; trying again", why=str(e) or type(e).__name__, wait_s=wake_s)
            await asyncio.sleep(wake_s)  # changes do not hurry it
            continue
        due_s = None if wake_s is None else loop.time() + wake_s
        while True:
            left_s = None if due_s is None else max(due_s - loop.time(), 0.0)
            await any_changed(views, seen, left_s)
            await asyncio.sleep(max(began_s + APART_S - loop.time(), 0.0))
            if due_s is not None and loop.time() >= due_s:
                break
            began_s, seen = loop.time(), tuple(view.changes for view in views)
            if (level() if level else seen) != before:
                break
