"""Whether the machines that should be together are. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from shoal_cli.doctor.finding import Finding, join_names, or_ok
from shoal_common.config import is_loopback
from shoal_common.units import format_duration

CHECK = "members"


class MemberFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster's members, and what this node does to be reached by them."""

    node: str
    """This one."""
    members: Collection[str]
    """The nodes that were let in."""
    live: Collection[str]
    """The nodes of which a service is live."""
    lost_since_s: Mapping[str, float] = {}
    """By node that has been live: since when it is lost, by the cluster's clock; 0 while it is live."""
    now_s: float = 0.0
    bind: str = ""
    """The address that this node listens on; "" while it does not run."""
    runs_nats: bool = False


def check(facts: MemberFacts) -> list[Finding]:
    """Return which members are not live and since when, and whether this node keeps them out."""
    known = {*facts.members, *facts.lost_since_s}
    missing = sorted(known - {facts.node} - set(facts.live))
    wrong = [_missing(node, facts.lost_since_s.get(node, 0.0), facts.now_s) for node in missing]
    if missing and facts.runs_nats and facts.bind and is_loopback(facts.bind):
        what = (
            f"this node listens on {facts.bind} only, where {join_names(missing)} cannot reach it from other machines"
        )
        remedy = "`shoal down`, then `shoal up --bind 0.0.0.0`: it is kept"
        wrong.append(Finding(CHECK, "problem", what, remedy, f"node {facts.node}"))
    live = sorted(known & set(facts.live))
    return or_ok(CHECK, wrong, f"live: {join_names(live)}" if live else "this node is in no cluster of others")


def _missing(node: str, since_s: float, now_s: float) -> Finding:
    since = f", for {format_duration(max(0.0, now_s - since_s))}" if since_s else "; nothing says since when"
    remedy = (
        f"`shoal up` on {node}, or `shoal doctor` there if it runs; gone for good: `shoal node revoke {node}` on the "
        "cluster's first node"
    )
    return Finding(
        CHECK, "warning", f"node {node} belongs to this cluster and is not live{since}", remedy, f"node {node}"
    )
