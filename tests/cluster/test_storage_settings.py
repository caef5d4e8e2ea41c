"""A node's disk settings, changed as users do: by `shoal up`, by `shoal storage set`, by REST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.harness.shoal import ShoalCluster, ShoalNode


def disk(node: ShoalNode) -> dict[str, Any]:
    """Return what the gateway says of this node's disk."""
    return next(dict(n["storage"]) for n in node.call("GET", "/v1/storage")["nodes"] if n["node"] == node.node)


def test_settings_hold_at_once_and_after_kills_and_restarts(tmp_path: Path) -> None:
    with ShoalCluster(tmp_path, "http://127.0.0.1:9", names=("a",)) as cluster:
        node = cluster["a"]
        node.shoal("storage", "set", "--max-storage", "200GB", "--eviction-policy", "lru", check=True)
        node.wait_reborn("storage", node.kill("storage"))
        node.call("PUT", "/storage/config", {"headroom_bytes": 5})
        assert (disk(node)["quota_bytes"], disk(node)["eviction_policy"], disk(node)["headroom_bytes"]) == (
            200 * 10**9,
            "lru",
            5,
        )
        assert "200.0 GB, lru" in node.shoal("status", check=True).stdout
        node.down()
        node.up("--nats-port", "0", "--max-storage", "300GB")
        assert (disk(node)["quota_bytes"], disk(node)["eviction_policy"]) == (300 * 10**9, "lru")
        node.shoal("storage", "set", "--max-storage", "none", check=True)
        assert disk(node)["quota_bytes"] is None
        refused = node.shoal("storage", "set", "--headroom", "lots")
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        file = (node.home / "node.toml").read_text()
        assert file.startswith("# This node's name in the cluster.") and "max_storage_bytes" not in file
