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

With `--tls` all nodes are members and the bytes are encrypted; huggingface_hub is left out, which knows no authority
but the system's.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]


from figures import Figure, figure, report  # noqa: E402
from membership import TLS, Cluster  # noqa: E402
from shoal_common.bus.keys import download_key  # noqa: E402
from shoal_common.messages.downloads import DownloadState  # noqa: E402
from shoal_demo.faults import Faults  # noqa: E402
from shoal_demo.hub_server import RunningHub, running_hub  # noqa: E402
from tests.harness.nats import NatsServer, joined  # noqa: E402
from tests.harness.process import source_path  # noqa: E402
from tests.harness.waiting import eventually  # noqa: E402
from transfer_site import (  # noqa: E402
    DEADLINE_S,
    EIGHT,
    FILE_BYTES,
    MIB,
    QUICK,
    Site,
    an_origin,
    cpu_s,
    flip,
    hf_s,
    known_digests,
    nginx,
    resident_bytes,
    state_of,
)
from warm_memory import memory_directory, touched  # noqa: E402

ROUNDS = 3


KILL_ROUNDS = 1 if QUICK else 3
"""A round starts a node twice: `--quick` takes one sample, not a median."""


COLD_FILES = (3 * MIB, 3 * MIB) if QUICK else (96 * MIB, 96 * MIB)


HUB_BYTES_PER_S = (5 if QUICK else 24) * MIB


LARGE_BYTES = (512 if QUICK else 4096) * MIB


SHARED_FILES = ((8 if QUICK else 96) * MIB,) * 4


_SAMPLE_S = 0.02


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
            others = {} if TLS else {"hf from the node": node, "hf from nginx": plain}
            for _ in range(ROUNDS):
                before = cpu_s(site, b)
                with in_touched_memory():
                    note("ours", await site.pull_s(b, model))
                cpu.append((cpu_s(site, b) - before) / (size / 1e9))
                await site.delete(b, model)
                with in_touched_memory():
                    note("unverified", await site.pull_s("u", model))
                await site.delete("u", model)
                for name, endpoint in others.items():
                    if endpoint:
                        with in_touched_memory():
                            note(name, await asyncio.to_thread(hf_s, site.homes, model, endpoint))
    await site.delete(a, model)
    medians = {who: statistics.median(samples) for who, samples in took.items()}
    print({who: f"{size / 1e6 / s:.0f} MB/s" for who, s in medians.items()}, file=sys.stderr)
    hf = [s for who, s in medians.items() if who.startswith("hf")]
    versus = {f"receive_vs_hf{suffix}": figure(min(hf) / medians["ours"], "x", ">= 3.5")} if hf else {}
    return versus | {
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
        quick = site.with_homes(Path(name))
        async with quick.running("m", "n"):
            return await receive_figures(quick, "m", "n", "_in_memory")


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


async def measure(directory: Path, cluster: Cluster, server: NatsServer, hub: RunningHub) -> dict[str, Figure]:
    """Return all figures."""
    figures: dict[str, Figure] = {}
    started_s = time.monotonic()

    def done(measured: dict[str, Figure]) -> None:
        figures.update(measured)
        print(f"{time.monotonic() - started_s:.0f} s: {', '.join(measured)}", file=sys.stderr)

    async with joined(server) as here:
        site = Site(directory, cluster, server, hub, here)
        done(await in_memory_figures(site))
        async with site.running("a", "b"):
            done(await receive_figures(site, "a", "b"))
            done(await peak_figures(site))
        with tempfile.TemporaryDirectory(dir=memory_directory(3 * len(EIGHT) * sum(COLD_FILES))) as name:
            eight = site.with_homes(Path(name))
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
        cluster = Cluster(directory)
        with cluster.nats() as server, running_hub(directory / "models", process=True) as hub:
            figures = asyncio.run(measure(directory, cluster, server, hub))
    report(figures)


if __name__ == "__main__":
    main()
