"""Nodes, a hub and other programs' downloads for bench/transfer.py."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil

from membership import Cluster
from shoal_common.bus import subjects
from shoal_common.bus.cluster_lease import LeaseValue
from shoal_common.bus.keys import download_key, liveness_key
from shoal_common.messages import decode
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_hash import leaf_hash
from shoal_common.store.verification_stamp import write_stamp
from shoal_demo.hub_server import RunningHub
from tests.harness.nats import Joined, NatsServer
from tests.harness.node import Node, running_nodes
from tests.harness.ports import ReservedPort

QUICK = "--quick" in sys.argv


MIB = 1 << 20


SERVICES = ("storage", "fetcher", "fileserver")


EIGHT = "abcdefgh"


FILE_BYTES = (96 if QUICK else 1024) * MIB


DEADLINE_S = 900.0


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
        self,
        directory: Path,
        cluster: Cluster,
        server: NatsServer,
        hub: RunningHub,
        here: Joined,
        homes: Path | None = None,
    ) -> None:
        self.directory, self.cluster, self.server, self.hub, self.here = directory, cluster, server, hub, here
        self.homes = homes or directory
        self.nodes: dict[str, Node] = {}

    def with_homes(self, homes: Path) -> Site:
        """Return the same with its nodes' homes in another directory."""
        return Site(self.directory, self.cluster, self.server, self.hub, self.here, homes)

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
        made = [self.cluster.node(self.homes / n, n, self.server.url, SERVICES, **given) for n in names]
        await self.cluster.publish(self.here)
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


async def an_origin(site: Site) -> str:
    """Return a node that is reading from the hub."""
    info = await site.here.js.stream_info("KV_lease", subjects_filter="$KV.lease.origin.>")
    for subject in sorted(info.state.subjects or {}):
        lease = await site.here.buckets.lease.get_as(subject.removeprefix("$KV.lease."), LeaseValue)
        if lease is not None:
            return lease.node
    raise SystemExit("no node is an origin, though the hub is sending")


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
    reserved = ReservedPort()
    port = reserved.number
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


def resident_bytes(site: Site, node: str) -> int:
    """Return the resident memory of a node's services."""
    return sum(psutil.Process(site.nodes[node][s].pid).memory_info().rss for s in SERVICES)


def flip(blobs: list[Path]) -> None:
    """Flip a bit of every leaf of these files, whose stamps stay valid; or flip it back."""
    for path in blobs:
        with path.open("r+b", buffering=0) as f:
            for at in range(LEAF_BYTES // 2, path.stat().st_size, LEAF_BYTES):
                byte = os.pread(f.fileno(), 1, at)
                os.pwrite(f.fileno(), bytes([byte[0] ^ 1]), at)
        write_stamp(path.name, path)
