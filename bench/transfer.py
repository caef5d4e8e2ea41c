"""Weights between machines, with the real services as processes: what the hub sends, and what a transfer costs.

Eight nodes download a model at the same time from a hub with a limited rate; their stores are in memory if there is
enough, because eight nodes should not share a disk:

- `hub_bytes_8`: bytes that the hub sends over the model's; the worst round.
- `time_8_over_1`: when the last of the eight has it, over one node alone.
- `hub_bytes_origin_killed`: the same ratio as the first when the origin's node is killed (SIGKILL) midway and comes
  back later; all eight have it in the end.

One node takes a file from another on loopback, from the command to its outcome, hashed and durable:

- `receive_vs_hf`: our rate over that of huggingface_hub's `hf_hub_download`, which does neither, of the same file
  from the hub-protocol port of the same node or from nginx, whichever is faster for it.
- `receive_cpu_s_per_gb`: CPU seconds of the receiving node's fetcher and storage.
- `verified_over_unverified`: our rate over that of a node whose hashes are known beforehand (bench/unhashed); all
  other code is the same.
- `…_in_memory`: the same with stores and caches in a file system in memory. This is what the code costs; the figures
  above include the disk.
- `peak_growth_mib`: growth of the resident memory of either node's services while a large file passes.

Three nodes have a model and a fourth pulls it:

- `corrupt_peer_over_clean`: the time with one of the three serving a wrong byte in every leaf, over that with none.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import psutil  # noqa: E402

from figures import Figure, figure, report  # noqa: E402
from shoal_cli.node.ports import free_port  # noqa: E402
from shoal_common.bus import subjects  # noqa: E402
from shoal_common.bus.cluster_lease import LeaseValue  # noqa: E402
from shoal_common.bus.keys import download_key, liveness_key  # noqa: E402
from shoal_common.messages import decode  # noqa: E402
from shoal_common.messages.downloads import DownloadState  # noqa: E402
from shoal_common.messages.envelope import Outcome  # noqa: E402
from shoal_common.messages.liveness import LivenessRecord  # noqa: E402
from shoal_common.store.bitmap import LEAF_BYTES  # noqa: E402
from shoal_common.store.leaf_hash import leaf_hash  # noqa: E402
from shoal_common.store.verification_stamp import write_stamp  # noqa: E402
from shoal_demo.faults import Faults  # noqa: E402
from shoal_demo.hub_server import RunningHub, running_hub  # noqa: E402
from tests.harness.nats import Joined, NatsServer, joined  # noqa: E402
from tests.harness.node import Node, running_nodes  # noqa: E402
from tests.harness.process import source_path  # noqa: E402
from tests.harness.waiting import eventually  # noqa: E402
from warm_memory import memory_directory, touched  # noqa: E402

QUICK = "--quick" in sys.argv
MIB = 1 << 20
SERVICES = ("storage", "fetcher", "fileserver")
EIGHT = "abcdefgh"
ROUNDS = 3
KILL_ROUNDS = 1 if QUICK else 3
"""A round starts a node twice: `--quick` takes one sample, not a median."""
COLD_FILES = (3 * MIB, 3 * MIB) if QUICK else (96 * MIB, 96 * MIB)
HUB_BYTES_PER_S = (5 if QUICK else 24) * MIB
FILE_BYTES = (96 if QUICK else 1024) * MIB
LARGE_BYTES = (512 if QUICK else 4096) * MIB
SHARED_FILES = ((8 if QUICK else 96) * MIB,) * 4
DEADLINE_S = 900.0
_SAMPLE_S = 0.02

_HF = """
import sys, time
from huggingface_hub import hf_hub_download
began = time.perf_counter()
hf_hub_download(sys.argv[1], sys.argv[2], cache_dir=sys.argv[3], endpoint=sys.argv[4])
print(time.perf_counter() - began)
"""
_NGINX = """
daemon off; master_process off; pid {at}/nginx.pid; error_log {at}/nginx.log;
events {{}}
http {{
  access_log off; sendfile on; client_body_temp_path {at}/t1; proxy_temp_path {at}/t2; fastcgi_temp_path {at}/t3;
  uwsgi_temp_path {at}/t4; scgi_temp_path {at}/t5;
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {hub}; }}
    location ~ ^/(.+/.+)/resolve/[^/]+/(.+)$ {{ root {root}; try_files /$1/$2 =404; etag off;
      add_header ETag '"{sha256}"'; add_header X-Repo-Commit {commit}; }} }}
}}
"""


class Site:
    """A hub, NATS, and the running nodes."""

    def __init__(
        self, directory: Path, server: NatsServer, hub: RunningHub, here: Joined, homes: Path | None = None
    ) -> None:
        self.directory, self.server, self.hub, self.here = directory, server, hub, here
        self.homes = homes or directory
        self.nodes: dict[str, Node] = {}

    def make(self, repo: str, sizes: tuple[int, ...]) -> int:
        """Put a model of random bytes on the hub. Returns its size in bytes."""
        at = self.directory / "models" / repo
        at.mkdir(parents=True)
        for number, size in enumerate(sizes):
            with (at / f"{number}.safetensors").open("wb") as f:
                for _ in range(size // MIB):
                    f.write(os.urandom(MIB))
        return sum(sizes)

    @asynccontextmanager
    async def running(self, *names: str, **environment: str) -> AsyncIterator[None]:
        """Run nodes of these names while the body runs."""
        given = {"HF_ENDPOINT": self.hub.base_url, "PYTHONDONTWRITEBYTECODE": "", **environment}
        made = [Node(self.homes / n, n, self.server.url, SERVICES, **given) for n in names]
        with running_nodes(*made):
            for node in made:
                await node.ready(self.here)
                self.nodes[node.id] = node
            yield
        for node in made:
            del self.nodes[node.id]
            shutil.rmtree(node.home)

    async def ask(self, service: str, node: str, verb: str, model: str) -> None:
        """Send a command and wait for its successful outcome."""
        subject, body = subjects.command(service, node, verb), json.dumps({"model": model}).encode()
        outcome = decode((await self.here.client.request(subject, body, timeout=DEADLINE_S)).data, Outcome)
        if not outcome.ok:
            raise SystemExit(f"{verb} of {model} on {node}: {outcome.error}\n{self.nodes[node].log()}")

    async def pull_s(self, node: str, model: str) -> float:
        """Return the seconds from requesting a model on a node to the outcome."""
        started_s = time.perf_counter()
        await self.ask("fetcher", node, "download", model)
        return time.perf_counter() - started_s

    async def delete(self, nodes: str, model: str) -> None:
        """Delete a model from nodes."""
        await asyncio.gather(*(self.ask("storage", node, "delete", model) for node in nodes))

    def hub_bytes(self, model: str) -> int:
        """Return the bytes of a model's files that the hub has sent since its counters were reset."""
        return sum(f.bytes for name, f in self.hub.stats().files.items() if name.startswith(f"{model}/"))

    async def address(self, node: str) -> str:
        """Return the address of a node's fileserver."""
        live = await self.here.buckets.live.get_as(liveness_key(node, "fileserver"), LivenessRecord)
        assert live is not None
        return live.facts.addresses[0]

    async def restart(self, node: str) -> None:
        """Start a killed node again."""
        self.nodes[node].start()
        await self.nodes[node].ready(self.here)


# Eight nodes at once


async def cold_start_figures(site: Site) -> dict[str, Figure]:
    """Measure one node alone and all eight, in turn; then with the origin killed."""
    model = "bench/cold"
    size = site.make(model, COLD_FILES)
    site.hub.set_faults(Faults(bytes_per_s=HUB_BYTES_PER_S))
    alone, together, shares = [], [], []
    for _ in range(ROUNDS):
        with touched(size):
            alone.append(await site.pull_s("a", model))
        await site.delete("a", model)
        site.hub.reset_stats()
        with touched(len(EIGHT) * size):
            together.append(max(await asyncio.gather(*(site.pull_s(n, model) for n in EIGHT))))
        shares.append(site.hub_bytes(model) / size)
        await site.delete(EIGHT, model)
    killed = [await killed_share(site, model, size) for _ in range(KILL_ROUNDS)]
    site.hub.reset_faults()
    return {
        "hub_bytes_8": figure(max(shares), "x", "<= 1.02"),
        "time_8_over_1": figure(statistics.median(together) / statistics.median(alone), "x", "<= 1.10"),
        "hub_bytes_origin_killed": figure(max(killed), "x", "<= 1.02"),
    }


async def killed_share(site: Site, model: str, size: int) -> float:
    """Return the hub's bytes over the model's when an origin's node dies with half of the bytes sent."""
    site.hub.reset_stats()
    pulls = {n: asyncio.create_task(site.pull_s(n, model)) for n in EIGHT}

    async def half() -> bool:
        return await asyncio.to_thread(site.hub_bytes, model) > size / 2

    await eventually(half, "the hub has sent half of it", DEADLINE_S)
    victim = await an_origin(site)
    site.nodes[victim].kill()
    await asyncio.gather(*(pull for n, pull in pulls.items() if n != victim))
    pulls[victim].cancel()  # its reply is lost; its download request is not
    await site.restart(victim)

    async def back() -> bool:
        state = await site.here.buckets.state.get_as(download_key(victim, model), DownloadState)
        return state is not None and state.phase == "ready"

    await eventually(back, f"{victim} has it too", DEADLINE_S)
    share = site.hub_bytes(model) / size
    await site.delete(EIGHT, model)
    return share


async def an_origin(site: Site) -> str:
    """Return a node that is reading from the hub."""
    info = await site.here.js.stream_info("KV_lease", subjects_filter="$KV.lease.origin.>")
    for subject in sorted(info.state.subjects or {}):
        lease = await site.here.buckets.lease.get_as(subject.removeprefix("$KV.lease."), LeaseValue)
        if lease is not None:
            return lease.node
    raise SystemExit("no node is an origin, though the hub is sending")


# One node from another


async def receive_figures(site: Site, a: str, b: str, suffix: str = "") -> dict[str, Figure]:
    """Node b takes a file from a, node u does so without hashing, and huggingface_hub too; in turn."""
    model, size = f"bench/file{suffix}", FILE_BYTES
    site.make(model, (size,))
    file = site.directory / "models" / model / "0.safetensors"
    digests = site.directory / "digests.json"
    sha256 = await asyncio.to_thread(known_digests, file, digests)
    unhashed = {"SHOAL_BENCH_DIGESTS": str(digests), "PYTHONPATH": f"{ROOT / 'bench' / 'unhashed'}:{source_path()}"}
    took: dict[str, list[float]] = {}
    cpu: list[float] = []

    def note(who: str, seconds: float) -> None:
        took.setdefault(who, []).append(seconds)

    def in_touched_memory() -> AbstractContextManager[None]:
        return touched(2 * size + size // 4, 2 * size)

    async with site.running("u", **unhashed):
        await site.pull_s(a, model)
        node, commit = f"http://{await site.address(a)}", (await state_of(site, a, model)).commit
        with nginx(site, sha256, commit) as plain:
            for _ in range(ROUNDS):
                before = cpu_s(site, b)
                with in_touched_memory():
                    note("ours", await site.pull_s(b, model))
                cpu.append((cpu_s(site, b) - before) / (size / 1e9))
                await site.delete(b, model)
                with in_touched_memory():
                    note("unverified", await site.pull_s("u", model))
                await site.delete("u", model)
                for name, endpoint in {"hf from the node": node, "hf from nginx": plain}.items():
                    if endpoint:
                        with in_touched_memory():
                            note(name, await asyncio.to_thread(hf_s, site.homes, model, endpoint))
    await site.delete(a, model)
    medians = {who: statistics.median(samples) for who, samples in took.items()}
    print({who: f"{size / 1e6 / s:.0f} MB/s" for who, s in medians.items()}, file=sys.stderr)
    hf = min(s for who, s in medians.items() if who.startswith("hf"))
    return {
        f"receive_vs_hf{suffix}": figure(hf / medians["ours"], "x", ">= 3.5"),
        f"receive_mb_per_s{suffix}": figure(size / 1e6 / medians["ours"], "MB/s"),
        f"receive_cpu_s_per_gb{suffix}": figure(statistics.median(cpu), "s", "<= 1.0"),
        f"verified_over_unverified{suffix}": figure(medians["unverified"] / medians["ours"], "x", ">= 0.8"),
    }


async def in_memory_figures(site: Site) -> dict[str, Figure]:
    """Measure the same with nodes whose homes are in memory, if there is enough."""
    memory = memory_directory(6 * FILE_BYTES)
    if memory is None:
        print("not enough memory for the files: these figures are left out", file=sys.stderr)
        return {}
    with tempfile.TemporaryDirectory(dir=memory) as name:
        quick = Site(site.directory, site.server, site.hub, site.here, Path(name))
        async with quick.running("m", "n"):
            return await receive_figures(quick, "m", "n", "_in_memory")


async def state_of(site: Site, node: str, model: str) -> DownloadState:
    """Return the state of a model's download on a node."""
    state = await site.here.buckets.state.get_as(download_key(node, model), DownloadState)
    assert state is not None
    return state


def known_digests(file: Path, to: Path) -> str:
    """Write what bench/unhashed needs to know about a file. Returns its sha256."""
    whole, leaves, first = hashlib.sha256(), {}, ""
    with file.open("rb") as f:
        while leaf := f.read(LEAF_BYTES):
            whole.update(leaf)
            first = first or leaf[:32].hex()
            leaves[leaf[:32].hex()] = leaf_hash(leaf).hex()
    to.write_text(json.dumps({"blake3": leaves, "sha256": {first: whole.hexdigest()}}))
    return whole.hexdigest()


def cpu_s(site: Site, node: str) -> float:
    """Return the CPU seconds of a node's fetcher and storage so far."""
    times = [psutil.Process(site.nodes[node][s].pid).cpu_times() for s in ("fetcher", "storage")]
    return float(sum(t.user + t.system for t in times))


def hf_s(directory: Path, model: str, endpoint: str) -> float:
    """Seconds of hf_hub_download in a fresh process with an empty cache, imports not counted."""
    cache = directory / "hf"
    usual = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SHOAL_"))}
    environment = {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", _HF, model, "0.safetensors", str(cache / "cache"), endpoint],
        env={**usual, **environment, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    shutil.rmtree(cache)
    return float(result.stdout.splitlines()[-1])


@contextmanager
def nginx(site: Site, sha256: str, commit: str) -> Iterator[str]:
    """Return the address of an nginx that serves the hub's files by sendfile; "" without nginx."""
    if shutil.which("nginx") is None:
        print("nginx is not installed: huggingface_hub is measured from the node only", file=sys.stderr)
        yield ""
        return
    port = free_port("127.0.0.1")
    at = site.homes / "nginx"
    at.mkdir()
    settings, root = at / "nginx.conf", site.directory / "models"
    settings.write_text(
        ("user root;" if os.geteuid() == 0 else "")
        + _NGINX.format(at=at, port=port, hub=site.hub.base_url, root=root, sha256=sha256, commit=commit)
    )
    process = subprocess.Popen(["nginx", "-p", str(at), "-c", str(settings)], stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def peak_figures(site: Site) -> dict[str, Figure]:
    """Transfer a large file from a to b, sampling the memory of both."""
    model = "bench/large"
    site.make(model, (LARGE_BYTES,))
    await site.pull_s("a", model)
    shutil.rmtree(site.directory / "models" / model)  # two copies of it are enough
    before = {n: resident_bytes(site, n) for n in "ab"}
    growth = dict.fromkeys("ab", 0)
    pull = asyncio.create_task(site.pull_s("b", model))
    while not pull.done():
        for node in "ab":
            growth[node] = max(growth[node], resident_bytes(site, node) - before[node])
        await asyncio.wait({pull}, timeout=_SAMPLE_S)
    await pull
    await site.delete("ab", model)
    print({node: f"grew by {b / MIB:.0f} MiB" for node, b in growth.items()}, file=sys.stderr)
    return {"peak_growth_mib": figure(max(growth.values()) / MIB, "MiB", "<= 64")}


def resident_bytes(site: Site, node: str) -> int:
    """Return the resident memory of a node's services."""
    return sum(psutil.Process(site.nodes[node][s].pid).memory_info().rss for s in SERVICES)


# One of three peers is corrupt


async def corrupt_figures(site: Site) -> dict[str, Figure]:
    """Node c serves wrong bytes in every other round, to a node that has not met it before."""
    model = "bench/shared"
    site.make(model, SHARED_FILES)
    for node in "abc":
        await site.pull_s(node, model)
    blobs = [p for p in site.nodes["c"].layout.blobs.glob("*/*") if p.stat().st_size in SHARED_FILES]
    site.nodes["c"]["storage"].kill()  # it would detect that its blobs were changed
    clean, corrupt = [], []
    for number in range(ROUNDS):
        clean.append(await site.pull_s("d", model))
        await site.delete("d", model)
        flip(blobs)
        corrupt.append(await site.pull_s("efg"[number], model))
        flip(blobs)
    from_liar = [(await state_of(site, n, model)).sources.get("c", 0) for n in "efg"]
    print({"clean": clean, "corrupt": corrupt, "bytes from who lies": from_liar}, file=sys.stderr)
    return {"corrupt_peer_over_clean": figure(statistics.median(corrupt) / statistics.median(clean), "x", "<= 1.35")}


def flip(blobs: list[Path]) -> None:
    """Flip a bit of every leaf of these files, whose stamps stay valid; or flip it back."""
    for path in blobs:
        with path.open("r+b", buffering=0) as f:
            for at in range(LEAF_BYTES // 2, path.stat().st_size, LEAF_BYTES):
                byte = os.pread(f.fileno(), 1, at)
                os.pwrite(f.fileno(), bytes([byte[0] ^ 1]), at)
        write_stamp(path.name, path)


async def measure(directory: Path, server: NatsServer, hub: RunningHub) -> dict[str, Figure]:
    """Return all figures."""
    figures: dict[str, Figure] = {}
    started_s = time.monotonic()

    def done(measured: dict[str, Figure]) -> None:
        figures.update(measured)
        print(f"{time.monotonic() - started_s:.0f} s: {', '.join(measured)}", file=sys.stderr)

    async with joined(server) as here:
        site = Site(directory, server, hub, here)
        done(await in_memory_figures(site))
        async with site.running("a", "b"):
            done(await receive_figures(site, "a", "b"))
            done(await peak_figures(site))
        with tempfile.TemporaryDirectory(dir=memory_directory(3 * len(EIGHT) * sum(COLD_FILES))) as name:
            eight = Site(directory, server, hub, here, Path(name))
            async with eight.running(*EIGHT):
                done(await cold_start_figures(eight))
                done(await corrupt_figures(eight))
    return figures


def main() -> None:
    """Measure and report. A SIGTERM ends it in order: every started process is ended by its pid."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "models").mkdir()
        with (
            NatsServer(directory / "nats") as server,
            running_hub(directory / "models", process=True) as hub,
        ):
            figures = asyncio.run(measure(directory, server, hub))
    report(figures)


if __name__ == "__main__":
    main()
