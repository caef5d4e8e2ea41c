"""What the store costs: committing a blob, a startup, an admission, an eviction plan.

- `commit_vs_cp`: bytes per second of making a blob durable and verified (a plain write into the partial blob, then
  storage's fsync, hashes and rename) over `cp`, `sync FILE` and `sha256sum` of the same bytes, comparing digests.
- `commit_vs_cp_fast_hash`: the same with Python's hashlib instead of `sha256sum`: it uses the processor's own
  instructions for sha256, which the system's tool may not.
- `scan_10k_s`: seconds to read a store of 10,000 blobs with manifests and views at startup, with a warm disk cache.
- `admissions_per_s`: the decision alone, in a ledger of those 10,000 blobs with running downloads.
- `reserve_ms`: the same over NATS and onto the disk: 8 blobs reserved, each a directory that survives a power cut.
- `plan_1000_ms`: which of 1,000 models that share blobs to evict, to free half of the store.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from shoal_common.names import model_id
from shoal_storage.store.commit import commit_blob
from shoal_storage.store.partials import verify_partial, write_partial

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from figures import Figure, figure, interleaved, report  # noqa: E402  # after the path is set
from shoal_common.messages import encode  # noqa: E402
from shoal_common.messages.manifest import Manifest, ManifestFile  # noqa: E402
from shoal_common.settings.node import StorageSettings  # noqa: E402
from shoal_common.store.leaf_hash import HASH_BYTES  # noqa: E402
from shoal_common.store.store_paths import StorePaths  # noqa: E402
from shoal_common.store.verification_stamp import write_stamp  # noqa: E402
from shoal_storage.admission.admission import admit  # noqa: E402
from shoal_storage.eviction.planner import plan_eviction  # noqa: E402
from shoal_storage.ledger.ledger import Ledger  # noqa: E402
from shoal_storage.startup import recover_store  # noqa: E402
from shoal_storage.store.store import Store  # noqa: E402
from shoal_storage.store.views import build_view  # noqa: E402
from tests.harness.nats import NatsServer  # noqa: E402
from tests.storage.running_storage import on_node  # noqa: E402

QUICK = "--quick" in sys.argv
ROUNDS = 3 if QUICK else 5
BLOB_BYTES = (256 if QUICK else 1024) << 20
CHUNK_BYTES = 256 << 10
"""Of the plain writer. Writes of 1 MiB, also those of `dd`, were several times slower where this was written."""
MODELS, BLOBS_PER_MODEL, SHARED_BLOBS = 1000, 11, 1000
"""1,000 models with 9 blobs of their own and 2 of the 1,000 shared ones: 10,000 blobs."""
ADMISSIONS = 500 if QUICK else 3000
PLANS = 9 if QUICK else 51
RESERVES = 30 if QUICK else 200
UNLIMITED = StorageSettings(quota_bytes=None, headroom_bytes=0)


def in_store(root: Path, source: Path, sha256: str) -> float:
    """Return the seconds to put the bytes into a store: written by a plain loop, then committed by storage."""
    disk = Store(root)
    disk.open()
    write_partial(disk, sha256, BLOB_BYTES, [model_id("org/model", "0" * 40)])
    started_s = time.perf_counter()
    with source.open("rb", buffering=0) as f, (disk.layout.partial(sha256) / "data").open("r+b", buffering=0) as to:
        while chunk := f.read(CHUNK_BYTES):
            to.write(chunk)
    commit_blob(disk, sha256, verify_partial(disk, sha256, BLOB_BYTES))
    took_s = time.perf_counter() - started_s
    shutil.rmtree(root)
    return took_s


def with_cp(target: Path, source: Path, sha256: str, fast_hash: bool = False) -> float:
    """Return the seconds to do the same with the system's own tools."""
    started_s = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    subprocess.run(["sync", target], check=True)
    if fast_hash:
        with target.open("rb") as f:
            printed = hashlib.file_digest(f, "sha256").hexdigest()
    else:
        printed = subprocess.run(["sha256sum", target], check=True, stdout=subprocess.PIPE, text=True).stdout
    took_s = time.perf_counter() - started_s
    if not printed.startswith(sha256):
        raise SystemExit(f"sha256sum says {printed}, not {sha256}")
    target.unlink()
    return took_s


def commit_figures(directory: Path) -> dict[str, Figure]:
    """Commit and delete a blob, compared with `cp`."""
    source = directory / "source"
    with source.open("wb") as f:
        for _ in range(BLOB_BYTES // CHUNK_BYTES):
            f.write(os.urandom(CHUNK_BYTES))
        f.flush()
        os.fsync(f.fileno())
    sha256 = subprocess.run(["sha256sum", source], check=True, stdout=subprocess.PIPE, text=True).stdout.split()[0]
    contenders: dict[str, Callable[[], float]] = {
        "store": partial(in_store, directory / "one", source, sha256),
        "cp": partial(with_cp, directory / "copy", source, sha256),
        "cp_fast_hash": partial(with_cp, directory / "copy", source, sha256, fast_hash=True),
    }
    for contender in contenders.values():
        contender()  # the file system's first growth is not counted
    took_s = interleaved(contenders, ROUNDS)
    source.unlink()
    return {
        "commit_vs_cp": figure(took_s["cp"] / took_s["store"], "x", ">= 1.0"),
        "commit_vs_cp_fast_hash": figure(took_s["cp_fast_hash"] / took_s["store"], "x"),
        "commit_mb_per_s": figure(BLOB_BYTES / took_s["store"] / 1e6, "MB/s"),
        "cp_mb_per_s": figure(BLOB_BYTES / took_s["cp"] / 1e6, "MB/s"),
    }


def model(number: int) -> Manifest:
    """Return a model of a store with many."""
    own = BLOBS_PER_MODEL - 2
    blobs = [SHARED_BLOBS + number * own + n for n in range(own)] + [number, (number * 7 + 1) % SHARED_BLOBS]
    return Manifest(
        repo=f"org/model-{number}",
        commit=f"{number:040x}",
        revisions=["main"],
        files=[ManifestFile(path=f"file-{n}", size_bytes=b % 4096, sha256=blob_name(b)) for n, b in enumerate(blobs)],
    )


def blob_name(number: int) -> str:
    """Return a blob's name, spread over the directories like real ones."""
    return f"{number * 2654435761 % 2**32:08x}" + f"{number:056x}"


def build_store(root: Path) -> None:
    """Create 10,000 stamped blobs, their leaf lists, manifests and views; contents do not matter here."""
    disk, paths = Store(root), StorePaths(root)
    disk.open()
    for number in range(MODELS):
        manifest = model(number)
        for name, size in manifest.blob_sizes.items():
            path = paths.blob(name)
            path.parent.mkdir(exist_ok=True)
            path.touch(mode=0o644)
            os.truncate(path, size)
            path.chmod(0o444)
            write_stamp(name, path)
            paths.leaf_list(name).parent.mkdir(exist_ok=True)
            paths.leaf_list(name).write_bytes(bytes(2 * HASH_BYTES))
        build_view(paths, manifest)
        path = paths.manifest(manifest.model)
        path.parent.mkdir()
        path.write_bytes(encode(manifest))


def scan_s(root: Path) -> float:
    """Return the seconds until storage has read its disk at startup."""
    disk = Store(root)
    disk.open()
    started_s = time.perf_counter()
    ledger = recover_store(disk)
    took_s = time.perf_counter() - started_s
    if (len(ledger.blobs), len(ledger.manifests)) != (10_000, MODELS):
        raise SystemExit(f"the scan found {len(ledger.blobs)} blobs and {len(ledger.manifests)} models")
    return took_s


def full_ledger() -> Ledger:
    """Return the ledger of such a store, with 20 running downloads of 8 blobs each."""
    ledger = Ledger()
    for number in range(MODELS):
        manifest = model(number)
        for name, size in manifest.blob_sizes.items():
            ledger.add_blob(name, size)
        ledger.seal(manifest)
    for number in range(20):
        manifest = arriving(number)
        ledger.arrivals.reserve(manifest.model, manifest.blob_sizes)
        for name, size in manifest.blob_sizes.items():
            ledger.arrivals.reserve_blob(name, size, manifest.model)
    return ledger


def arriving(number: int) -> Manifest:
    """Return a model that is not in the store: 8 blobs of its own, 2 that are present."""
    files = [
        ManifestFile(path=f"file-{n}", size_bytes=1000 + n, sha256=blob_name(10_000_000 + number * 8 + n))
        for n in range(8)
    ] + list(model(number).files[:2])
    files = [ManifestFile(path=f"file-{n}", size_bytes=f.size_bytes, sha256=f.sha256) for n, f in enumerate(files)]
    return Manifest(repo=f"org/new-{number}", commit=f"{number:040x}", revisions=["main"], files=files)


def admissions_per_s() -> float:
    """Return the admissions per second, each for another model, none of them carried out."""
    ledger, manifests = full_ledger(), [arriving(20 + n) for n in range(100)]
    started_s = time.perf_counter()
    for n in range(ADMISSIONS):
        if len(admit(manifests[n % len(manifests)], ledger, UNLIMITED, 1 << 40).missing) != 8:
            raise SystemExit("an admission returned a wrong result")
    return ADMISSIONS / (time.perf_counter() - started_s)


def plan_s() -> float:
    """Return the seconds to plan how to free half of a store of 1,000 models, a tenth of them pinned."""
    ledger = full_ledger()
    last_uses = {name: float(number * 7919 % MODELS) for number, name in enumerate(ledger.manifests)}
    protected = dict.fromkeys(list(ledger.manifests)[::10], "pinned")
    need_bytes = ledger.used_bytes // 2
    started_s = time.perf_counter()
    eviction = plan_eviction(need_bytes, ledger, last_uses, protected)
    took_s = time.perf_counter() - started_s
    if not eviction.enough or eviction.freed_bytes < need_bytes:
        raise SystemExit("the plan does not free enough")
    return took_s


async def reserve_ms(directory: Path) -> float:
    """Return the median milliseconds of a reservation over NATS in a storage with 10,000 blobs."""
    samples = []
    with NatsServer(directory / "nats") as server:
        async with on_node(server, directory, "bench") as node:
            await asyncio.to_thread(build_store, node.layout.root)
            async with node.storage():
                for number in range(RESERVES):
                    manifest = arriving(number)
                    started_s = time.perf_counter()
                    await node.reserve(manifest)
                    samples.append(time.perf_counter() - started_s)
                    await node.release(manifest)
    return statistics.median(samples) * 1000


def main() -> None:
    """Measure and report."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        figures = commit_figures(directory)
        build_store(directory / "many")
        scans = interleaved({"scan": partial(scan_s, directory / "many")}, ROUNDS)
        figures["scan_10k_s"] = figure(scans["scan"], "s", "<= 2")
        rate = interleaved({"admit": admissions_per_s}, ROUNDS)["admit"]
        figures["admissions_per_s"] = figure(rate, "/s", ">= 2000")
        figures["reserve_ms"] = figure(asyncio.run(reserve_ms(directory)), "ms")
        plans = interleaved({"plan": plan_s}, PLANS)
        figures["plan_1000_ms"] = figure(plans["plan"] * 1000, "ms", "<= 20")
    report(figures)


if __name__ == "__main__":
    main()
