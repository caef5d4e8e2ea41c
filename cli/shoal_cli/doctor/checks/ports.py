"""The ports of this node's services: held by them, free, or taken. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, or_ok

CHECK = "ports"


class ExpectedPort(msgspec.Struct, frozen=True, kw_only=True):
    """A port that one of the node's services listens on, or would."""

    service: str
    host: str
    port: int
    """0: any."""
    running: bool
    """Whether the service runs now, so that it must listen."""
    bind_problem: str = ""
    """The system's reason why nothing could listen there now."""


class PortListener(msgspec.Struct, frozen=True):
    """Who listens on a port of this machine."""

    port: int
    pid: int = 0
    """0: the system does not tell; usually a process of another user."""
    name: str = ""


_OPTIONS = {
    "nats": "stop that program, or start with --nats-port N (0: any)",
    "gateway": "stop that program, or start with --port N (SHOAL_GATEWAY_PORT; 0: any)",
    "fileserver": "stop that program, or set SHOAL_FILESERVER_PORT to another port",
}


def check(
    expected: Sequence[ExpectedPort], listeners: Sequence[PortListener], own_pids: Collection[int]
) -> list[Finding]:
    """Return what is wrong with them. `own_pids`: of the node's services."""
    wrong: list[Finding] = []
    good: list[str] = []
    for want in expected:
        holders = [x for x in listeners if want.port and x.port == want.port]
        own = [x for x in holders if x.pid in own_pids]
        if want.running and (own or (holders and not all(x.pid for x in holders))):
            # A running service whose port has an unnamed holder is that holder.
            good.append(f"{want.service} {want.port}")
        elif want.running and not holders:
            where = f"does not listen on port {want.port}" if want.port else "listens on no port"
            what = f"{want.service} is running but {where}"
            remedy = f"`shoal restart {want.service}`; `shoal logs {want.service}` says what it waits for"
            wrong.append(Finding(CHECK, "problem", what, remedy, f"port {want.port}"))
        elif holders and (want.running or want.bind_problem):
            wrong.append(_taken(want, holders[0]))
        elif want.bind_problem:
            what = f"{want.service} could not listen on {want.host} port {want.port}: {want.bind_problem}"
            remedy = f"is {want.host} an address of this machine, and the port above 1023? {_OPTIONS[want.service]}"
            wrong.append(Finding(CHECK, "problem", what, remedy, f"port {want.port}"))
        else:
            good.append(f"{want.service} {want.port} (free)")
    return or_ok(CHECK, wrong, ", ".join(good) or "no service here has a fixed port")


def _taken(want: ExpectedPort, holder: PortListener) -> Finding:
    program = f"{holder.name or 'a program'}, pid {holder.pid}" if holder.pid else "a program of another user"
    remedy = _OPTIONS[want.service]
    if want.service == "nats" and "nats-server" in holder.name:
        remedy = f"join that server with `shoal up --nats nats://{want.host}:{want.port}`, or {remedy}"
    what = f"port {want.port}, which {want.service} needs, is taken by {program}"
    return Finding(CHECK, "problem", what, remedy, f"port {want.port}")
