"""What an idle cluster costs, how soon a new node knows a large one, and how soon a node's death is seen.

Five nodes with all their services, idle for a minute:

- `idle_messages`: messages written to any stream or sent on any subject of Shoal's, besides liveness and leases.
- `liveness_mb_day`: what a node's liveness keys and its share of the leader's lease send per day.
- `idle_cpu_pct`: of one core, all processes of the node that uses most; the first node includes NATS.
- `rss_mb`: the largest service without MLX, and `rss_mb_inference`, the one that would load it.

A thousand nodes, simulated by this script, that renew their keys and hold ten models each:

- `join_s`: from the connection of a new node's placement to its reply to a preview over all nodes;
  `join_process_s`: from the start of its process.
- `leader_cpu_pct_1000`: of one core, a leader's placement while the nodes renew their keys.

Two nodes that run an instance together, one of which dies:

- `death_seen_connection_s`: from the kill of all its processes until the instance is degraded and placement does not
  offer the node any more.
- `death_seen_s`: the same for a node that is stopped (SIGSTOP), so that only its silence tells.

With `--tls` all nodes are members, NATS and every port speak TLS, and the last two are left out.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import psutil  # noqa: E402  # after the path is set

from figures import Figure, figure, report  # noqa: E402
from membership import TLS, Cluster  # noqa: E402
from shoal_common.bus import subjects  # noqa: E402
from shoal_common.bus.cluster_lease import LeaseValue  # noqa: E402
from shoal_common.bus.keys import leader_key, liveness_key, model_key  # noqa: E402
from shoal_common.messages import encode  # noqa: E402
from shoal_common.messages.liveness import LivenessRecord, NodeFacts, ProcessIdentity  # noqa: E402
from shoal_common.messages.storage import ModelState  # noqa: E402
from shoal_common.names import SERVICES  # noqa: E402
from tests.cluster.test_node_failures import at_work  # noqa: E402
from tests.harness.nats import Joined, NatsServer, joined  # noqa: E402
from tests.harness.node import Node, running_nodes  # noqa: E402
from tests.harness.waiting import eventually  # noqa: E402
from tests.placement.placement_cluster import SHAPE  # noqa: E402

QUICK = "--quick" in sys.argv
IDLE_S = 15.0 if QUICK else 60.0
SETTLED_S = 5.0
NODES = "abcde"
LARGE = 100 if QUICK else 1000
MODELS_EACH = 10
BEAT_S = 5.0
LEAD_S = 10.0 if QUICK else 20.0
DEATHS = 1 if QUICK else 3
_DAY_S = 86400.0
_STREAMS = ("CMD", "EVT", "KV_spec", "KV_state", "KV_done")


async def written(here: Joined) -> int:
    """Return the number of messages ever written to the streams that should be silent."""
    return sum([await here.last_sequence(stream) for stream in _STREAMS])


async def settled(here: Joined) -> None:
    """Return once nothing was written for SETTLED_S."""
    before = -1
    while (now := await written(here)) != before:
        before = now
        await asyncio.sleep(SETTLED_S)


async def idle_figures(directory: Path) -> dict[str, Figure]:
    """Measure five idle nodes."""
    cluster = Cluster(directory)
    with cluster.nats() as server:
        nodes = [cluster.node(directory / name, name, server.url, SERVICES, SHOAL_GATEWAY_PORT="0") for name in NODES]
        with running_nodes(*nodes):
            async with joined(server) as here:
                await cluster.publish(here)
                for node in nodes:
                    await node.ready(here)
                await settled(here)
                counts, liveness_bytes = Counter[str](), 0

                async def count_message(message: Any) -> None:
                    counts[message.subject] += 1

                async def count_liveness(message: Any) -> None:
                    nonlocal liveness_bytes
                    liveness_bytes += len(message.subject) + len(message.data)
                    liveness_bytes += sum(len(k) + len(v) + 4 for k, v in (message.headers or {}).items())

                await here.client.subscribe(f"{subjects.ROOT}.>", cb=count_message)
                for bucket in ("live", "lease"):
                    await here.client.subscribe(f"$KV.{bucket}.>", cb=count_liveness)
                await here.client.flush()
                before, cpu_before = await written(here), cpu_of(nodes, server)
                started_s = time.monotonic()
                await asyncio.sleep(IDLE_S)  # the idle time is what is measured
                took_s = time.monotonic() - started_s
                await here.client.flush()
                cpu = {n: s - cpu_before[n] for n, s in cpu_of(nodes, server).items()}
                messages = await written(here) - before + sum(counts.values())
                if messages:
                    print("sent while idle:", dict(counts), file=sys.stderr)
                rss = {s: max(psutil.Process(n[s].pid).memory_info().rss for n in nodes) for s in SERVICES}
    print(
        {s: f"{b / 1e6:.0f} MB" for s, b in rss.items()}, {n: f"{s:.2f} s" for n, s in cpu.items()}, file=sys.stderr
    )
    return {
        "idle_messages": figure(messages, "", "<= 0"),
        "liveness_mb_day": figure(liveness_bytes / len(NODES) * _DAY_S / took_s / 1e6, "MB", "<= 30"),
        "idle_cpu_pct": figure(100 * max(cpu.values()) / took_s, "%", "<= 2"),
        "rss_mb": figure(max(b for s, b in rss.items() if s != "inference") / 1e6, "MB", "<= 80"),
        "rss_mb_inference": figure(rss["inference"] / 1e6, "MB"),
    }


def cpu_of(nodes: list[Node], server: NatsServer) -> dict[str, float]:
    """Return the CPU seconds so far of each node's processes; the first node's include NATS."""
    result = {}
    for node in nodes:
        pids = [service.pid for service in node.services.values()] + [server.pid] * (node is nodes[0])
        times = [psutil.Process(pid).cpu_times() for pid in pids]
        result[node.id] = sum(t.user + t.system for t in times)
    return result


async def beat(here: Joined, round_number: int) -> None:
    """Renew all nodes' keys, as their inference and storage would."""
    for number in range(LARGE):
        for service in ("inference", "storage"):
            node = f"n{number:04}"
            facts = NodeFacts(
                memory_available_bytes=8 << 30, memory_total_bytes=16 << 30, disk_free_bytes=round_number
            )
            live = LivenessRecord(
                holder=ProcessIdentity(uid=f"{node}-{service}", host="h", pid=1), version="0.1.0", facts=facts
            )
            await here.client.publish(f"$KV.live.{liveness_key(node, service)}", encode(live))
    await here.client.flush()


async def beat_forever(here: Joined) -> None:
    """Renew all nodes' keys until cancelled."""
    for round_number in range(1 << 30):
        started_s = time.monotonic()
        await beat(here, round_number)
        await asyncio.sleep(max(BEAT_S - (time.monotonic() - started_s), 0))


async def large_figures(directory: Path) -> dict[str, Figure]:
    """Measure a thousand nodes, a leader, and one that joins."""
    async with AsyncExitStack() as stack:
        cluster = Cluster(directory)
        server = stack.enter_context(cluster.nats())
        here = await stack.enter_async_context(joined(server))
        leader = cluster.node(directory / "leader", "leader", server.url, ("placement",))
        stack.enter_context(running_nodes(leader))
        await leader.ready(here)
        for number in range(LARGE):
            for model in range(MODELS_EACH):
                repo = f"org/model-{(number * 7 + model) % 500}"
                state = ModelState(
                    node=f"n{number:04}",
                    repo=repo,
                    commit="c" * 40,
                    size_bytes=1,
                    file_count=3,
                    revisions=["main"],
                    shape=SHAPE,
                )
                await here.client.publish(f"$KV.state.{model_key(state.node, state.model)}", encode(state))
        await here.client.flush()
        beating = asyncio.create_task(beat_forever(here))
        stack.callback(beating.cancel)

        async def led() -> LeaseValue | None:
            return await here.buckets.lease.get_as(leader_key("placement"), LeaseValue)

        async def all_live() -> bool:
            return await here.key_count("live") >= 2 * LARGE

        await eventually(led, "there is a leader")
        await eventually(all_live, "all nodes are live")
        joins, processes = [], []
        for number in range(3):
            newcomer = cluster.node(directory / f"new-{number}", f"new-{number}", server.url, ("placement",))
            await cluster.publish(here)
            with running_nodes(newcomer):
                started_s = time.perf_counter()
                await answered(here, newcomer.id)
                processes.append(time.perf_counter() - started_s)
                joins.append(time.time() - connected_at_s(newcomer))
        process = psutil.Process(leader["placement"].pid)
        before, started_s = process.cpu_times(), time.monotonic()
        await asyncio.sleep(LEAD_S)  # what leading costs in this time is measured
        after, took_s = process.cpu_times(), time.monotonic() - started_s
        spent_s = after.user + after.system - before.user - before.system
    return {
        "join_s": figure(sorted(joins)[1], "s", "<= 1"),
        "join_process_s": figure(sorted(processes)[1], "s"),
        "leader_cpu_pct_1000": figure(100 * spent_s / took_s, "%"),
    }


async def answered(here: Joined, node: str) -> None:
    """Return once a node's placement has replied to a preview, requested as soon as possible."""
    question = json.dumps({"model": "org/model-1", "max_nodes": 2}).encode()
    while True:
        try:
            reply = await here.client.request(subjects.rpc("placement", node, "preview"), question, timeout=30)
        except Exception:  # noqa: BLE001  # not started yet: nats-py raises several classes for it
            await asyncio.sleep(0.005)
            continue
        answer = json.loads(reply.data)
        if answer.get("error"):
            raise SystemExit(f"the new node does not know the cluster: {answer}")
        return


def connected_at_s(node: Node) -> float:
    """Return when a node's placement was connected (Unix time), by its own log."""
    result = re.search(r"^ts=(\S+).* msg=connected", node["placement"].log(), re.MULTILINE)
    assert result is not None, node.log()
    return datetime.fromisoformat(result[1]).timestamp()


async def death_figures(directory: Path) -> dict[str, Figure]:
    """Measure how soon a death is seen."""
    took: dict[signal.Signals, list[float]] = {signal.SIGKILL: [], signal.SIGSTOP: []}
    for number in range(DEATHS):
        for how, seconds in took.items():
            at = directory / f"{how.name}-{number}"
            with NatsServer(at / "nats") as server:
                async with at_work(at, server) as deaths:
                    await asyncio.to_thread(deaths.site["b"]["placement"].stop)
                    started_s = time.perf_counter()
                    deaths.send("b", how)
                    try:
                        await deaths.wait_phase("degraded")
                        await eventually(deaths.is_not_offered_b, "b is not offered", 60)
                        seconds.append(time.perf_counter() - started_s)
                    finally:
                        deaths.send("b", signal.SIGCONT)
    return {
        "death_seen_s": figure(median(took[signal.SIGSTOP]), "s", "<= 30"),
        "death_seen_connection_s": figure(median(took[signal.SIGKILL]), "s", "<= 2"),
    }


async def measure(directory: Path) -> dict[str, Figure]:
    """Return all figures."""
    idle, large, deaths = (directory / name for name in ("idle", "large", "deaths"))
    for part in (idle, large, deaths):
        part.mkdir()
    alive = await idle_figures(idle) | await large_figures(large)
    return alive if TLS else alive | await death_figures(deaths)


def main() -> None:
    """Measure and report."""
    with tempfile.TemporaryDirectory() as name:
        report(asyncio.run(measure(Path(name))))


if __name__ == "__main__":
    main()
