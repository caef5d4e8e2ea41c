"""The ports that this node's services listen on: held by us, free, or taken. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, or_ok

CHECK = "ports"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A port that one of our services listens on, or would."""

    service: str
    host: str
    port: int
    """0: any free one."""
    running: bool
    """Whether that service runs now, so that it has to listen."""
    bind_problem: str = ""
    """Why nothing could listen there now, in the system's words."""


class Listener(msgspec.Struct, frozen=True):
    """Who listens on a port of this machine."""

    port: int
    pid: int = 0
    """0: the system does not say; a process of another user most often."""
    name: str = ""


_OPTIONS = {
    "nats": "stop that program, or start with --nats-port N (0 takes a free one)",
    "gateway": "stop that program, or start with --port N (SHOAL_GATEWAY_PORT; 0 takes a free one)",
    "fileserver": "stop that program, or set SHOAL_FILESERVER_PORT to another port",
}


def judge(wanted: Sequence[Wanted], listeners: Sequence[Listener], ours: Collection[int]) -> list[Finding]:
    """What is wrong with them. `ours`: the pids of our services."""
    wrong: list[Finding] = []
    good: list[str] = []
    for want in wanted:
        holders = [x for x in listeners if want.port and x.port == want.port]
        mine = [x for x in holders if x.pid in ours]
        if want.running and (mine or (holders and not all(x.pid for x in holders))):
            # Whoever runs, and whose port is held by somebody the system does not name, is that somebody.
            good.append(f"{want.service} {want.port}")
        elif want.running and not holders:
            what = (
                f"{want.service} runs, and does not listen on port {want.port}"
                if want.port
                else (f"{want.service} runs, and listens on no port")
            )
            remedy = f"`shoal restart {want.service}`; `shoal logs {want.service}` says what it waits for"
            wrong.append(Finding(CHECK, "problem", what, remedy, f"port {want.port}"))
        elif holders and (want.running or want.bind_problem):
            wrong.append(_taken(want, holders[0]))
        elif want.bind_problem:
            what = f"{want.service} could not listen on {want.host} port {want.port}: {want.bind_problem}"
            remedy = f"is {want.host} an address of this machine, and the port beyond 1023? {_OPTIONS[want.service]}"
            wrong.append(Finding(CHECK, "problem", what, remedy, f"port {want.port}"))
        else:
            good.append(f"{want.service} {want.port} (free)")
    return or_ok(CHECK, wrong, ", ".join(good) or "no service here listens on a fixed port")


def _taken(want: Wanted, holder: Listener) -> Finding:
    who = f"{holder.name or 'a program'}, pid {holder.pid}" if holder.pid else "a program of another user"
    remedy = _OPTIONS[want.service]
    if want.service == "nats" and "nats-server" in holder.name:
        remedy = f"join that server with `shoal up --nats nats://{want.host}:{want.port}`, or {remedy}"
    what = f"port {want.port}, which {want.service} needs, is taken by {who}"
    return Finding(CHECK, "problem", what, remedy, f"port {want.port}")
