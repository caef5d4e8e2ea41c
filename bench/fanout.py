"""How soon all nodes have a model that one of them has: the last one's finish over F/B.

F is the model's size, a single file of 256 MiB; B is the rate of each link in each direction, 200 Mbit/s. All nodes
pull at the same moment; a pull ends when storage has hashed everything and publishes the model as ready.

- `fanout_n4`, `fanout_n8`: four and eight nodes pull from one.
- `fanout_slow_uplink`: four nodes, one of which sends with a quarter of B.
- `source_bytes_n8`: bytes that the source sent, over F, by its link's counter, with headers and all other traffic.
- `libtorrent_n4`: the baseline, on the same links.
- `link_tcp`: one plain TCP stream of F over one of these links: what headers alone take of B.
- `sim_fanout_…`: the same in `swarm_simulator.py`, without disks, hashing or processes; a thousand nodes pull a
  quarter of the bytes, or a sixteenth, which gives their way through the graph more weight.

Weights pass unencrypted; with `--tls` encrypted. Whoever asks for them proves who it is inside TLS either way.

The services are real processes in network namespaces (`netns.py`), which root can create on Linux. Elsewhere only the
simulated figures are reported. Stores are in memory if there is enough: nine nodes should not share a disk.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import msgspec  # noqa: E402  # after the path is set

from figures import Figure, figure, interleaved, report  # noqa: E402
from membership import TLS  # noqa: E402
from netns import CannotMake, Links  # noqa: E402
from shoal_common.bus import subjects  # noqa: E402
from shoal_common.messages import decode  # noqa: E402
from shoal_common.messages.envelope import Outcome  # noqa: E402
from shoal_common.store.bitmap import LEAF_BYTES  # noqa: E402
from shoal_demo.hub_server import running_hub  # noqa: E402
from simulated_nodes import Link  # noqa: E402
from swarm_simulator import Simulation  # noqa: E402
from tests.harness.identities import Authority  # noqa: E402
from tests.harness.nats import NatsServer, joined  # noqa: E402
from tests.harness.node import Node, running_nodes  # noqa: E402
from warm_memory import memory_directory, touched  # noqa: E402

QUICK = "--quick" in sys.argv
ROUNDS = 1 if QUICK else 3
LEAVES = 128 if QUICK else 256
SIZE_BYTES = LEAVES * LEAF_BYTES
RATE = 25e6
"""Bytes per second of each link in each direction."""
SOURCE = "source"
RECEIVERS = [f"n{number}" for number in range(8)]
SERVICES = ("storage", "fetcher", "fileserver")
REPO = "bench/model"
TORRENT_PORT = 6881
PULL_DEADLINE_S = 600.0


class Cluster:
    """One node that has the model and eight that can pull it, each on its own link."""

    def __init__(self, links: Links, server: NatsServer) -> None:
        self._links, self._server = links, server
        self.source_sent_bytes: list[int] = []

    def pull_s(self, receivers: list[str], slow_uplink: str = "") -> float:
        """Return the seconds until the last receiver has the model; delete it from them afterwards."""
        if slow_uplink:
            self._links.shape(slow_uplink, RATE / 4, RATE)
        try:
            sent_bytes = self._links.sent_bytes(SOURCE)
            with touched(len(receivers) * SIZE_BYTES):
                took_s = asyncio.run(self._command(receivers, "fetcher", "download"))
            if len(receivers) == len(RECEIVERS):
                self.source_sent_bytes.append(self._links.sent_bytes(SOURCE) - sent_bytes)
            asyncio.run(self._command(receivers, "storage", "delete"))
        finally:
            if slow_uplink:
                self._links.shape(slow_uplink, RATE, RATE)
        return took_s

    def give_source(self) -> None:
        """Have the source pull the model from the hub."""
        asyncio.run(self._command([SOURCE], "fetcher", "download"))

    async def _command(self, nodes: list[str], service: str, verb: str) -> float:
        body = msgspec.json.encode({"model": REPO})
        async with joined(self._server) as here:

            async def one(node: str) -> None:
                reply = await here.client.request(
                    subjects.command(service, node, verb), body, timeout=PULL_DEADLINE_S
                )
                outcome = decode(reply.data, Outcome)
                if not outcome.ok:
                    raise SystemExit(f"{verb} on {node}: {outcome.error}")

            started_s = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for node in nodes:
                    tasks.create_task(one(node))
            return time.perf_counter() - started_s


@contextmanager
def running_cluster(directory: Path, links: Links) -> Iterator[Cluster]:
    """Run the services of all nodes, the source with the model; then limit the links' rates."""
    repo = directory / "hub" / REPO
    repo.mkdir(parents=True)
    with (repo / "weights.bin").open("wb") as f:
        for _ in range(LEAVES):
            f.write(os.urandom(LEAF_BYTES))
    with ExitStack() as stack:
        hub = stack.enter_context(running_hub(directory / "hub", host=links.here, process=True))
        authority = Authority(directory)
        server = stack.enter_context(NatsServer(directory / "nats", links.here, authority=authority))
        nodes = [
            Node(
                directory / name,
                name,
                server.url,
                SERVICES,
                SHOAL_BIND=links.address(name),
                SHOAL_ENCRYPT_WEIGHTS=str(TLS).lower(),
                HF_ENDPOINT=hub.base_url,
            )
            for name in links.nodes
        ]
        for node in nodes:
            authority.node(node.id)
            for service in node.services.values():
                service.within = links.within(node.id)
        stack.enter_context(running_nodes(*nodes))

        async def all_ready() -> None:
            async with joined(server) as here:
                await authority.publish(here.buckets)
                for node in nodes:
                    await node.ready(here)

        asyncio.run(all_ready())
        cluster = Cluster(links, server)
        cluster.give_source()
        links.shape_all()
        yield cluster


class TorrentPeer:
    """`torrent.py` on a node."""

    def __init__(self, links: Links, node: str) -> None:
        self.address = f"{links.address(node)}:{TORRENT_PORT}"
        script = str(Path(__file__).with_name("libtorrent_peer.py"))
        self._process = subprocess.Popen(
            [*links.within(node), sys.executable, script, links.address(node), str(TORRENT_PORT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send_command(self, *arguments: str) -> None:
        """Send it a command."""
        assert self._process.stdin is not None
        print(*arguments, file=self._process.stdin, flush=True)

    def wait_done(self) -> None:
        """Return once it has finished the command."""
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "done":
            raise SystemExit(f"libtorrent at {self.address} ended")

    def end(self) -> None:
        """Kill it, and wait."""
        self._process.kill()
        self._process.communicate()


def torrent_s(directory: Path, links: Links, receivers: list[str]) -> float:
    """Return the seconds until the last receiver has the same bytes by BitTorrent."""
    work = directory / "torrent"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with ExitStack() as stack:
        peers: list[TorrentPeer] = []
        for node in (SOURCE, *receivers):
            peers.append(TorrentPeer(links, node))
            stack.callback(peers[-1].end)
        peers[0].send_command("seed", str(directory / "hub" / REPO), str(work / "model.torrent"))
        peers[0].wait_done()
        stack.enter_context(touched(len(receivers) * SIZE_BYTES))
        started_s = time.perf_counter()
        for number, peer in enumerate(peers[1:]):
            others = [p.address for p in peers if p is not peer]
            peer.send_command("leech", str(work / str(number)), str(work / "model.torrent"), *others)
        for peer in peers[1:]:
            peer.wait_done()
        return time.perf_counter() - started_s


_TAKES = f"""
import socket, time
with socket.create_server(("0.0.0.0", {TORRENT_PORT})) as server:
    print(flush=True)
    stream, began_s = server.accept()[0], time.perf_counter()
    while stream.recv(1 << 20):
        pass
    print(time.perf_counter() - began_s)
"""
_GIVES = f"""
import os, socket, sys
with socket.create_connection((sys.argv[1], {TORRENT_PORT})) as stream:
    for _ in range({LEAVES}):
        stream.sendall(os.urandom({LEAF_BYTES}))
"""


def tcp_s(links: Links, receiver: str) -> float:
    """Return the seconds that a plain TCP stream takes for the same bytes from the source to one receiver."""
    taking = subprocess.Popen(
        [*links.within(receiver), sys.executable, "-c", _TAKES], stdout=subprocess.PIPE, text=True
    )
    with taking:
        assert taking.stdout is not None
        taking.stdout.readline()
        subprocess.run([*links.within(SOURCE), sys.executable, "-c", _GIVES, links.address(receiver)], check=True)
        return float(taking.stdout.readline())


def on_links() -> dict[str, Figure]:
    """Measure the real services. Raises CannotMake if links cannot be created."""
    bound_s = SIZE_BYTES / RATE
    with ExitStack() as stack:
        links = stack.enter_context(Links([SOURCE, *RECEIVERS], RATE))
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=memory_directory(3 * len(RECEIVERS) * SIZE_BYTES)))
        )
        cluster = stack.enter_context(running_cluster(directory, links))
        contenders: dict[str, Callable[[], float]] = {
            "n4": partial(cluster.pull_s, RECEIVERS[:4]),
            "n8": partial(cluster.pull_s, RECEIVERS),
            "slow": partial(cluster.pull_s, RECEIVERS[:4], RECEIVERS[0]),
            "tcp": partial(tcp_s, links, RECEIVERS[0]),
        }
        if find_spec("libtorrent"):
            contenders["libtorrent"] = partial(torrent_s, directory, links, RECEIVERS[:4])
        else:
            print("libtorrent is not installed (`make bench` does that): its figure is left out", file=sys.stderr)
        took_s = interleaved(contenders, ROUNDS)
        sent_bytes = statistics.median(cluster.source_sent_bytes)
    figures = {
        "fanout_n4": figure(took_s["n4"] / bound_s, "x", "<= 1.10"),
        "fanout_n8": figure(took_s["n8"] / bound_s, "x", "<= 1.15"),
        "fanout_slow_uplink": figure(took_s["slow"] / bound_s, "x", "<= 1.25"),
        "source_bytes_n8": figure(sent_bytes / SIZE_BYTES, "x", "<= 1.02"),
        "link_tcp": figure(took_s["tcp"] / bound_s, "x"),
    }
    if "libtorrent" in took_s:
        figures["libtorrent_n4"] = figure(took_s["libtorrent"] / bound_s, "x")
    return figures


SIMULATED = {4: "<= 1.08", 8: "<= 1.12", 100: "", 1000: ""}
"""Targets by the number of nodes that pull."""


def simulated() -> dict[str, Figure]:
    """Measure the same decisions in a simulation: medians, or a single run where one takes long."""
    figures = {}
    for count, target in SIMULATED.items():
        leaves = 256 if count <= 100 else 16 if QUICK else 64
        bound_s = leaves * LEAF_BYTES / RATE
        samples = []
        for seed in range(3 if count < 100 else 1):
            outcome = Simulation([Link(RATE, RATE)], [Link(RATE, RATE)] * count, leaves, seed=seed).run()
            if outcome.unfinished:
                raise SystemExit(f"{len(outcome.unfinished)} of {count} simulated nodes did not finish")
            samples.append(max(outcome.finished_s.values()) / bound_s)
        figures[f"sim_fanout_{count}"] = figure(statistics.median(samples), "x", target)
    return figures


def main() -> None:
    """Measure and report."""
    # Clean up on every signal; a shell starts background processes with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    figures: dict[str, Figure] = {}
    try:
        figures = on_links()
    except CannotMake as e:
        print(f"only simulated figures: {e}", file=sys.stderr)
    report(figures | simulated())


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
        sys.exit(0)
    sys.exit(130)
