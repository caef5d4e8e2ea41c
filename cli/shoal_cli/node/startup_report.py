"""What `shoal up` reports: the node is up, or which of its children is not, and why.

With --detach the report comes through a pipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from shoal_cli.node.children.restart_policy import CLAIMED, OTHER_VERSION, ChildStatus, not_ready_reason
from shoal_cli.node.logs.log_rotation import tail
from shoal_cli.node_home import Home
from shoal_common.errors import AlreadyRunning, OtherVersion, ShoalError, Unavailable
from shoal_common.messages import WireStruct
from shoal_common.settings.ports import port_ranges

_TAIL_LINES = 6
_MAX_LINE_CHARS = 400


class NotReadyChild(WireStruct):
    """A child that is not ready, the reason, and the end of its log."""

    name: str
    reason: str
    log: str
    tail: list[str] = []
    claimed: bool = False
    other_version: bool = False


class StartupReport(WireStruct):
    """The outcome of starting a node."""

    node: str
    pid: int
    home: str
    nats: list[str]
    gateway: str
    logs: str
    ready: list[str]
    not_ready: list[NotReadyChild] = []
    can_invite: bool = False
    """Whether this node lets other machines in."""
    bind: str = ""
    """Empty on loopback."""
    ports: dict[str, list[int]] = {}
    """By who listens."""


def not_ready(home: Home, children: list[ChildStatus]) -> list[NotReadyChild]:
    """Return the children that are not ready, with the last lines of their logs."""
    return [
        NotReadyChild(
            name=c.name,
            reason=not_ready_reason(c),
            log=str(home.log(c.name)),
            claimed=c.last_exit_code == CLAIMED,
            other_version=c.last_exit_code == OTHER_VERSION,
            tail=[line[:_MAX_LINE_CHARS] for line in tail(home.log(c.name), _TAIL_LINES)],
        )
        for c in children
        if c.phase != "ready"
    ]


def startup_error(report: StartupReport) -> ShoalError:
    """Return the one-line error for a node with a child that is not ready."""
    kind: type[ShoalError] = AlreadyRunning if any(n.claimed for n in report.not_ready) else Unavailable
    if any(n.other_version for n in report.not_ready):
        kind = OtherVersion
    names = ", ".join(n.name for n in report.not_ready)
    return kind(
        f"node {report.node} is incomplete: {names} {'is' if len(report.not_ready) == 1 else 'are'} not ready; it "
        f"keeps trying (pid {report.pid}): see `shoal logs {report.not_ready[0].name}`, or stop it with `shoal down`"
    )


def ports_text(ports: Mapping[str, Sequence[int]]) -> str:
    """Return who listens on which ports."""
    names = {"nats": "NATS"}
    return ", ".join(f"{names.get(name, name)} {port_ranges(found) or 'any'}" for name, found in ports.items())


def print_report(report: StartupReport, out: Console, err: Console, detached: bool) -> None:
    """Print the report for a person."""
    for child in report.not_ready:
        err.print(Text(f"  {child.name} is not ready: {child.reason}", style="red"), soft_wrap=True)
        for line in child.tail:
            err.print(Text(f"    {line}", style="dim"), soft_wrap=True)
        err.print(Text(f"    more in {child.log}", style="dim"), soft_wrap=True)
    if report.not_ready:
        return
    rows = []
    if report.gateway:
        rows = [("page", f"{report.gateway}/"), ("API", f"{report.gateway}/v1")]
        rows.append(("key", "`shoal key` prints it; on Linux you need none on this machine"))
    rows += [("NATS", ", ".join(report.nats)), ("services", " ".join(report.ready)), ("logs", report.logs)]
    if report.ports:
        rows.append(("ports", ports_text(report.ports)))
    if report.bind:
        rows.append(("bound to", report.bind))
        ports = port_ranges(port for ports in report.ports.values() for port in ports)
        rows.append(("firewall", f"let the other machines reach TCP {ports} here"))
    out.print(Text.assemble(("  node ", ""), (report.node, "bold cyan"), (f" is up, pid {report.pid}", "")))
    for name, value in rows:
        out.print(Text.assemble((f"  {name:9} ", "dim"), value), soft_wrap=True)
    if report.can_invite:
        out.print(Text("  to add a machine: `shoal invite` here, `shoal join` there", style="dim"))
    out.print(Text("  stop it with `shoal down`" if detached else "  Ctrl-C stops it", style="dim"))
