"""Nodes with too little of something: they refuse in one line with the figures, and keep nothing."""

from __future__ import annotations

import socket
from pathlib import Path

from shoal_demo import DEMO_MODEL, MODELS_DIR
from shoal_demo.hub_server import RunningHub, running_hub
from tests.harness.shoal import ShoalCluster


def test_I3_a_model_beyond_the_quota_is_rejected_with_figures(tmp_path: Path, hub: RunningHub) -> None:
    with ShoalCluster(tmp_path, hub.base_url, names=("a",), SHOAL_MAX_STORAGE_BYTES="2000000") as cluster:
        result = cluster["a"].shoal("pull", DEMO_MODEL)
        assert result.returncode == 4
        assert "quota of 2.0 MB" in result.stderr
        body = {"model": DEMO_MODEL, "wait": True}
        response = cluster["a"].client.post(cluster["a"].url + "/v1/downloads", json=body)
        assert response.status_code == 507
        assert response.json()["error"]["details"]["quota_bytes"] == 2_000_000
        storage = cluster["a"].call("GET", "/v1/status")["nodes"][0]["storage"]
        assert (storage["used_bytes"], storage["reserved_bytes"]) == (0, 0)
        assert not list((tmp_path / "a" / "store" / "partial").iterdir())


def test_too_little_memory_is_refused_with_every_nodes_figures(tmp_path: Path, hub: RunningHub) -> None:
    with ShoalCluster(tmp_path, hub.base_url, names=("a",), SHOAL_MAX_MEMORY_BYTES="1000000") as cluster:
        cluster["a"].shoal("pull", DEMO_MODEL, check=True)
        result = cluster["a"].shoal("place", DEMO_MODEL)
        assert result.returncode == 4
        assert len(result.stderr.strip().splitlines()) == 1
        response = cluster["a"].client.post(cluster["a"].url + "/v1/instances", json={"model": DEMO_MODEL})
        assert response.status_code == 507
        assert response.json()["error"]["code"] == "no_room"
        assert "a" in str(response.json()["error"]["details"])


def test_an_unreachable_hub_and_a_missing_token_are_distinct(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with ShoalCluster(tmp_path / "one", nobody, names=("a",)) as cluster:
        result = cluster["a"].shoal("pull", DEMO_MODEL)
        assert (result.returncode, len(result.stderr.strip().splitlines())) == (5, 1), result.stderr
        assert "HF_ENDPOINT" in result.stderr
    with running_hub(MODELS_DIR, token="needed") as closed:
        with ShoalCluster(tmp_path / "two", closed.base_url, names=("a",)) as cluster:
            result = cluster["a"].shoal("pull", DEMO_MODEL)
            assert result.returncode == 6, result.stderr
            assert "HF_TOKEN" in result.stderr
            result = cluster["a"].shoal("pull", DEMO_MODEL, "--node", "a", HF_TOKEN="wrong_one", HF_ENDPOINT=nobody)
            assert "your token was not used: your token is for" in result.stderr and "wrong_one" not in result.stderr
            cluster["a"].shoal("pull", DEMO_MODEL, check=True, HF_TOKEN="needed")
        with ShoalCluster(tmp_path / "three", closed.base_url, names=("a",), HF_TOKEN="needed") as cluster:
            cluster["a"].shoal("pull", DEMO_MODEL, check=True)
