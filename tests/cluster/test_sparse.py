"""Only what a node needs: an instance's nodes fetch the leaves of their own layers, and answer as one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load, stream_generate
from safetensors.numpy import load_file, save_file

from shoal_demo.running import RunningHub, running_hub
from tests.harness.shoal import ShoalCluster
from tests.inference.tiny_models import write_model

ONE, SEVERAL = "org/one-file", "org/several-files"
PROMPT = "the shoal turns"
TOKENS = 12
_WIDTH = 640
"""Of hidden states: some 90 MB of weights, so that leaves are small against the model."""


def rewrite(directory: Path, files: int) -> None:
    """Write the tensors in the order of their names, as the hub's models have them, into one file or several."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number in range(files):
        path = f"model-{number + 1:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
        own = {n: weights[n] for n in names[number * len(names) // files : (number + 1) * len(names) // files]}
        save_file(own, directory / path, {"format": "mlx"})
        weight_map |= dict.fromkeys(own, path)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub has."""
    root = tmp_path_factory.mktemp("models")
    rewrite(write_model(root / ONE, "llama", width=_WIDTH), 1)
    rewrite(write_model(root / SEVERAL, "llama-tied", width=_WIDTH), 3)
    return root


@pytest.fixture(scope="module")
def sparse_hub(models: Path) -> Iterator[RunningHub]:
    """A hub with those models."""
    with running_hub(models, process=True) as running:
        yield running


@pytest.fixture
def three(tmp_path: Path, sparse_hub: RunningHub) -> Iterator[ShoalCluster]:
    """Three nodes. The hub counts from here."""
    with ShoalCluster(tmp_path, sparse_hub.base_url) as running:
        sparse_hub.reset_stats()
        yield running


def expected(models: Path, model: str) -> str:
    """What mlx_lm answers in one process, greedily."""
    loaded, tokenizer = load(str(models / model))[:2]
    messages = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)  # type: ignore[no-untyped-call]  # mlx_lm
    text = "".join(r.text for r in stream_generate(loaded, tokenizer, prompt, max_tokens=TOKENS))
    mx.clear_cache()
    return text


def place(cluster: ShoalCluster, model: str) -> str:
    """An instance over a and b, ready."""
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
    """Bytes that nodes have received for their downloads, from the hub and from each other."""
    downloads = cluster["c"].call("GET", "/v1/downloads")["downloads"]
    return sum(sum(d["sources"].values()) for d in downloads if d["node"] in nodes)


@pytest.mark.parametrize("model", [ONE, SEVERAL])
def test_I11_two_nodes_that_each_fetch_only_their_layers_answer_as_one_process(
    three: ShoalCluster, sparse_hub: RunningHub, models: Path, model: str
) -> None:
    three["c"].shoal("pull", model, check=True)
    sparse_hub.reset_stats()
    instance = place(three, model)
    assert answer(three, instance) == expected(models, model)
    both, whole = fetched(three, "a", "b") + sparse_hub.stats().bytes, bytes_of(models / model)
    print(both / whole)
    assert both <= 1.10 * whole
