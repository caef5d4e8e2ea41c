"""The examination: facts gathered all at the same time, each under a deadline, then judged.

this node's home ──► file systems, permissions, memory, units      at once
                 └─► NATS ──► fileservers, ports, open files       as soon as `live` is known
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from shoal_cli.doctor import clocks, disk, identities, machine, nats, peers, permissions, ports, services, versions
from shoal_cli.doctor.finding import Finding
from shoal_cli.doctor.look import disk as look_disk
from shoal_cli.doctor.look import here as look_here
from shoal_cli.doctor.look import machine as look_machine
from shoal_cli.doctor.look import nats as look_nats
from shoal_cli.doctor.look import peers as look_peers
from shoal_cli.doctor.look import permissions as look_permissions
from shoal_cli.doctor.look import ports as look_ports
from shoal_cli.doctor.look import units as look_units
from shoal_cli.doctor.look.dialling import this_system
from shoal_cli.doctor.look.here import Here
from shoal_cli.doctor.look.nats import Beat, Cluster
from shoal_cli.doctor.look.waiting import within
from shoal_cli.doctor.nats import NatsFacts
from shoal_cli.doctor.ports import Listener, Wanted
from shoal_cli.doctor.reaching import System
from shoal_cli.home import Home
from shoal_common import VERSION
from shoal_common.identity import this_host, this_process
from shoal_common.messages.facts import Live

T = TypeVar("T")

_LOCAL_S = 5.0
_NATS_S = 20.0
"""Its steps have deadlines of their own; this is beyond all of them together."""
_PEERS_S = 20.0


class Report(msgspec.Struct, frozen=True):
    """What was examined, and what was found."""

    home: str
    node: str
    findings: list[Finding]


class _Unseen(Exception):
    """Facts that could not be gathered: the finding says why."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


def examine(home: Home, environ: Mapping[str, str]) -> Report:
    """Look at this node and its cluster. Never raises for what it finds; ends within a minute, whatever hangs."""
    return asyncio.run(_examine(home, environ))


async def _examine(home: Home, environ: Mapping[str, str]) -> Report:
    try:
        here = await _gather(_LOCAL_S, lambda: within(_LOCAL_S, lambda: look_here.look(home, environ)))
    except _Unseen as e:
        remedy = "is the disk that holds it there? Give another with --home"
        return Report(
            str(home.root), "", [Finding("home", "problem", f"{home.root} cannot be read: {e.why}", remedy)]
        )
    async with asyncio.TaskGroup() as tasks:
        system = tasks.create_task(_or(System(), _local(this_system)))
        cluster = tasks.create_task(_cluster(here, home))
        local = [
            tasks.create_task(_disk(here, cluster)),
            tasks.create_task(_judged(permissions.CHECK, lambda: look_permissions.look(here), permissions.judge)),
            tasks.create_task(_judged(machine.MEMORY, lambda: look_machine.memory(here), machine.judge_memory)),
            tasks.create_task(_services(here, cluster)),
            tasks.create_task(_ports_and_files(here, cluster)),
            tasks.create_task(_nats(cluster, system)),
            tasks.create_task(_peers_and_clocks(here, cluster, system)),
            tasks.create_task(_cluster_wide(here, cluster)),
        ]
    found = [finding for task in local for finding in task.result()]
    return Report(str(here.home), here.node, found)


# Gathering


async def _gather(deadline_s: float, facts: Callable[[], Awaitable[T]]) -> T:
    """Facts, or _Unseen: a check that fails by itself takes no other with it."""
    try:
        async with asyncio.timeout(deadline_s):
            return await facts()
    except TimeoutError:
        raise _Unseen(f"no answer within {deadline_s:.0f} s") from None
    except Exception as e:  # whatever a machine in trouble does: it is told, with the other checks
        raise _Unseen(f"{type(e).__name__}: {e}") from e


async def _local(look: Callable[[], T]) -> T:
    return await _gather(_LOCAL_S, lambda: within(_LOCAL_S, look))


async def _or(otherwise: T, facts: Awaitable[T]) -> T:
    try:
        return await facts
    except _Unseen:
        return otherwise


async def _judged(check: str, look: Callable[[], T], judge: Callable[[T], list[Finding]]) -> list[Finding]:
    try:
        return judge(await _local(look))
    except _Unseen as e:
        return [_unseen(check, e)]


def _unseen(check: str, why: _Unseen) -> Finding:
    remedy = "a disk or a network that does not answer does this; try again, and see `shoal logs`"
    return Finding(check, "warning", f"it could not be looked at: {why.why}", remedy)


async def _cluster(here: Here, home: Home) -> Cluster:
    expected = not here.runs_nats or here.supervisor in ("answers", "silent")
    try:
        return await _gather(
            _NATS_S, lambda: look_nats.look(here.servers, here.secret, here.node, expected, home.run)
        )
    except _Unseen as e:
        return Cluster(facts=NatsFacts(expected=True, error=e.why))


def _mine(here: Here, beats: Mapping[tuple[str, str], Beat]) -> dict[str, Live]:
    """This node's services as the cluster sees them."""
    return {service: beat.live for (node, service), beat in beats.items() if here.node and node == here.node}


def _pids(here: Here, mine: Mapping[str, Live]) -> dict[str, int]:
    """Processes of this node on this machine."""
    supervised = {c.name: c.pid for c in here.status.children if c.pid} if here.status else {}
    host = this_host()
    return {name: live.holder.pid for name, live in mine.items() if live.holder.host == host} | supervised


# Judging, each as soon as it has its facts


async def _disk(here: Here, cluster: asyncio.Task[Cluster]) -> list[Finding]:
    try:
        facts = await _local(lambda: look_disk.look(here))
    except _Unseen as e:
        return [_unseen(disk.DISK, e)]
    seen = await cluster
    runs = "storage" in _mine(here, seen.beats)
    return disk.judge(msgspec.structs.replace(facts, state=seen.storage if runs else None, storage_runs=runs))


async def _services(here: Here, cluster: asyncio.Task[Cluster]) -> list[Finding]:
    # The units are for the node in ~/.shoal, and for no other.
    ask_systemd = here.status is None and here.home == Path.home() / ".shoal"
    units = await _or([], _local(lambda: look_units.look(Path.home()))) if ask_systemd else []
    seen = await cluster
    # Those of another machine with this node's id are the concern of `node ids`.
    this = identities.machine(this_process())
    mine = _mine(here, seen.beats).items()
    live = sorted(name for name, said in mine if identities.machine(said.holder) == this)
    return services.judge(
        services.ServiceFacts(
            home=str(here.home),
            node=here.node,
            supervisor=here.supervisor,
            pid=here.pid,
            children=here.status.children if here.status else [],
            last_words=here.last_words,
            units=units,
            live=live if seen.facts.connected else None,
        )
    )


async def _ports_and_files(here: Here, cluster: asyncio.Task[Cluster]) -> list[Finding]:
    mine = _mine(here, (await cluster).beats)
    pids = _pids(here, mine)

    def look() -> tuple[list[Wanted], list[Listener], set[int]]:
        found = look_ports.listeners(pids.values())
        ours = set(pids.values())
        if here.status is None and mine:
            # NATS under systemd says its pid to nobody: it is the one that our services have found.
            ours |= {x.pid for x in found if "nats-server" in x.name}
        return look_ports.wanted(here, mine, found), found, ours

    return [
        *await _judged(ports.CHECK, look, lambda seen: ports.judge(*seen)),
        *await _judged(machine.LIMITS, lambda: look_machine.opened(pids), machine.judge_files),
    ]


async def _nats(cluster: asyncio.Task[Cluster], system: asyncio.Task[System]) -> list[Finding]:
    return nats.judge((await cluster).facts, await system)


async def _peers_and_clocks(
    here: Here, cluster: asyncio.Task[Cluster], system: asyncio.Task[System]
) -> list[Finding]:
    seen = await cluster
    if not seen.facts.connected or seen.clock is None:
        return [_skipped(peers.CHECK, seen), _skipped(clocks.CHECK, seen)]
    try:
        around = await system
        found, offsets = await _gather(_PEERS_S, lambda: look_peers.look(seen.beats, here.secret, around))
    except _Unseen as e:
        return [_unseen(peers.CHECK, e), _skipped(clocks.CHECK, seen)]
    apart = clocks.against_nats(here.node or "here", seen.clock, offsets, began_ahead(seen.beats))
    return [*peers.judge(found, here.node, around), *clocks.judge(apart)]


def began_ahead(beats: Mapping[tuple[str, str], Beat]) -> dict[str, float]:
    """By how many seconds each node's latest service says that it began after NATS received its word. Pure."""
    ahead: dict[str, float] = {}
    for (node, _), beat in beats.items():
        ahead[node] = max(ahead.get(node, 0.0), beat.live.started_at_s - beat.received_at_s)
    return ahead


def _skipped(check: str, cluster: Cluster) -> Finding:
    why = "JetStream does not answer" if cluster.facts.connected else "NATS is not reached"
    return Finding(check, "skipped", f"not looked at: {why}")


async def _cluster_wide(here: Here, cluster: asyncio.Task[Cluster]) -> list[Finding]:
    seen = await cluster
    if not seen.facts.connected or seen.clock is None:
        return [_skipped(versions.CHECK, seen), _skipped(identities.CHECK, seen)]
    said = {key: beat.live.version for key, beat in seen.beats.items()}
    holders = {key: beat.live.holder for key, beat in seen.beats.items()}
    running = here.supervisor in ("answers", "silent")
    return [*versions.judge(said, VERSION), *identities.judge(holders, here.node, this_host(), running)]


ORDER: tuple[str, ...] = (
    services.CHECK,
    ports.CHECK,
    nats.NATS,
    nats.STREAMS,
    nats.ROOM,
    clocks.CHECK,
    peers.CHECK,
    identities.CHECK,
    versions.CHECK,
    disk.DISK,
    disk.ROOTS,
    permissions.CHECK,
    machine.MEMORY,
    machine.LIMITS,
)
"""The checks, as they are told."""
