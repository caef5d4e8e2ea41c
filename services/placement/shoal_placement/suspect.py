"""Which services count as away although their liveness keys are there, and which as present although not. Pure.

A key expires 20 s after its holder's last beat. Sooner than that somebody may see a connection to the node break:
then the node is asked, and what does not answer is away until it does. Later than that it may be NATS that was away,
and not the node: for a while after an outage what was well counts as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from shoal_common.messages.records import InstanceState

ANSWERING = ("storage", "fetcher", "placement", "inference")
"""Services that answer when asked whether they are there. Of the others of a node, these speak together."""


def to_ask(node: str, live: Iterable[str]) -> list[str]:
    """Which services of a node to ask, by the keys of `live`."""
    mine = {key.partition(".")[2] for key in live if key.partition(".")[0] == node}
    return [service for service in ANSWERING if service in mine]


def silent_keys(node: str, live: Iterable[str], answered: Mapping[str, bool]) -> set[str]:
    """The keys of a node that count as away, by which of those that were asked have answered."""
    if not answered:
        return set()
    mine = {key for key in live if key.partition(".")[0] == node}
    if not any(answered.values()):
        return mine
    return mine & {f"{node}.{service}" for service, spoke in answered.items() if not spoke}


def present(live: Set[str], silent: Set[str], told: InstanceState | None, settled: bool) -> set[str]:
    """The nodes that count as present for an instance, of which this was said last.

    `live` and `silent`: those with a live inference service, and those whose one does not answer.
    """
    well = told is not None and told.phase == "ready" and not settled
    return (set(live) | set(told.nodes if told is not None and well else [])) - silent
