"""Who listens on this machine, and on which ports this node's services should."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec
import psutil

from shoal_cli.doctor.checks.ports import ExpectedPort, PortListener
from shoal_cli.doctor.probes.local_node import LocalNode
from shoal_cli.node.node_plan import LOOPBACK
from shoal_cli.node.ports import bind_problem
from shoal_common.config import NATS_PORT
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.settings.node import NodeSettings, PortSettings
from shoal_common.settings.ports import fileserver_ports
from shoal_common.settings.values import read_valid_settings

_SERVICES = ("nats", "gateway", "fileserver")


def listeners(own_pids: Collection[int]) -> list[PortListener]:
    """Return who listens for TCP; where the system shows only a user's own processes, those. Blocks."""
    try:
        found = [(c.laddr.port, c.pid or 0) for c in psutil.net_connections("tcp") if c.laddr and _listens(c.status)]
    except psutil.AccessDenied:
        found = [pair for pid in own_pids for pair in _ports_of(pid)]
    return [PortListener(port, pid, _name(pid)) for port, pid in sorted(set(found))]


def _ports_of(pid: int) -> list[tuple[int, int]]:
    with suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp")
        return [(c.laddr.port, pid) for c in connections if c.laddr and _listens(c.status)]
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


def expected(
    local: LocalNode, live: Mapping[str, LivenessRecord], found: Collection[PortListener]
) -> list[ExpectedPort]:
    """Return the ports of this node's services. `live`: its services as the cluster sees them. Blocks briefly."""
    status = local.status
    pids = {c.name: c.pid for c in status.children} if status else {}
    running = {c.name for c in status.children if c.phase == "ready"} if status else set(live)
    known = {c.name for c in status.children} if status else set(_SERVICES)
    settings, _ = read_valid_settings(PortSettings, local.settings, local.environ)
    ports = []
    if local.runs_nats and (status is None or "nats" in known):
        url = urlsplit(local.servers[0]) if local.servers else urlsplit("")
        host, port = url.hostname or LOOPBACK, url.port or NATS_PORT
        # Without a supervisor of `shoal up` NATS is systemd's or another's, and running services have found it.
        ports.append(_expected("nats", host, port, "nats" in running or (status is None and bool(live))))
    if "gateway" in known:
        url = urlsplit(status.gateway if status else "")
        port = url.port or settings.gateway_port
        ports.append(_expected("gateway", url.hostname or _bind_address(local), port, "gateway" in running))
    if "fileserver" in known:
        port = fileserver_ports(settings, local.settings)[0]
        if "fileserver" in running:
            port = _published_port(live.get("fileserver")) or _port_of(pids.get("fileserver", 0), found) or port
        # One that was not set may be taken: the fileserver finds another.
        if settings.fileserver_port or "fileserver" in running:
            ports.append(_expected("fileserver", _bind_address(local), port, "fileserver" in running))
    return ports


def _expected(service: str, host: str, port: int, running: bool) -> ExpectedPort:
    want = ExpectedPort(service=service, host=host, port=port, running=running)
    return want if running else msgspec.structs.replace(want, bind_problem=bind_problem(host, port) or "")


def _bind_address(local: LocalNode) -> str:
    settings, _ = read_valid_settings(NodeSettings, local.settings, local.environ)
    return (local.status.bind if local.status else "") or settings.bind or LOOPBACK


def _published_port(live: LivenessRecord | None) -> int:
    addresses = live.facts.addresses if live else []
    port = addresses[0].rpartition(":")[2] if addresses else ""
    return int(port) if port.isdecimal() else 0


def _port_of(pid: int, found: Collection[PortListener]) -> int:
    return next((x.port for x in found if pid and x.pid == pid), 0)
