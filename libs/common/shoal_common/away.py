"""Whether a service is live, and the words for one that is not, as whoever sent it something has to know."""

from __future__ import annotations

from datetime import UTC, datetime

from shoal_common.buckets import Buckets, live_key, node_key, storage_key
from shoal_common.errors import NodeAway
from shoal_common.messages.records import NodeState
from shoal_common.subjects import ANY


async def is_live(buckets: Buckets, service: str, node: str) -> bool:
    """Whether this service of a node, or of `any` node, has its key in `live`. Raises Unavailable."""
    if node != ANY:
        return await buckets.live.get(live_key(node, service)) is not None
    for key in await buckets.live.keys(f"*.{service}"):
        if await buckets.live.get(key) is not None:  # what a key leaves when it expires is listed too
            return True
    return False


async def node_away(buckets: Buckets, service: str, node: str, what: str) -> NodeAway:
    """The error for `what` (`delete`, say), which nobody was there for. Raises Unavailable."""
    if node == ANY:
        return NodeAway(f"{what} was not carried out: {service} is live on no node; start one with `shoal up`")
    told = await buckets.state.get_as(node_key(node), NodeState)
    if told is not None:
        since = datetime.fromtimestamp(told.silent_since_s, UTC).isoformat(timespec="seconds")
        return NodeAway(
            f"{_not_done(what, node)}: the node is away, silent since {since}; bring it back with `shoal up` there "
            "and send it again",
            node=node,
            silent_since_s=told.silent_since_s,
        )
    if await buckets.state.get(storage_key(node)) is None:
        return NodeAway(f"{_not_done(what, node)}: no node of this name is known; see `shoal status`", node=node)
    return NodeAway(
        f"{_not_done(what, node)}: its {service} is not live; see `shoal status`, or start it there with `shoal up`, "
        "and send it again",
        node=node,
    )


def _not_done(what: str, node: str) -> str:
    return f"{what} on node {node} was not carried out, unless it had begun"
