"""Lease a stage's model from this node's storage before its process reads it; release it after the process ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.errors import Error as NatsError

from shoal_common.errors import ShoalError, Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages.envelope import Empty
from shoal_common.messages.leases import AcquireLease, LeaseGrant, ReleaseLease
from shoal_common.rpc.request_reply import RpcClient
from shoal_inference.assignments import Assignment

log = StructuredLogger("lease")

LEASE_TIMEOUT_S = 60.0
"""Longer than a supervisor takes to restart storage."""
_ANSWER_TIMEOUT_S = 10.0
_RETRY_INTERVAL_S = 0.5
_RELEASE_TIMEOUT_S = 1.0


@asynccontextmanager
async def lease_model(
    rpc: RpcClient, node: str, assignment: Assignment, timeout_s: float = LEASE_TIMEOUT_S
) -> AsyncIterator[LeaseGrant]:
    """Hold a lease of a stage's model while the body runs.

    Raises what storage answers, or Unavailable when there is no lease after `within_s`.
    """
    lease = await _acquire(rpc, node, assignment, timeout_s)
    try:
        yield lease
    finally:
        # Storage notices the end of the process by itself; releasing only makes it immediate.
        try:
            await rpc(
                "storage", node, "release_lease", ReleaseLease(id=lease.id), Empty, deadline_s=_RELEASE_TIMEOUT_S
            )
        except (ShoalError, NatsError) as e:
            log.debug("lease not released; it expires by itself", lease=lease.id, reason=str(e) or type(e).__name__)


async def _acquire(rpc: RpcClient, node: str, assignment: Assignment, within_s: float) -> LeaseGrant:
    spec, rank = assignment.spec, assignment.stage.rank
    request = AcquireLease(
        model=spec.model,
        holder=f"stage {rank} of instance {spec.id}",
        instance=spec.id,
        layers=[assignment.stage.first_layer, assignment.stage.last_layer],
    )
    deadline_s = asyncio.get_running_loop().time() + within_s
    is_logged = False
    while True:
        try:
            return await rpc("storage", node, "lease", request, LeaseGrant, deadline_s=_ANSWER_TIMEOUT_S)
        except (ShoalError, NatsError) as e:
            if isinstance(e, ShoalError) and not e.retryable:
                raise
            if asyncio.get_running_loop().time() > deadline_s:
                raise Unavailable(
                    f"stage {rank} of {spec.id} got no lease of {spec.model} within {within_s:.0f} s: {e}; "
                    "it is tried again"
                ) from None
            if not is_logged:
                is_logged = True
                log.info(
                    "waiting for a model lease",
                    instance=spec.id,
                    rank=rank,
                    model=spec.model,
                    reason=str(e) or type(e).__name__,
                )
        await asyncio.sleep(_RETRY_INTERVAL_S)
