"""`shoal repair` on a whole node, and the same by REST: only what is corrupt is fetched again."""

from __future__ import annotations

from pathlib import Path

from shoal_common.messages import decode
from shoal_common.messages.manifest import Manifest
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.store_paths import StorePaths
from shoal_demo.hub_server import running_hub
from tests.fetcher.hub_repos import make_model, noise
from tests.harness.shoal import ShoalCluster
from tests.storage.service.test_verifier import flip

MODEL = "org/fish"
FILES = {"model.safetensors": noise(5 * LEAF_BYTES + 99, MODEL), "config.json": b"{}"}


def test_I1_repair_restores_two_corrupt_leaves_and_reports_them(tmp_path: Path) -> None:
    make_model(tmp_path / "models", MODEL, FILES)
    with (
        running_hub(tmp_path / "models", process=True) as hub,
        ShoalCluster(tmp_path / "nodes", hub.base_url, names=("a",)) as cluster,
    ):
        node, layout = cluster["a"], StorePaths(tmp_path / "nodes" / "a" / "store")
        node.shoal("pull", MODEL, check=True)
        (path,) = layout.manifests.glob("*/*.json")
        manifest = decode(path.read_bytes(), Manifest)
        blob = layout.blob(next(f.sha256 for f in manifest.files if f.path == "model.safetensors"))

        def rot() -> None:
            for offset in (0, 5 * LEAF_BYTES + 98):
                flip(blob, offset)
            hub.reset_stats()

        rot()
        lines = node.shoal("repair", check=True).stdout.splitlines()
        assert "a: verified 2 blobs, 5.2 MB: 1 corrupt and in quarantine (2 corrupt leaves)" in lines
        assert lines[-2:] == [
            "a: 2 corrupt leaves in 1 blob; fetched 1.0 MB",
            f"  {manifest.model} is complete again",
        ]
        assert hub.stats().bytes == LEAF_BYTES + 99
        assert blob.read_bytes() == FILES["model.safetensors"]
        assert node.shoal("repair", MODEL, check=True).stdout.splitlines()[-1] == "a: nothing to repair"
        assert node.shoal("verify", "--node", "a").returncode == 0

        rot()
        found = node.call("POST", "/v1/storage/verify", {"node": "a"})["nodes"]["a"]
        assert (found["bad_leaves"], found["incomplete"]) == (2, [manifest.model])
        for model in found["incomplete"]:
            node.call("POST", "/v1/downloads", {"model": model, "nodes": ["a"], "wait": True})
        assert hub.stats().bytes == LEAF_BYTES + 99
        ((held,),) = [[m for m in node.call("GET", "/v1/status")["models"] if m["model"] == manifest.model]]
        assert held["nodes"] == ["a"]
        assert "main" in decode(path.read_bytes(), Manifest).revisions, "people still find it under its name"
        assert blob.read_bytes() == FILES["model.safetensors"]
