"""A stage's lease of its model: taken from this node's storage before its process reads, given back after its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.errors import Error as NatsError

from shoal_common.errors import ShoalError, Unavailable
from shoal_common.logs import Log
from shoal_common.messages.questions import AskLease, Done, Leased, Unlease
from shoal_common.questions import Ask
from shoal_inference.decide import Assignment

log = Log("lease")

LEASE_WITHIN_S = 60.0
"""Longer than a supervisor takes to bring storage back."""
_ANSWER_WITHIN_S = 10.0
_AGAIN_AFTER_S = 0.5
_GIVE_BACK_WITHIN_S = 1.0


@asynccontextmanager
async def leased(
    ask: Ask, node: str, assignment: Assignment, within_s: float = LEASE_WITHIN_S
) -> AsyncIterator[Leased]:
    """A lease of a stage's model, while the body runs. Raises what storage answers; Unavailable when it does not."""
    lease = await _take(ask, node, assignment, within_s)
    try:
        yield lease
    finally:
        # At once rather than when storage looks: that a process has ended, it finds out by itself.
        try:
            await ask("storage", node, "unlease", Unlease(id=lease.id), Done, deadline_s=_GIVE_BACK_WITHIN_S)
        except (ShoalError, NatsError) as e:
            log.info("a lease was not given back; it ends by itself", lease=lease.id, why=str(e))


async def _take(ask: Ask, node: str, assignment: Assignment, within_s: float) -> Leased:
    spec, rank = assignment.spec, assignment.stage.rank
    question = AskLease(
        model=spec.model,
        holder=f"stage {rank} of instance {spec.id}",
        instance=spec.id,
        layers=[assignment.stage.first_layer, assignment.stage.last_layer],
    )
    give_up_s = asyncio.get_running_loop().time() + within_s
    while True:
        try:
            return await ask("storage", node, "lease", question, Leased, deadline_s=_ANSWER_WITHIN_S)
        except (ShoalError, NatsError) as e:
            if isinstance(e, ShoalError) and not e.retryable:
                raise
            if asyncio.get_running_loop().time() > give_up_s:
                raise Unavailable(
                    f"stage {rank} of {spec.id} got no lease of {spec.model} in {within_s:.0f} s: {e}"
                ) from None
            log.info("waiting for a lease", model=spec.model, why=str(e) or type(e).__name__)
        await asyncio.sleep(_AGAIN_AFTER_S)
