"""Nodes with one id on two machines. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from shoal_cli.doctor.finding import Finding, listed, or_ok
from shoal_common.messages.facts import Holder

CHECK = "node ids"


def machine(holder: Holder) -> str:
    """The machine and its boot; containers on one machine are on one machine. "" for what tells neither."""
    return "/".join(holder.host.split("/")[:2])


def judge(holders: Mapping[tuple[str, str], Holder], node: str, here: str, running: bool) -> list[Finding]:
    """Which ids are on two machines. `holders`: by node and service; `here`: `host` of a process of this machine;
    `running`: whether a supervisor of `node` runs here.
    """
    wrong = []
    mine = machine(Holder(uid="", host=here, pid=0))
    nodes = sorted({n for n, _ in holders})
    for name in nodes:
        where = {machine(h) for (n, _), h in holders.items() if n == name}
        if name == node and running:
            where.add(mine)
        hosts = sorted({w.split("/")[0] for w in where})
        if len(where) > 1 and len(hosts) == 1:
            what = f"services of node {name} are of two boots of {hosts[0]}, or of two machines with that name"
            remedy = (
                "after a restart of the machine this is gone within half a minute; if it stays, one of two machines "
                "needs another `id` in node.toml"
            )
            wrong.append(Finding(CHECK, "warning", what, remedy, f"node {name}"))
        elif len(where) > 1:
            what = f"node id {name} is used on several machines: {listed(hosts)}"
            remedy = (
                "give one of them another `id` in node.toml (a home that was copied keeps its id), then `shoal down` "
                "and `shoal up` there"
            )
            wrong.append(Finding(CHECK, "problem", what, remedy, f"node {name}"))
    return or_ok(CHECK, wrong, f"{listed(nodes)}: one machine each" if nodes else "no node is live")
