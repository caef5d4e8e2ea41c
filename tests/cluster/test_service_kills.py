"""kill -9 of each service, and of NATS, during a pull and after it (I6)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal_common.names import SERVICES
from shoal_demo import DEMO_MODEL, MODELS_DIR
from shoal_demo.faults import Faults
from shoal_demo.hub_server import RunningHub
from tests.harness.shoal import ShoalCluster, ShoalNode, eventually

_SLOW_BYTES_PER_S = 700_000
_LEAF_BYTES = 1 << 20
_STATUS_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, hub: RunningHub) -> Iterator[ShoalCluster]:
    """Two nodes."""
    with ShoalCluster(tmp_path_factory.mktemp("pair"), hub.base_url, names=("a", "b")) as running:
        yield running


def begin_slow_pull(node: ShoalNode, hub: RunningHub) -> set[str]:
    """Start a pull and return its complete blobs once there are some, with others under way."""
    node.call("DELETE", f"/v1/models/{DEMO_MODEL}")
    hub.reset_stats()
    hub.set_faults(Faults(bytes_per_s=_SLOW_BYTES_PER_S))
    node.call("POST", "/v1/downloads", {"model": DEMO_MODEL})

    def under_way() -> set[str] | None:
        download = node.download(DEMO_MODEL)
        whole = {p.name for p in (node.home / "store" / "blobs").glob("*/*/*")}
        return whole if download and download["phase"] == "fetching" and len(whole) >= 3 else None

    return eventually(under_way, "a pull is under way")


def check_pulled(node: ShoalNode, hub: RunningHub, whole: set[str]) -> None:
    """Wait until the model is ready, and check that its bytes are right and no complete blob was fetched again."""

    def ready() -> bool:
        download = node.download(DEMO_MODEL)
        assert download is None or download["phase"] not in ("failed", "rejected"), download
        return download is not None and download["phase"] == "ready"

    eventually(ready, "the pull completes")
    source = MODELS_DIR / DEMO_MODEL
    views = list((node.home / "store" / "views").glob("*/*"))
    assert len(views) == 1
    files = hub.stats().files
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        name = str(file.relative_to(source))
        assert (views[0] / name).read_bytes() == file.read_bytes(), name
        fetched, size = files[f"{DEMO_MODEL}/{name}"].bytes, file.stat().st_size
        if (views[0] / name).stat().st_size and _sha256(views[0] / name) in whole:
            assert fetched == size, f"{name} was whole and was fetched again"
        else:
            # What was in flight may be fetched again from the last durable leaf, never from the start.
            assert fetched <= 2 * size, name


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("service", SERVICES)
def test_I6_a_pull_completes_though_a_service_is_killed_midway(
    pair: ShoalCluster, quiet_hub: RunningHub, service: str
) -> None:
    node = pair["a"]
    whole = begin_slow_pull(node, quiet_hub)
    old = node.kill(service)
    node.wait_reborn(service, old)
    check_pulled(node, quiet_hub, whole)


def test_I6_services_killed_after_a_pull_return_without_fetching(pair: ShoalCluster, quiet_hub: RunningHub) -> None:
    node = pair["a"]
    node.shoal("pull", DEMO_MODEL, check=True)
    quiet_hub.reset_stats()
    old = {service: node.kill(service) for service in SERVICES}
    for service, pid in old.items():
        node.wait_reborn(service, pid)
    node.shoal("pull", DEMO_MODEL, check=True)
    assert quiet_hub.stats().bytes == 0
    result = node.shoal("run", DEMO_MODEL, "What is Shoal?", "--temperature", "0", check=True)
    assert result.stdout.strip()
    for instance in node.call("GET", "/v1/instances")["instances"]:
        node.shoal("stop", instance["id"], check=True)


def test_nats_killed_during_a_pull_stops_nobody(pair: ShoalCluster, quiet_hub: RunningHub) -> None:
    node = pair["a"]
    whole = begin_slow_pull(node, quiet_hub)
    pids = {service: (node.child(service).pid, pair["b"].child(service).pid) for service in SERVICES}
    node.kill("nats")

    def right() -> bool:
        status = node.status()
        if status is None:
            return False
        nodes = {n["node"]: n for n in status["nodes"]}
        complete = all(nodes.get(name, {}).get("live") and not nodes[name]["missing_services"] for name in "ab")
        return complete and any(d["model"] == DEMO_MODEL for d in status["downloads"])

    eventually(right, "status is right after a restart of NATS", _STATUS_WITHIN_S)
    check_pulled(node, quiet_hub, whole)
    after = {service: (node.child(service).pid, pair["b"].child(service).pid) for service in SERVICES}
    assert after == pids, "a service was restarted although only NATS was"
