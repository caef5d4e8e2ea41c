"""Possible layouts are shown before anything is placed, and each can be chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal_demo import DEMO_MODEL
from shoal_demo.hub_server import RunningHub
from tests.harness.shoal import ShoalCluster, ShoalNode, eventually


def test_a_layout_that_a_preview_showed_is_placed_and_answers(cluster: ShoalCluster) -> None:
    node = cluster["a"]
    node.shoal("pull", DEMO_MODEL, check=True)
    before = node.call("GET", "/v1/instances")["instances"]
    shown = json.loads(node.shoal("place", DEMO_MODEL, "--preview", "--json", check=True).stdout)
    assert node.call("GET", "/v1/instances")["instances"] == before
    counts = [len(p["stages"]) for p in shown["previews"]]
    assert sorted(counts) == list(range(1, 1 + max(counts))) and counts[0] == 1
    over_two = next(p for p in shown["previews"] if len(p["stages"]) == 2)
    assert over_two["tier"] == "fits" and over_two["tokens_per_s"] > 0 and over_two["first_token_s"] > 0
    assert all(s["link_s"] > 0 for s in over_two["stages"])

    def measured() -> bool:
        found = node.call("GET", f"/v1/placements/preview?model={DEMO_MODEL}")["previews"]
        return all(s["link_measured"] for p in found for s in p["stages"] if s["link_s"])

    eventually(measured, "the nodes have measured the links between them, which was asked for by looking")

    def shown_alike() -> Any:
        # Again: measured links may have made another layout the best one over two nodes, and may do so once more.
        previews = json.loads(node.shoal("place", DEMO_MODEL, "--preview", "--json", check=True).stdout)
        found = next(p for p in previews["previews"] if len(p["stages"]) == 2)
        table = node.shoal("place", DEMO_MODEL, "--preview", check=True).stdout
        return (previews, found) if found["layout"] in table and "fits" in table else None

    shown, over_two = eventually(shown_alike, "the table shows what --json shows")

    (fit,) = json.loads(node.shoal("models", "--fits", "--json", check=True).stdout)["models"]
    assert fit["tier"] == "fits" and fit["preview"]["layout"] == shown["previews"][0]["layout"]
    assert DEMO_MODEL in node.shoal("ls", "--fits", check=True).stdout

    placed = json.loads(node.shoal("place", DEMO_MODEL, "--layout", over_two["layout"], "--json", check=True).stdout)
    try:
        wanted = [(s["node"], s["first_layer"], s["last_layer"]) for s in over_two["stages"]]
        assert [(s["node"], s["first_layer"], s["last_layer"]) for s in placed["stages"]] == wanted
        migrates_only_on_request(node, placed["id"], over_two["layout"], shown["previews"][0]["layout"])
    finally:
        node.shoal("stop", placed["id"], check=True)


def migrates_only_on_request(node: ShoalNode, instance: str, here: str, better: str) -> None:
    """An instance over two nodes that would be faster on one: the move is proposed, and made when a person asks."""
    (proposed,) = json.loads(node.shoal("rebalance", "--json", check=True).stdout)["rebalances"]
    assert proposed["instance"] == instance and proposed["gain"] > 1.1
    assert (proposed["current"]["layout"], proposed["proposed"]["layout"]) == (here, better)
    table = node.shoal("rebalance", check=True).stdout
    assert instance in table and better in table
    assert len(node.call("GET", f"/v1/instances/{instance}")["nodes"]) == 2

    moved = node.shoal("rebalance", instance, "--layout", better, check=True).stdout
    (where,) = node.call("GET", f"/v1/instances/{instance}")["nodes"]
    assert better.startswith(f"{where}:") and f"ready on {where}" in moved
    question = {"role": "user", "content": "Why do fish swim in shoals?"}
    answer = node.call("POST", "/v1/chat/completions", {"model": DEMO_MODEL, "max_tokens": 4, "messages": [question]})
    assert answer["choices"][0]["message"]["content"]
    assert "stays on" in node.shoal("rebalance", instance, check=True).stdout
    assert "no better placement" in node.shoal("rebalance", check=True).stdout
    refused = node.shoal("rebalance", "tiny-fish-ffffff")
    assert refused.returncode == 3 and "no instance named tiny-fish-ffffff" in refused.stderr


def test_a_preview_that_cannot_be_made_names_what_can(cluster: ShoalCluster) -> None:
    node = cluster["a"]
    for query, expected in {
        "": "the parameter model is missing",
        "?model=org/x&nodez=a": "known: model",
        f"?model={DEMO_MODEL}&min_nodes=two": "int",
        f"?model={DEMO_MODEL}&objective=speed": "speed",
        f"?model={DEMO_MODEL}&nodes=../a": "../a",
    }.items():
        response = node.client.get(f"{node.url}/v1/placements/preview{query}")
        assert response.status_code == 400, (query, response.text)
        assert expected in response.json()["error"]["message"], (query, response.text)
    assert node.client.get(f"{node.url}/v1/placements/preview?model=org/nowhere").status_code == 404


def test_a_preview_of_an_unpulled_model_fetches_no_weights(tmp_path: Path, hub: RunningHub) -> None:
    with ShoalCluster(tmp_path, hub.base_url, names=("a",)) as fresh:
        hub.reset_stats()
        shown = json.loads(fresh["a"].shoal("place", DEMO_MODEL, "--preview", "--json", check=True).stdout)
        (only,) = shown["previews"]
        weights = {name: f for name, f in hub.stats().files.items() if name.endswith(".safetensors")}
        assert only["tier"] == "fits" and only["fetch_bytes"] > 0
        assert 0 < sum(f.bytes for f in weights.values()) < only["fetch_bytes"] / 10
        refused = fresh["a"].shoal("place", DEMO_MODEL)
        assert refused.returncode == 3 and f"shoal pull {DEMO_MODEL}" in refused.stderr
        none = fresh["a"].shoal("place", "org/nowhere", "--preview")
        assert none.returncode == 3, none.stderr
