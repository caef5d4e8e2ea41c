"""Nodes with one id on two machines. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from shoal_cli.doctor.finding import Finding, join_names, or_ok
from shoal_common.messages.liveness import ProcessIdentity

CHECK = "node ids"


def machine(holder: ProcessIdentity) -> str:
    """Return the machine and its boot; containers of one machine share it. "" for a holder that tells neither."""
    return "/".join(holder.host.split("/")[:2])


def check(holders: Mapping[tuple[str, str], ProcessIdentity], node: str, host: str, running: bool) -> list[Finding]:
    """Return which ids are on two machines.

    `holders`: by node and service; `host`: of a process of this machine; `running`: whether a supervisor of `node`
    runs here.
    """
    wrong = []
    own = machine(ProcessIdentity(uid="", host=host, pid=0))
    nodes = sorted({n for n, _ in holders})
    for name in nodes:
        machines = {machine(h) for (n, _), h in holders.items() if n == name}
        if name == node and running:
            machines.add(own)
        hosts = sorted({m.split("/")[0] for m in machines})
        if len(machines) > 1 and len(hosts) == 1:
            what = f"services of node {name} are from two boots of {hosts[0]}, or from two machines of that name"
            remedy = (
                "after a reboot this disappears within half a minute; if it stays, change `id` in node.toml on one "
                "of the two machines"
            )
            wrong.append(Finding(CHECK, "warning", what, remedy, f"node {name}"))
        elif len(machines) > 1:
            what = f"node id {name} is used on several machines: {join_names(hosts)}"
            remedy = (
                "change `id` in node.toml on all but one (a copied home keeps its id), then run `shoal down` and "
                "`shoal up` there"
            )
            wrong.append(Finding(CHECK, "problem", what, remedy, f"node {name}"))
    return or_ok(CHECK, wrong, f"{join_names(nodes)}: one machine each" if nodes else "no node is up")
