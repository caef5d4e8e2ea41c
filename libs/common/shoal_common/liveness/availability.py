"""Whether a service is live, and the error for a command that nobody was there to run."""

from __future__ import annotations

from shoal_common.bus.keys import liveness_key, node_key, storage_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.bus.subjects import ANY
from shoal_common.errors import NodeDown
from shoal_common.liveness.down_text import down_text
from shoal_common.messages.placement import NodeState


async def is_live(buckets: Buckets, service: str, node: str) -> bool:
    """Return whether this service has a key in `live`, on this node or on `any`. Raises Unavailable."""
    if node != ANY:
        return await buckets.live.get(liveness_key(node, service)) is not None
    for key in await buckets.live.keys(f"*.{service}"):
        if await buckets.live.get(key) is not None:  # the marker of an expired key is listed too
            return True
    return False


async def node_down_error(buckets: Buckets, service: str, node: str, verb: str) -> NodeDown:
    """Return the error for a command (`delete`, say) whose service is not live. Raises Unavailable."""
    if node == ANY:
        return NodeDown(f"{verb} was not run: no node runs {service}; start one with `shoal up`")
    state = await buckets.state.get_as(node_key(node), NodeState)
    if state is not None:
        return NodeDown(
            f"{_not_done(verb, node)}: {down_text(node, state.down_since_s)}; bring it back with `shoal up` there "
            "and send it again",
            node=node,
            down_since_s=state.down_since_s,
        )
    if await buckets.state.get(storage_key(node)) is None:
        return NodeDown(f"{_not_done(verb, node)}: there is no such node; see `shoal status`", node=node)
    return NodeDown(
        f"{_not_done(verb, node)}: its {service} is not live; see `shoal status`, or start it there with `shoal up`, "
        "and send it again",
        node=node,
    )


def _not_done(what: str, node: str) -> str:
    return f"{what} on node {node} was not run, unless it had started"
