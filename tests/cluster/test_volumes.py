"""A second disk for a full store, as a user sees it: filled, run from, unplugged, plugged in again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal_common.store.store_paths import StorePaths
from shoal_demo import DEMO_MODEL
from shoal_demo.hub_server import running_hub
from tests.harness.shoal import ShoalCluster, ShoalNode, eventually
from tests.harness.tiny_filesystem import loop_disk, small_disk

MIB = 1 << 20


def held(node: ShoalNode) -> dict[str, Any]:
    """Return what the status says of the demo model; nothing while no node has it."""
    return next((dict(m) for m in node.call("GET", "/v1/status")["models"] if m["repo"] == DEMO_MODEL), {})


def chat(node: ShoalNode) -> None:
    """Place the model, get an answer, and stop it."""
    placed = node.call("POST", "/v1/instances", {"model": DEMO_MODEL, "nodes": [node.node], "wait": True})
    assert placed["phase"] == "ready"
    asked = {"model": DEMO_MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert node.call("POST", "/v1/chat/completions", asked)["usage"]["completion_tokens"] >= 1
    node.shoal("stop", placed["id"], check=True)


def test_a_pull_to_a_second_volume_runs_and_survives_unmounting(tmp_path: Path) -> None:
    store, big = tmp_path / "a" / "store", tmp_path / "big"
    with (
        running_hub(process=True) as hub,
        small_disk(store, MIB),
        loop_disk(big, 256 * MIB) as second,
        ShoalCluster(tmp_path, hub.base_url, names=("a",), SHOAL_HEADROOM_BYTES="0") as cluster,
    ):
        node, root = cluster["a"], big / "shoal"
        refused = node.shoal("pull", DEMO_MODEL, timeout_s=120)
        assert refused.returncode == 4, refused.stderr
        output = node.shoal("storage", "set", "--add-volume", str(root), check=True).stdout
        assert f"volume {root}" in output
        node.shoal("pull", DEMO_MODEL, check=True, timeout_s=120)
        assert any(p.is_file() for p in StorePaths(root).blobs.rglob("*"))
        assert f"volume {root}: " in node.shoal("storage", check=True).stdout
        chat(node)
        second.unmount()
        eventually(lambda: not held(node), "its model is not offered while the disk is away")
        assert "is not used" in node.shoal("storage", check=True).stdout
        second.mount()
        eventually(lambda: held(node), "its model is offered again")
        hub.reset_stats()
        node.shoal("pull", DEMO_MODEL, check=True, timeout_s=120)
        assert sum(f.bytes for f in hub.stats().files.values()) == 0, "nothing had to come again"
        chat(node)
        node.shoal("storage", "set", "--remove-volume", str(root), check=True)
        assert not held(node)
