"""What `shoal up` says: the node is up, or which part of it is not, and why.

It also crosses the pipe of --detach.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from shoal_cli.home import Home
from shoal_cli.node.decide import CLAIMED, OTHER_VERSION, ChildStatus, why_not_up
from shoal_cli.node.rotate import tail
from shoal_common.errors import Claimed, OtherVersion, ShoalError, Unavailable
from shoal_common.messages import Message

_TAIL_LINES = 6
_TOO_LONG = 400


class NotUp(Message):
    """A child that is not ready, why, and the end of its log."""

    name: str
    why: str
    log: str
    tail: list[str] = []
    claimed: bool = False
    other_version: bool = False


class UpReport(Message):
    """How starting a node ended."""

    node: str
    pid: int
    home: str
    nats: list[str]
    gateway: str
    logs: str
    ready: list[str]
    not_up: list[NotUp] = []
    join: str = ""
    """The command for other machines; it holds the secret."""
    bind: str = ""


def missing(home: Home, children: list[ChildStatus]) -> list[NotUp]:
    """Those that are not ready, with the last lines of their logs."""
    return [
        NotUp(
            name=c.name,
            why=why_not_up(c),
            log=str(home.log(c.name)),
            claimed=c.last_code == CLAIMED,
            other_version=c.last_code == OTHER_VERSION,
            tail=[line[:_TOO_LONG] for line in tail(home.log(c.name), _TAIL_LINES)],
        )
        for c in children
        if c.phase != "ready"
    ]


def not_up_error(report: UpReport) -> ShoalError:
    """The one-line error for a node of which some part is not ready."""
    kind: type[ShoalError] = Claimed if any(n.claimed for n in report.not_up) else Unavailable
    if any(n.other_version for n in report.not_up):
        kind = OtherVersion
    names = ", ".join(n.name for n in report.not_up)
    return kind(
        f"node {report.node} is not whole: {names} {'is' if len(report.not_up) == 1 else 'are'} not ready; it keeps "
        f"trying (pid {report.pid}): see `shoal logs {report.not_up[0].name}`, or stop it with `shoal down`"
    )


def show(report: UpReport, out: Console, err: Console, detached: bool) -> None:
    """Tell a person."""
    for part in report.not_up:
        err.print(Text(f"  {part.name} is not up: {part.why}", style="red"), soft_wrap=True)
        for line in part.tail:
            err.print(Text(f"    {line}", style="dim"), soft_wrap=True)
        err.print(Text(f"    more in {part.log}", style="dim"), soft_wrap=True)
    if report.not_up:
        return
    rows = [("gateway", report.gateway or "not on this node"), ("NATS", ", ".join(report.nats))]
    rows += [("services", " ".join(report.ready)), ("logs", report.logs)]
    if report.bind:
        rows.append(("bound to", f"{report.bind} (peers need the secret in {report.home}/secret)"))
    out.print(Text.assemble(("  node ", ""), (report.node, "bold cyan"), (f" is up, pid {report.pid}", "")))
    for name, value in rows:
        out.print(Text.assemble((f"  {name:9} ", "dim"), value), soft_wrap=True)
    if report.join:
        out.print(Text("  other machines join with", style="dim"))
        out.print(Text(f"    {report.join}"), soft_wrap=True)
    out.print(Text("  stop it with `shoal down`" if detached else "  Ctrl-C stops it", style="dim"))
