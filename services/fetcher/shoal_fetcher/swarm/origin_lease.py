"""The lease of a blob's origin, which reads it for all nodes.

A node that serves nobody reads for itself, without the lease: others would wait for bytes that they cannot have.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from shoal_common.bus.cluster_lease import acquire, hold
from shoal_common.bus.keys import origin_key
from shoal_fetcher.swarm.context import NodeFetchContext


class OriginLease(Protocol):
    """The right to read a blob from the hub."""

    @property
    def is_held(self) -> bool:
        """Whether this node may still read."""

    async def wait_lost(self) -> None:
        """Return once it may not."""


class _ReadingForItself:
    is_held = True

    async def wait_lost(self) -> None:
        await asyncio.Event().wait()


async def acquire_origin(context: NodeFetchContext, blob: str) -> AbstractAsyncContextManager[OriginLease] | None:
    """Return the lease, to hold while reading; None if another node has it."""
    if not context.serves_peers:
        return nullcontext(_ReadingForItself())
    lease = await acquire(context.buckets.lease, origin_key(blob), context.node, context.uid)
    return None if lease is None else hold(lease)
