"""An existing Hugging Face cache offered to the cluster as a library: whole nodes, as users see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from shoal_demo import DEMO_MODEL
from shoal_demo.hub_server import RunningHub, running_hub
from tests.harness.shoal import ShoalCluster, ShoalNode, eventually
from tests.storage.library_fixtures import mounted_read_only, snapshot_tree


def disk(node: ShoalNode) -> dict[str, Any]:
    """Return what the gateway says of this node's disk."""
    return next(dict(n["storage"]) for n in node.call("GET", "/v1/storage")["nodes"] if n["node"] == node.node)


def held(node: ShoalNode) -> dict[str, Any]:
    """Return what the status says of the demo model; nothing while no node has it."""
    return next((dict(m) for m in node.call("GET", "/v1/status")["models"] if m["repo"] == DEMO_MODEL), {})


def content_bytes(hub: RunningHub) -> int:
    """Return the bytes of files that the hub has sent."""
    return sum(f.bytes for f in hub.stats().files.values())


def test_I9_a_hub_cache_is_a_library_served_and_never_written(
    tmp_path: Path,
) -> None:
    cache = tmp_path / "hub"
    with running_hub(process=True) as hub:
        snapshot = Path(snapshot_download(DEMO_MODEL, endpoint=hub.base_url, cache_dir=cache, token=False))
        before = snapshot_tree(cache)
        hub.reset_stats()
        with mounted_read_only(cache) as root, ShoalCluster(tmp_path, hub.base_url, names=("a", "b")) as cluster:
            a, b = cluster["a"], cluster["b"]
            a.shoal("storage", "set", "--add-library", str(root), check=True)
            model = eventually(lambda: held(a), "the cache's model is offered")
            assert model["commit"] == snapshot.name
            assert model["library_directory"] == {"a": str(root / snapshot.relative_to(cache))}
            assert f"{DEMO_MODEL} on a is in {root}" in a.shoal("ls", check=True).stdout
            assert f"library {root}: 1 model" in a.shoal("storage", check=True).stdout
            assert disk(a).get("used_bytes", 0) == 0

            b.shoal("pull", DEMO_MODEL, check=True, timeout_s=120)
            assert sorted(held(b)["nodes"]) == ["a", "b"] and list(held(b)["library_directory"]) == ["a"]
            a.shoal("pull", DEMO_MODEL, check=True, timeout_s=120)
            assert content_bytes(hub) == 0, "what the cluster has does not cross the internet again"

            placed = a.call("POST", "/v1/instances", {"model": DEMO_MODEL, "nodes": ["a"], "wait": True})
            assert placed["phase"] == "ready"
            asked = {"model": DEMO_MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            assert a.call("POST", "/v1/chat/completions", asked)["usage"]["completion_tokens"] >= 1
            a.shoal("stop", placed["id"], check=True)

            for arguments, code in (
                (("rm", DEMO_MODEL, "--node", "a"), 4),
                (("gc",), 0),
                (("verify",), 0),
                (("storage", "plan", "--need", "1GB"), 0),
            ):
                ended = a.shoal(*arguments)
                assert ended.returncode == code, (arguments, ended.stderr)
            a.wait_reborn("storage", a.kill("storage"))
            assert eventually(lambda: held(a).get("library_directory"), "offered after a kill too")
            a.shoal("storage", "set", "--remove-library", str(root), check=True)
            assert held(a)["nodes"] == ["b"]
            a.down()
            a.up("--nats-port", "0", "--add-library", str(root))
            assert eventually(lambda: "a" in held(a).get("nodes", []), "offered by a flag of `shoal up`")
        assert content_bytes(hub) == 0
    assert snapshot_tree(cache) == before


@pytest.mark.parametrize("root", ["relative/../..", "/"])
def test_a_path_that_cannot_be_a_library_is_refused_in_a_line(tmp_path: Path, root: str) -> None:
    with ShoalCluster(tmp_path, "http://127.0.0.1:9", names=("a",)) as cluster:
        refused = cluster["a"].shoal("storage", "set", "--add-library", root)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
