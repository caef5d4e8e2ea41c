"""Which services count as down although their liveness keys exist, and which as present although they do not. Pure.

A key expires 20 s after its holder's last renewal. A connection to the node may break sooner: then the node is asked,
and a service that does not answer counts as down until it does. A missing key may also mean that NATS was down and
not the node: for a while after an outage an instance that was ready stays ready.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from shoal_common.messages.instances import InstanceState

PINGED_SERVICES = ("storage", "fetcher", "placement", "inference")
"""Services that answer a ping. If none of them answers, the other services of the node count as down too."""


def services_to_ping(node: str, live: Iterable[str]) -> list[str]:
    """Return which services of a node to ping, by the keys of `live`."""
    services = {key.partition(".")[2] for key in live if key.partition(".")[0] == node}
    return [service for service in PINGED_SERVICES if service in services]


def unresponsive_keys(node: str, live: Iterable[str], answered: Mapping[str, bool]) -> set[str]:
    """Return the keys of a node that count as down. `answered`: of the services that were pinged, which answered."""
    if not answered:
        return set()
    keys = {key for key in live if key.partition(".")[0] == node}
    if not any(answered.values()):
        return keys
    return keys & {f"{node}.{service}" for service, has_answered in answered.items() if not has_answered}


def nodes_present(live: Set[str], unresponsive: Set[str], published: InstanceState | None, settled: bool) -> set[str]:
    """Return the nodes that count as present for an instance whose last published state is `published`.

    `live`: nodes with a live inference service; `unresponsive`: nodes whose inference service does not answer;
    `settled`: no outage of NATS has ended lately.
    """
    keep_published = published is not None and published.phase == "ready" and not settled
    return (set(live) | set(published.nodes if published is not None and keep_published else [])) - unresponsive
