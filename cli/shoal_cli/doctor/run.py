"""Runs all checks: facts gathered at the same time, each under a deadline, then judged.

this node's home ──► file systems, permissions, memory, units      at once
                 └─► NATS ──► fileservers, ports, open files       as soon as the liveness records are read
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from shoal_cli.doctor.checks import (
    clocks,
    disk,
    duplicate_ids,
    machine,
    models,
    nats,
    nodes,
    peers,
    permissions,
    ports,
    services,
    versions,
)
from shoal_cli.doctor.checks.nats import NatsFacts
from shoal_cli.doctor.checks.ports import ExpectedPort, PortListener
from shoal_cli.doctor.finding import Finding
from shoal_cli.doctor.probes import disk as disk_probe
from shoal_cli.doctor.probes import local_node, systemd_units
from shoal_cli.doctor.probes import machine as machine_probe
from shoal_cli.doctor.probes import nats as nats_probe
from shoal_cli.doctor.probes import peers as peers_probe
from shoal_cli.doctor.probes import permissions as permissions_probe
from shoal_cli.doctor.probes import ports as ports_probe
from shoal_cli.doctor.probes.local_node import LocalNode
from shoal_cli.doctor.probes.nats import ClusterProbe, LivenessSample
from shoal_cli.doctor.probes.tcp_connect import this_os
from shoal_cli.doctor.probes.timeouts import run_with_timeout
from shoal_cli.doctor.reachability import OsInfo
from shoal_cli.node_home import Home
from shoal_common import VERSION
from shoal_common.host.process_identity import host_id, this_process
from shoal_common.messages.liveness import LivenessRecord

T = TypeVar("T")

_LOCAL_DEADLINE_S = 5.0
_NATS_DEADLINE_S = 20.0
"""Its steps have deadlines of their own; this is more than all of them together."""
_PEERS_DEADLINE_S = 20.0

CHECKS: tuple[str, ...] = (
    services.CHECK,
    ports.CHECK,
    nats.NATS,
    nats.STREAMS,
    nats.NATS_STORE,
    clocks.CHECK,
    nodes.CHECK,
    peers.CHECK,
    peers.NODE_PORTS,
    duplicate_ids.CHECK,
    versions.CHECK,
    disk.DISK,
    disk.VOLUMES,
    models.CHECK,
    permissions.CHECK,
    machine.MEMORY,
    machine.LIMITS,
)
"""The checks, in the order in which they are printed."""


class DoctorReport(msgspec.Struct, frozen=True):
    """What was checked, and what was found."""

    home: str
    node: str
    findings: list[Finding]


class _ProbeFailed(Exception):
    """Facts that could not be gathered; the finding gives the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def run_checks(home: Home, environ: Mapping[str, str]) -> DoctorReport:
    """Check this node and its cluster. Raises for no finding, and returns within a minute, whatever hangs."""
    return asyncio.run(_run_checks(home, environ))


async def _run_checks(home: Home, environ: Mapping[str, str]) -> DoctorReport:
    try:
        local = await _gather_blocking(lambda: local_node.probe(home, environ))
    except _ProbeFailed as e:
        what = f"{home.root} cannot be read: {e.reason}"
        remedy = "is its disk mounted? Otherwise choose another --home"
        return DoctorReport(str(home.root), "", [Finding("home", "problem", what, remedy)])
    async with asyncio.TaskGroup() as tasks:
        system = tasks.create_task(_or_default(OsInfo(), _gather_blocking(this_os)))
        cluster = tasks.create_task(_cluster(local, home))
        checks = [
            tasks.create_task(_disk(local, cluster)),
            tasks.create_task(_check(permissions.CHECK, lambda: permissions_probe.probe(local), permissions.check)),
            tasks.create_task(_check(machine.MEMORY, lambda: machine_probe.memory(local), machine.check_memory)),
            tasks.create_task(_services(local, cluster)),
            tasks.create_task(_ports_and_files(local, cluster)),
            tasks.create_task(_nats(cluster, system)),
            tasks.create_task(_nodes(local, cluster)),
            tasks.create_task(_peers_and_clocks(local, cluster, system)),
            tasks.create_task(_ids_and_versions(local, cluster)),
        ]
    findings = [finding for task in checks for finding in task.result()]
    return DoctorReport(str(local.home), local.node, findings)


# Gathering


async def _gather(deadline_s: float, facts: Callable[[], Awaitable[T]]) -> T:
    """Return facts. Raises _ProbeFailed, so that one failed probe costs its own check only."""
    try:
        async with asyncio.timeout(deadline_s):
            return await facts()
    except TimeoutError:
        raise _ProbeFailed(f"no answer within {deadline_s:.0f} s") from None
    except Exception as e:  # whatever a machine in trouble does is reported with the other checks
        raise _ProbeFailed(f"{type(e).__name__}: {e}") from e


async def _gather_blocking(probe: Callable[[], T]) -> T:
    return await _gather(_LOCAL_DEADLINE_S, lambda: run_with_timeout(_LOCAL_DEADLINE_S, probe))


async def _or_default(default: T, facts: Awaitable[T]) -> T:
    try:
        return await facts
    except _ProbeFailed:
        return default


async def _check(check: str, probe: Callable[[], T], evaluate: Callable[[T], list[Finding]]) -> list[Finding]:
    try:
        return evaluate(await _gather_blocking(probe))
    except _ProbeFailed as e:
        return [_probe_failed(check, e)]


def _probe_failed(check: str, error: _ProbeFailed) -> Finding:
    remedy = "a disk or a network that does not answer causes this; try again, and see `shoal logs`"
    return Finding(check, "warning", f"could not be checked: {error.reason}", remedy)


async def _cluster(local: LocalNode, home: Home) -> ClusterProbe:
    expected = not local.runs_nats or local.supervisor in ("running", "unresponsive")
    try:
        return await _gather(
            _NATS_DEADLINE_S,
            lambda: nats_probe.probe(local.servers, local.identity, local.node, expected, home.run),
        )
    except _ProbeFailed as e:
        return ClusterProbe(facts=NatsFacts(expected=True, error=e.reason))


def _own_services(local: LocalNode, samples: Mapping[tuple[str, str], LivenessSample]) -> dict[str, LivenessRecord]:
    """Return this node's services as the cluster sees them."""
    return {service: s.live for (node, service), s in samples.items() if local.node and node == local.node}


def _own_pids(local: LocalNode, services_: Mapping[str, LivenessRecord]) -> dict[str, int]:
    """Return the pids of this node's processes on this machine."""
    supervised = {c.name: c.pid for c in local.status.children if c.pid} if local.status else {}
    host = host_id()
    return {name: live.holder.pid for name, live in services_.items() if live.holder.host == host} | supervised


# Judging, each as soon as it has its facts


async def _disk(local: LocalNode, cluster: asyncio.Task[ClusterProbe]) -> list[Finding]:
    try:
        facts = await _gather_blocking(lambda: disk_probe.probe(local))
    except _ProbeFailed as e:
        return [_probe_failed(disk.DISK, e), _probe_failed(models.CHECK, e)]
    seen = await cluster
    runs = "storage" in _own_services(local, seen.samples)
    state = seen.storage if runs else None
    return [
        *disk.check(msgspec.structs.replace(facts, state=state, storage_runs=runs)),
        *models.check(local.node, state),
    ]


async def _services(local: LocalNode, cluster: asyncio.Task[ClusterProbe]) -> list[Finding]:
    # The units are for the node in ~/.shoal only.
    asks_systemd = local.status is None and local.home == Path.home() / ".shoal"
    units = await _or_default([], _gather_blocking(lambda: systemd_units.probe(Path.home()))) if asks_systemd else []
    seen = await cluster
    # Services of another machine with this node's id are the concern of `node ids`.
    this = duplicate_ids.machine(this_process())
    own = _own_services(local, seen.samples).items()
    live = sorted(name for name, record in own if duplicate_ids.machine(record.holder) == this)
    return services.check(
        services.ServiceFacts(
            home=str(local.home),
            node=local.node,
            supervisor=local.supervisor,
            pid=local.pid,
            children=local.status.children if local.status else [],
            log_tails=local.log_tails,
            units=units,
            live=live if seen.facts.connected else None,
        )
    )


async def _ports_and_files(local: LocalNode, cluster: asyncio.Task[ClusterProbe]) -> list[Finding]:
    own = _own_services(local, (await cluster).samples)
    pids = _own_pids(local, own)

    def probe() -> tuple[list[ExpectedPort], list[PortListener], set[int]]:
        found = ports_probe.listeners(pids.values())
        own_pids = set(pids.values())
        if local.status is None and own:
            # NATS under systemd publishes no pid: it is the one that this node's services have found.
            own_pids |= {x.pid for x in found if "nats-server" in x.name}
        return ports_probe.expected(local, own, found), found, own_pids

    return [
        *await _check(ports.CHECK, probe, lambda facts: ports.check(*facts)),
        *await _check(machine.LIMITS, lambda: machine_probe.open_files(pids), machine.check_files),
    ]


async def _nats(cluster: asyncio.Task[ClusterProbe], system: asyncio.Task[OsInfo]) -> list[Finding]:
    return nats.check((await cluster).facts, await system)


async def _nodes(local: LocalNode, cluster: asyncio.Task[ClusterProbe]) -> list[Finding]:
    seen = await cluster
    if not seen.facts.connected or seen.clock is None:
        return [_skipped(nodes.CHECK, seen)]
    return nodes.check(
        nodes.NodesFacts(
            node=local.node,
            members=seen.certificates,
            live={node for node, _ in seen.samples},
            down_since_s=seen.down_since_s,
            lacking=seen.lacking,
            bind=local.status.bind if local.status else "",
            runs_nats=local.runs_nats,
        )
    )


async def _peers_and_clocks(
    local: LocalNode, cluster: asyncio.Task[ClusterProbe], system: asyncio.Task[OsInfo]
) -> list[Finding]:
    seen = await cluster
    if not seen.facts.connected or seen.clock is None:
        return [_skipped(check, seen) for check in (peers.CHECK, peers.NODE_PORTS, clocks.CHECK)]
    try:
        os_info = await system
        reached, offsets = await _gather(
            _PEERS_DEADLINE_S, lambda: peers_probe.probe(seen.samples, local, seen.certificates, os_info)
        )
    except _ProbeFailed as e:
        unreached = [_probe_failed(peers.CHECK, e), _probe_failed(peers.NODE_PORTS, e)]
        return [*unreached, _skipped(clocks.CHECK, seen)]
    try:
        open_ports = peers.check_ports(
            await _gather(
                _PEERS_DEADLINE_S,
                lambda: peers_probe.probe_ports(seen.samples, seen.stages, reached, local.node, os_info),
            ),
            os_info,
        )
    except _ProbeFailed as e:
        open_ports = [_probe_failed(peers.NODE_PORTS, e)]
    against_nats = clocks.against_nats(local.node or "here", seen.clock, offsets, started_ahead(seen.samples))
    found = peers.check(reached, local.node, os_info)
    return [*found, *open_ports, *clocks.check(against_nats)]


def started_ahead(samples: Mapping[tuple[str, str], LivenessSample]) -> dict[str, float]:
    """Return by how many seconds each node's latest service started after NATS received its record. Pure."""
    ahead: dict[str, float] = {}
    for (node, _), sample in samples.items():
        ahead[node] = max(ahead.get(node, 0.0), sample.live.started_at_s - sample.received_at_s)
    return ahead


def _skipped(check: str, cluster: ClusterProbe) -> Finding:
    reason = "JetStream does not answer" if cluster.facts.connected else "NATS cannot be reached"
    return Finding(check, "skipped", f"not checked: {reason}")


async def _ids_and_versions(local: LocalNode, cluster: asyncio.Task[ClusterProbe]) -> list[Finding]:
    seen = await cluster
    if not seen.facts.connected or seen.clock is None:
        return [_skipped(versions.CHECK, seen), _skipped(duplicate_ids.CHECK, seen)]
    by_service = {key: sample.live.version for key, sample in seen.samples.items()}
    holders = {key: sample.live.holder for key, sample in seen.samples.items()}
    running = local.supervisor in ("running", "unresponsive")
    return [
        *versions.check(by_service, VERSION),
        *duplicate_ids.check(holders, local.node, host_id(), running),
    ]
