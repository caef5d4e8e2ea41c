"""Outcomes of commands: the bucket `done`, which nothing else writes.

The first outcome of a command stands. The service that a command is addressed to records it. While that service is
down, nobody but the sender can end the command: it records that the command is cancelled. The service finds that when
it is back, and does not run the command.
"""

from __future__ import annotations

import msgspec

from shoal_common.bus import cluster_clock
from shoal_common.bus.keys import done_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.errors import error_body
from shoal_common.messages.envelope import Outcome


def make_outcome(identity: str, service: str, node: str, verb: str, result: object) -> Outcome:
    """Return the outcome of a command that ends now; `result` is a struct, a dict, None, or what it raised."""
    error = error_body(result) if isinstance(result, BaseException) else None
    return Outcome(
        id=identity,
        ok=error is None,
        node=node,
        service=service,
        verb=verb,
        result=msgspec.to_builtins(result) if error is None and result is not None else {},
        error=error,
        ended_at_s=round(cluster_clock.now_s(), 3),
    )


class Outcomes:
    """Reads and records outcomes. Both raise Unavailable after a long outage of NATS."""

    def __init__(self, buckets: Buckets) -> None:
        self._done = buckets.done

    async def get(self, identity: str) -> Outcome | None:
        """Return the outcome of a command; None before it has ended, and an hour after."""
        return await self._done.get_as(done_key(identity), Outcome)

    async def record(self, outcome: Outcome) -> Outcome:
        """Record an outcome, unless the command has one. Returns the one that stands."""
        if await self._done.create(done_key(outcome.id), outcome) is None:
            return await self.get(outcome.id) or outcome
        return outcome
