"""An instance's nodes fetch only the leaves of their own layers, and answer like one process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load, stream_generate

from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.store_paths import StorePaths
from shoal_demo.hub_server import RunningHub, running_hub
from tests.harness.shoal import ShoalCluster, eventually
from tests.inference.tiny_models import write_files, write_model

ONE, SEVERAL = "org/one-file", "org/several-files"
PROMPT = "the shoal turns"
TOKENS = 12
_WIDTH = 640
"""Width of hidden states: some 90 MB of weights, so that leaves are small compared with the model."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's models."""
    root = tmp_path_factory.mktemp("models")
    write_files(write_model(root / ONE, "llama", width=_WIDTH), 1)
    write_files(write_model(root / SEVERAL, "llama-tied", width=_WIDTH), 3)
    return root


@pytest.fixture(scope="module")
def sparse_hub(models: Path) -> Iterator[RunningHub]:
    """A hub with these models."""
    with running_hub(models, process=True) as running:
        yield running


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, sparse_hub: RunningHub) -> Iterator[ShoalCluster]:
    """A cluster of three nodes."""
    with ShoalCluster(tmp_path_factory.mktemp("three"), sparse_hub.base_url) as running:
        yield running


@pytest.fixture
def three(running: ShoalCluster, sparse_hub: RunningHub) -> Iterator[ShoalCluster]:
    """The nodes: c has both models complete, a and b have nothing. The hub's counters are at zero."""
    for model in (ONE, SEVERAL):
        running["c"].shoal("pull", model, check=True)
    sparse_hub.reset_stats()
    yield running
    for instance in running["c"].call("GET", "/v1/instances")["instances"]:
        running["c"].call("DELETE", f"/v1/instances/{instance['id']}")
    for model in (ONE, SEVERAL):
        for node in "ab":
            running["c"].call("DELETE", f"/v1/models/{model}?node={node}")
    for node in "ab":
        store = StorePaths(running[node].home / "store")
        left = [*store.partials.iterdir(), *store.blobs.glob("*/*"), *store.root.glob("parts/*")]
        assert left == [], f"{node} keeps something of models that were deleted"


def expected(models: Path, model: str) -> str:
    """Return what mlx_lm answers in one process, greedily."""
    loaded, tokenizer = load(str(models / model))[:2]
    messages = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)  # type: ignore[no-untyped-call]  # mlx_lm
    text = "".join(r.text for r in stream_generate(loaded, tokenizer, prompt, max_tokens=TOKENS))
    mx.clear_cache()
    return text


def place(cluster: ShoalCluster, model: str) -> str:
    """Place an instance over a and b, and wait until it is ready."""
    body = {"model": model, "min_nodes": 2, "max_nodes": 2, "nodes": ["a", "b"], "context_tokens": 256, "wait": True}
    return str(cluster["c"].call("POST", "/v1/instances", body)["id"])


def answer(cluster: ShoalCluster, instance: str) -> str:
    body = {
        "model": instance,
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_tokens": TOKENS,
    }
    answered = cluster["c"].call("POST", "/v1/chat/completions", body)
    return str(answered["choices"][0]["message"]["content"])


def bytes_of(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.iterdir())


def fetched(cluster: ShoalCluster, *nodes: str) -> int:
    """Return the bytes that nodes have received for their downloads, from the hub and from each other."""
    downloads = cluster["c"].call("GET", "/v1/downloads")["downloads"]
    return sum(sum(d["sources"].values()) for d in downloads if d["node"] in nodes)


def ask(cluster: ShoalCluster, subject: str, **body: Any) -> dict[str, Any]:
    """Send a command that must succeed by `nats req`, and return its result."""

    async def request() -> dict[str, Any]:
        async with cluster["a"].operator() as nats:
            reply = await nats.client.request(f"shoal.v1.cmd.{subject}", json.dumps(body).encode(), timeout=60)
        return dict(json.loads(reply.data))

    outcome = asyncio.run(request())
    assert outcome["ok"], outcome
    return dict(outcome["result"])


def published_shards(cluster: ShoalCluster) -> dict[str, dict[str, Any]]:
    """Return the published shards, by node."""
    return {p["node"]: p for p in cluster["c"].call("GET", "/v1/status")["shards"]}


@pytest.mark.parametrize("model", [ONE, SEVERAL])
def test_I11_two_nodes_with_only_their_layers_equal_one_process(
    three: ShoalCluster, sparse_hub: RunningHub, models: Path, model: str
) -> None:
    instance = place(three, model)
    assert answer(three, instance) == expected(models, model)
    both, whole = fetched(three, "a", "b") + sparse_hub.stats().bytes, bytes_of(models / model)
    assert both <= 1.10 * whole
    published = published_shards(three)
    assert sorted(layer for part in published.values() for layer in part["layers"]) == [[0, 3], [3, 6]]
    assert sum(p["size_bytes"] for p in published.values()) <= 1.10 * whole
    line = f"a: layers {published['a']['layers'][0][0]}-{published['a']['layers'][0][1] - 1} of {model}"
    for command in ("status", "storage"):
        assert line in three["a"].shoal(command, check=True).stdout
    assert three["a"].call("GET", "/v1/status")["models"][0]["nodes"] == ["c"], "a part is not the model"


def test_a_pull_completes_a_shard_and_refetches_nothing(
    three: ShoalCluster, sparse_hub: RunningHub, models: Path
) -> None:
    instance = place(three, SEVERAL)
    refused = three["a"].shoal("rm", SEVERAL, "--node", "a")
    assert refused.returncode == 4 and f"of instance {instance} (pid " in refused.stderr
    old = three["a"].kill("storage")
    three["a"].wait_reborn("storage", old)
    eventually(lambda: "a" in published_shards(three), "the part is told of again")
    assert three["a"].shoal("gc", check=True).stdout.strip() == "a: nothing to delete"
    here_bytes, before = published_shards(three)["a"]["size_bytes"], fetched(three, "a")
    three["a"].shoal("pull", SEVERAL, check=True)
    came, lacking = fetched(three, "a") - before, bytes_of(models / SEVERAL) - here_bytes
    # Late leaves are requested from two nodes; leaves that are here from none.
    assert lacking <= came <= min(lacking + 4 * LEAF_BYTES, bytes_of(models / SEVERAL) - LEAF_BYTES)
    assert sparse_hub.stats().bytes == 0
    assert "a" not in published_shards(three)
    view = next((three["a"].home / "store" / "views").glob("*/*"))
    for file in (models / SEVERAL).iterdir():
        assert (view / file.name).read_bytes() == file.read_bytes()
    assert answer(three, instance) == expected(models, SEVERAL), "what had loaded from the part goes on"


def test_the_layers_of_two_stages_on_one_node_are_fetched_once(three: ShoalCluster, models: Path) -> None:
    first = ask(three, "fetcher.a.download", model=ONE, layers=[0, 4])
    again = ask(three, "fetcher.a.download", model=ONE, layers=[1, 3])
    both = ask(three, "fetcher.a.download", model=ONE, layers=[3, 6])
    assert again.get("sources", {}) == {}, "the layers are here"
    assert published_shards(three)["a"]["layers"] == [[0, 6]]
    whole = bytes_of(models / ONE)
    assert whole / 2 < sum(first["sources"].values()) < whole
    # Late leaves are requested from two nodes.
    assert sum(first["sources"].values()) + sum(both["sources"].values()) <= whole + 4 * LEAF_BYTES


@pytest.mark.parametrize("service", ["fetcher", "storage", "fileserver", "inference"])
def test_I6_kills_while_shards_arrive_do_not_stop_the_instance(
    three: ShoalCluster, models: Path, service: str
) -> None:
    body = {"model": ONE, "min_nodes": 2, "max_nodes": 2, "nodes": ["a", "b"], "context_tokens": 256, "wait": False}
    instance = str(three["c"].call("POST", "/v1/instances", body)["id"])
    eventually(lambda: fetched(three, "a") or "a" in published_shards(three), "a has begun")
    victim = three["c" if service == "fileserver" else "a"]
    victim.wait_reborn(service, victim.kill(service))

    def ready() -> bool:
        return str(three["c"].call("GET", f"/v1/instances/{instance}")["phase"]) == "ready"

    eventually(ready, "the instance is ready", 120.0)
    assert answer(three, instance) == expected(models, ONE)


def test_I9_without_a_sealed_list_the_full_model_comes_just_once(
    three: ShoalCluster, sparse_hub: RunningHub, models: Path
) -> None:
    three["c"].call("DELETE", f"/v1/models/{ONE}?node=c")
    state = ask(three, "fetcher.a.download", model=ONE, layers=[0, 3])
    assert state["phase"] == "ready" and "layers" not in state
    assert "a" not in published_shards(three)
    sent = sum(f.bytes for name, f in sparse_hub.stats().files.items() if name.startswith(f"{ONE}/"))
    assert sent == bytes_of(models / ONE)
