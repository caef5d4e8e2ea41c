"""Who listens on this machine, and on which ports our services should."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec
import psutil

from shoal_cli.doctor.look.here import Here
from shoal_cli.doctor.ports import Listener, Wanted
from shoal_cli.node.plan import GATEWAY_PORT, LOOPBACK, NATS_PORT
from shoal_cli.node.ports import bind_problem
from shoal_common.messages.facts import Live


def listeners(ours: Collection[int]) -> list[Listener]:
    """Who listens for TCP. Where the system shows only our own processes', those. Blocks."""
    try:
        found = [(c.laddr.port, c.pid or 0) for c in psutil.net_connections("tcp") if c.laddr and _listens(c.status)]
    except psutil.AccessDenied:
        found = [pair for pid in ours for pair in _of(pid)]
    return [Listener(port, pid, _name(pid)) for port, pid in sorted(set(found))]


def _of(pid: int) -> list[tuple[int, int]]:
    with suppress(psutil.Error):
        of_it = psutil.Process(pid).net_connections("tcp")
        return [(c.laddr.port, pid) for c in of_it if c.laddr and _listens(c.status)]
    return []


def _listens(status: str) -> bool:
    return bool(status == psutil.CONN_LISTEN)


def _name(pid: int) -> str:
    if not pid:
        return ""
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return ""


def wanted(here: Here, live: Mapping[str, Live], found: Collection[Listener]) -> list[Wanted]:
    """The ports of this node's services; `live`: its services as the cluster sees them. Blocks for microseconds."""
    status = here.status
    pids = {c.name: c.pid for c in status.children} if status else {}
    runs = {c.name for c in status.children if c.phase == "ready"} if status else set(live)
    known = {c.name for c in status.children} if status else set(_SERVICES)
    out = []
    if here.runs_nats and (status is None or "nats" in known):
        own = urlsplit(here.servers[0]) if here.servers else urlsplit("")
        host, port = own.hostname or LOOPBACK, own.port or NATS_PORT
        # Without a supervisor of ours NATS is systemd's or somebody's, and services that run have found it.
        out.append(_wanted("nats", host, port, "nats" in runs or (status is None and bool(live))))
    if "gateway" in known:
        own = urlsplit(status.gateway if status else "")
        stated = here.environ.get("SHOAL_GATEWAY_PORT", "")
        port = own.port or (int(stated) if stated.isdecimal() else GATEWAY_PORT)
        out.append(_wanted("gateway", own.hostname or _bound(here), port, "gateway" in runs))
    if "fileserver" in known:
        stated = here.environ.get("SHOAL_FILESERVER_PORT", "")
        port = int(stated) if stated.isdecimal() else 0
        if "fileserver" in runs:
            port = _told(live.get("fileserver")) or _listened(pids.get("fileserver", 0), found) or port
        if port or "fileserver" in runs:
            out.append(_wanted("fileserver", _bound(here), port, "fileserver" in runs))
    return out


_SERVICES = ("nats", "gateway", "fileserver")


def _wanted(service: str, host: str, port: int, running: bool) -> Wanted:
    want = Wanted(service=service, host=host, port=port, running=running)
    return want if running else msgspec.structs.replace(want, bind_problem=bind_problem(host, port) or "")


def _bound(here: Here) -> str:
    return here.environ.get("SHOAL_BIND") or LOOPBACK


def _told(live: Live | None) -> int:
    addresses = live.facts.addresses if live else []
    port = addresses[0].rpartition(":")[2] if addresses else ""
    return int(port) if port.isdecimal() else 0


def _listened(pid: int, found: Collection[Listener]) -> int:
    return next((x.port for x in found if pid and x.pid == pid), 0)
