"""Whether the machines that should be together are, and what cannot run without one that is gone. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from shoal_cli.doctor.finding import Finding, Level, join_names, or_ok
from shoal_common.config import is_loopback
from shoal_common.liveness.down_text import down_text

CHECK = "nodes"


class NodesFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster's nodes, and what this one does to be reached by them."""

    node: str
    """This one."""
    members: Collection[str] = ()
    """The nodes that were let in."""
    live: Collection[str] = ()
    """The nodes of which a service is live."""
    down_since_s: Mapping[str, float] = {}
    """By node that is down: since when, by the cluster's clock, as placement's leader has published."""
    lacking: Mapping[str, str] = {}
    """By instance that cannot answer, the reason."""
    bind: str = ""
    """The address that this node listens on; "" while it does not run."""
    runs_nats: bool = False


def check(facts: NodesFacts) -> list[Finding]:
    """Return which nodes are down and since when, which instances lack one, and whether this node keeps them out."""
    up = set(facts.live) - facts.down_since_s.keys()
    missing = sorted({*facts.members, *facts.down_since_s} - {facts.node} - up)
    wrong = [_missing(node, facts) for node in missing]
    for instance, reason in sorted(facts.lacking.items()):
        remedy = f"`shoal rebalance {instance}` moves it to nodes that are up; `shoal stop {instance}` ends it"
        wrong.append(Finding(CHECK, "problem", f"instance {instance} cannot answer: {reason}", remedy, instance))
    if missing and facts.runs_nats and facts.bind and is_loopback(facts.bind):
        what = (
            f"this node listens on {facts.bind} only, where {join_names(missing)} cannot reach it from other machines"
        )
        remedy = "`shoal down`, then `shoal up --bind 0.0.0.0`: it is kept"
        wrong.append(Finding(CHECK, "problem", what, remedy, f"node {facts.node}"))
    return or_ok(CHECK, wrong, f"up: {join_names(sorted(up)) if up else 'none'}")


def _missing(node: str, facts: NodesFacts) -> Finding:
    # A machine that nobody misses may be switched off.
    level: Level = "problem" if any(f"node {node} " in reason for reason in facts.lacking.values()) else "warning"
    remedy = f"`shoal up` there, or `shoal doctor` if it runs; gone for good: `shoal node forget {node}`"
    if node in facts.members:
        remedy += f", and `shoal node revoke {node}` on the cluster's first node"
    return Finding(CHECK, level, down_text(node, facts.down_since_s.get(node, 0.0)), remedy, f"node {node}")
