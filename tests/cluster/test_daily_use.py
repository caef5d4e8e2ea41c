"""Everyday use of a cluster: pull, list, place, chat, remove; and the errors when something cannot be done."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load, stream_generate

from shoal_common.messages import decode
from shoal_common.messages.liveness import LivenessRecord, NodeFacts
from shoal_demo import DEMO_MODEL, DEMO_PROMPT, MODELS_DIR
from shoal_demo.hub_server import RunningHub
from tests.harness.shoal import ShoalCluster, eventually


@pytest.fixture(scope="module")
def pulled(cluster: ShoalCluster) -> ShoalCluster:
    """Return the cluster with the demo's model on every node."""
    cluster["a"].shoal("pull", DEMO_MODEL, "--all", check=True)
    return cluster


def place(cluster: ShoalCluster, stages: int) -> str:
    body = {"model": DEMO_MODEL, "min_nodes": stages, "max_nodes": stages}
    return str(cluster["a"].call("POST", "/v1/instances", body)["id"])


def instances_of(cluster: ShoalCluster) -> list[dict[str, Any]]:
    return list(cluster["a"].call("GET", "/v1/instances")["instances"])


def ask(cluster: ShoalCluster, model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": DEMO_PROMPT}], "temperature": 0, **more}
    return dict(cluster["a"].call("POST", "/v1/chat/completions", body))


@pytest.fixture(scope="module")
def expected() -> str:
    """Return what mlx_lm answers in one process, greedily."""
    model, tokenizer = load(str(MODELS_DIR / DEMO_MODEL))[:2]
    messages = [{"role": "user", "content": DEMO_PROMPT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)  # type: ignore[no-untyped-call]  # mlx_lm
    text = "".join(r.text for r in stream_generate(model, tokenizer, prompt, max_tokens=200))
    mx.clear_cache()
    return text


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_I11_answers_of_any_number_of_stages_equal_one_process(
    pulled: ShoalCluster, expected: str, stages: int
) -> None:
    instance = place(pulled, stages)
    try:
        status = pulled["b"].call("GET", "/v1/status")
        placed = next(i for i in status["instances"] if i["id"] == instance)
        assert len({s["node"] for s in placed["stages"]}) == stages
        answer = ask(pulled, instance)
        assert answer["choices"][0]["message"]["content"] == expected
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] > 0
    finally:
        pulled["a"].shoal("stop", instance, check=True)


def test_nodes_publish_and_unpublish_what_their_stages_occupy(pulled: ShoalCluster) -> None:
    async def facts() -> NodeFacts:
        async with pulled["a"].operator() as nats:
            bucket = await nats.js.key_value("live")
            return decode((await bucket.get("a.inference")).value or b"", LivenessRecord).facts

    instance = str(pulled["a"].call("POST", "/v1/instances", {"model": DEMO_MODEL, "nodes": ["a"]})["id"])
    try:
        # A process with Python and MLX, and 3 MB of weights once they are loaded.
        eventually(lambda: asyncio.run(facts()).stages.get(f"{instance}/0", 0) > 32 << 20, "what it occupies is told")
    finally:
        pulled["a"].shoal("stop", instance, check=True)
    eventually(lambda: not asyncio.run(facts()).stages, "its stage is unpublished")


def test_nats_req_does_what_the_cli_does_and_returns_the_outcome(pulled: ShoalCluster, quiet_hub: RunningHub) -> None:
    pulled["c"].call("DELETE", f"/v1/models/{DEMO_MODEL}?node=c")  # wherever an earlier test has left it

    async def request() -> dict[str, Any]:
        body = json.dumps({"model": DEMO_MODEL}).encode()
        async with pulled["a"].operator() as nats:
            reply = await nats.client.request("shoal.v1.cmd.fetcher.c.download", body, timeout=60)
        return dict(json.loads(reply.data))

    outcome = asyncio.run(request())
    assert outcome["ok"], outcome
    assert outcome["result"]["phase"] == "ready"
    assert set(outcome["result"]["sources"]) <= {"a", "b"}
    assert quiet_hub.stats().bytes == 0
    assert pulled["c"].call("GET", f"/v1/commands/{outcome['id']}")["ok"]


def test_the_cli_shows_the_cluster_as_text_and_as_json(pulled: ShoalCluster) -> None:
    node = pulled["b"]
    for command in ("status", "ls", "ps"):
        assert node.shoal(command, check=True).stdout.strip()
        json.loads(node.shoal(command, "--json", check=True).stdout)
    assert DEMO_MODEL in node.shoal("ls", check=True).stdout
    for name in "abc":
        assert name in node.shoal("status", check=True).stdout


def test_huggingface_hub_downloads_from_the_cluster(
    pulled: ShoalCluster, quiet_hub: RunningHub, tmp_path: Path
) -> None:
    pulled["c"].call("DELETE", f"/v1/models/{DEMO_MODEL}?node=c")  # wherever an earlier test has left it
    settings = json.loads(pulled["c"].shoal("hub", "--json", check=True).stdout)
    program = f"from huggingface_hub import snapshot_download; print(snapshot_download({DEMO_MODEL!r}))"
    environ = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "PATH": os.environ["PATH"], **settings}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found, source = Path(done.stdout.strip()), MODELS_DIR / DEMO_MODEL
    files = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert {str(p.relative_to(found)) for p in found.rglob("*") if p.is_file()} == files
    assert all((found / f).read_bytes() == (source / f).read_bytes() for f in files)
    assert quiet_hub.stats().bytes == 0
    pulled["c"].shoal("pull", DEMO_MODEL, check=True)


def test_run_places_an_unplaced_model_and_answers(pulled: ShoalCluster, expected: str) -> None:
    result = pulled["a"].shoal("run", DEMO_MODEL, DEMO_PROMPT, "--nodes", "2", "--temperature", "0", check=True)
    assert expected.strip() in result.stdout
    running = json.loads(pulled["a"].shoal("ps", "--json", check=True).stdout)
    for instance in running["instances"] if isinstance(running, dict) else running:
        pulled["a"].shoal("stop", instance["id"], check=True)


def test_a_model_in_use_is_not_removed_and_its_user_is_named(pulled: ShoalCluster) -> None:
    instance = place(pulled, 3)
    refused = pulled["a"].shoal("rm", DEMO_MODEL, "--node", "a")
    assert refused.returncode == 4
    ranks = [s["rank"] for i in instances_of(pulled) if i["id"] == instance for s in i["stages"] if s["node"] == "a"]
    assert f"is used by stage {ranks[0]} of instance {instance} (pid " in refused.stderr
    assert f"`shoal stop {instance}`" in refused.stderr
    assert f"stage {ranks[0]} of instance {instance}" in pulled["a"].shoal("storage", check=True).stdout
    pulled["a"].shoal("stop", instance, check=True)
    # The stage's process may still be ending: the removal waits for it.
    pulled["a"].shoal("rm", DEMO_MODEL, "--node", "a", check=True)
    pulled["a"].shoal("pull", DEMO_MODEL, check=True)


@pytest.mark.parametrize(
    ("arguments", "code", "texts"),
    [
        (("pull", "nobody/nothing"), 3, ("nobody/nothing", "check the name")),
        (("pull", "not a model"), 2, ("org/name",)),
        (("pull", f"{DEMO_MODEL}@nope"), 3, ("nope",)),
        (("run", "nobody/nothing", "hello"), 3, ("nobody/nothing",)),
        (("stop", "no-such-instance"), 3, ("no-such-instance",)),
        (("rm", "nobody/nothing"), 3, ("nobody/nothing",)),
        (("place", "nobody/nothing"), 3, ("nobody/nothing", "shoal pull")),
    ],
)
def test_bad_input_gets_one_clear_line_and_the_right_exit_code(
    cluster: ShoalCluster, arguments: tuple[str, ...], code: int, texts: tuple[str, ...]
) -> None:
    result = cluster["a"].shoal(*arguments)
    assert result.returncode == code, result.stderr
    assert len(result.stderr.strip().splitlines()) <= 1
    for word in texts:
        assert word in result.stderr
    status = cluster["a"].call("GET", "/v1/status")
    assert all(n["storage"]["reserved_bytes"] == 0 for n in status["nodes"])


def test_a_prompt_past_the_context_is_a_400_before_any_work(pulled: ShoalCluster) -> None:
    instance = place(pulled, 1)
    body = {"model": instance, "messages": [{"role": "user", "content": "fish " * 2000}]}
    response = pulled["a"].client.post(pulled["a"].url + "/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("prompt_too_long", "context_length_exceeded")
    pulled["a"].shoal("stop", instance, check=True)
