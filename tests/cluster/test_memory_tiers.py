"""Three nodes with little memory each: what fits only if other programs free some, and what only by force."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from shoal_demo import DEMO_MODEL, DEMO_PROMPT, MODELS_DIR
from shoal_demo.hub_server import running_hub
from tests.harness.cgroup_fixture import Hog, MemoryGroup, memory_group
from tests.harness.shoal import ShoalCluster, ShoalNode, eventually

MIB = 1 << 20
LIMIT_BYTES = 800 * MIB
"""A node takes 200 MiB of it, a stage 60 MiB."""
MODEL = "shoal/long-fish"
MAX_TOKENS = 32768
TIGHT_TOKENS = 6144
"""With this context a stage reserves 500 MiB: what a long prompt needs on a CPU, and a short one does not."""
LEFT_BYTES, STARVED_BYTES = 350 * MIB, 224 * MIB
"""Too little for such a stage; and less than forced stages have to leave free."""
NAMES = ("a", "b", "c")
CONCURRENT_REQUESTS = 50
ANSWER = "Fish swim together because many eyes see danger sooner"


class Limited:
    """The nodes, each in a control group with another program."""

    def __init__(self, cluster: ShoalCluster, groups: dict[str, MemoryGroup], hogs: dict[str, Hog]) -> None:
        self.cluster, self.groups, self.hogs = cluster, groups, hogs
        self.node = cluster["a"]
        self._idle = self._of_each_node()

    def preview(self, context_tokens: int, nodes: str = "a,b,c") -> dict[str, Any]:
        """Return the first preview."""
        asked = f"model={MODEL}&context_tokens={context_tokens}&nodes={nodes}"
        return dict(self.node.call("GET", f"/v1/placements/preview?{asked}")["previews"][0])

    def _of_each_node(self) -> list[int]:
        return [self.preview(TIGHT_TOKENS, name)["stages"][0]["tight_bytes"] for name in NAMES]

    def wait_idle(self) -> None:
        """Return once every node has published that it runs no stage."""
        eventually(lambda: self._of_each_node() == self._idle, "the nodes have as much as before any stage")

    def as_tier(self, tier: str, context_tokens: int) -> dict[str, Any]:
        """Wait until the first preview is of this tier, and return it."""

        def shown() -> dict[str, Any] | None:
            found = self.preview(context_tokens)
            return found if found["tier"] == tier else None

        return eventually(shown, f"{context_tokens} tokens of context are {tier}")

    def refused(self, **asked: object) -> dict[str, Any]:
        """Return the figures of the refusal."""
        body = {"model": MODEL, **asked}
        response = self.node.client.post(f"{self.node.url}/v1/instances", json=body)
        error = response.json()["error"]
        assert error["code"] == "no_room", response.text
        return dict(error["details"])

    def instance(self) -> dict[str, Any]:
        """Return the only instance."""
        (found,) = self.node.call("GET", "/v1/instances")["instances"]
        return dict(found)

    def answer(self, instance: str) -> str:
        """Return its answer to the usual question."""
        body = {"model": instance, "messages": [{"role": "user", "content": DEMO_PROMPT}], "temperature": 0}
        return str(self.node.call("POST", "/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def processes(self) -> dict[str, dict[str, int]]:
        """Return the pid of each service of each node."""
        return {node.node: {name: c.pid for name, c in node.children().items()} for node in self.cluster.nodes}


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    """Three nodes in their own control groups that have pulled a model with a long context."""
    root = tmp_path_factory.mktemp("limited")
    with ExitStack() as stack:
        groups = {name: stack.enter_context(memory_group(name, LIMIT_BYTES)) for name in NAMES}
        write_model(root / "models")
        hub = stack.enter_context(running_hub(root / "models", process=True))
        cluster = ShoalCluster(root, hub.base_url, names=NAMES)
        for node in cluster.nodes:
            node.within = groups[node.node].within
        stack.enter_context(cluster)
        cluster["a"].shoal("pull", MODEL, check=True)
        hogs = {name: stack.enter_context(Hog(group)) for name, group in groups.items()}
        yield Limited(cluster, groups, hogs)
        assert [group.killed_count() for group in groups.values()] == [0, 0, 0], "the kernel has killed for memory"


def write_model(root: Path) -> None:
    """Write the demo's model with a longer context; it answers a short question the same."""
    at = root / MODEL
    shutil.copytree(MODELS_DIR / DEMO_MODEL, at)
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps({**config, "max_position_embeddings": MAX_TOKENS}))


def typed(node: ShoalNode, answer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command at a terminal, and answer its question."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        return subprocess.run(
            [sys.executable, "-m", "shoal_cli", *arguments],
            env=node.environ,
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_model_beyond_fits_runs_only_when_a_person_allows_it(
    limited: Limited,
) -> None:
    node, context, before = limited.node, ("--context", str(TIGHT_TOKENS)), limited.processes()
    fits = limited.as_tier("fits", TIGHT_TOKENS)
    assert not fits["is_low_memory"] and [s["total_bytes"] for s in fits["stages"]] == [LIMIT_BYTES]
    with ExitStack() as taken:
        for hog in limited.hogs.values():
            taken.enter_context(hog.leaving(LEFT_BYTES))
        tight = limited.as_tier("tight", TIGHT_TOKENS)
        assert tight["is_low_memory"] and all(s["bytes_to_free"] > 0 for s in tight["stages"])
        table = node.shoal("place", MODEL, "--preview", *context, check=True).stdout
        assert "tight" in table and "--allow-low-memory" in table

        refusal = limited.refused(context_tokens=TIGHT_TOKENS)
        assert refusal["tier"] == "tight"
        figures = {n["node"]: n for n in refusal["nodes"]}
        assert figures.keys() == set(NAMES)
        for own in figures.values():
            assert (
                own["available_bytes"] < own["needed_bytes"] <= own["tight_bytes"] < own["total_bytes"] == LIMIT_BYTES
            )
        nobody = node.shoal("place", MODEL, *context)
        assert nobody.returncode != 0 and "--allow-low-memory" in nobody.stderr
        # What is available has changed a little since.
        assert all(re.search(rf"{name} [\d.,]+ [MG]B", nobody.stderr) for name in figures), nobody.stderr
        declined = typed(node, "", "place", MODEL, *context)
        assert declined.returncode == nobody.returncode and "Place it anyway? [y/N]" in declined.stdout
        assert node.call("GET", "/v1/instances")["instances"] == []

        for flags in ([], ["--allow-low-memory"]):
            placed = typed(node, "y", "place", MODEL, *context, *flags)
            assert placed.returncode == 0, placed.stderr
            assert ("[y/N]" in placed.stdout) == (not flags), "who says it with the command is not asked"
            assert "warning: it fits only if other programs free memory" in placed.stderr
            instance = limited.instance()
            assert (instance["phase"], instance["tier"], instance["is_low_memory"]) == ("ready", "tight", True)
            assert limited.answer(instance["id"]).startswith(ANSWER)
            node.shoal("stop", instance["id"], check=True)
    assert limited.processes() == before, "the nodes live on"


def test_of_fifty_over_three_gateways_as_many_as_fit_are_placed(
    limited: Limited,
) -> None:
    node, context_tokens = limited.node, TIGHT_TOKENS // 2
    limited.wait_idle()
    (stage,) = limited.as_tier("fits", context_tokens)["stages"]
    each_bytes = stage["needed_bytes"]
    body = {"model": MODEL, "context_tokens": context_tokens, "force": True, "wait": False}

    def ask(number: int) -> httpx2.Response:
        asked = limited.cluster.nodes[number % len(NAMES)]
        return asked.client.post(f"{asked.url}/v1/instances", json=body)

    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as asking:
        answers = list(asking.map(ask, range(CONCURRENT_REQUESTS)))
    placed = [a.json()["id"] for a in answers if a.status_code == 201]
    try:
        assert len(placed) == len(set(placed)) == len(NAMES) * (LIMIT_BYTES // each_bytes) == 6
        assert {i["id"] for i in node.call("GET", "/v1/instances")["instances"]} == set(placed)
        for answer in answers:
            if answer.status_code != 201:
                error = answer.json()["error"]
                assert error["code"] == "no_room", error
                assert {n["node"]: n["total_bytes"] for n in error["details"]["nodes"]} == dict.fromkeys(
                    NAMES, LIMIT_BYTES
                )
    finally:
        for instance in placed:
            node.shoal("stop", instance, check=True)


def test_a_forced_instance_killed_at_oom_leaves_its_node_alive(limited: Limited) -> None:
    node, before = limited.node, limited.processes()
    limited.wait_idle()
    # A stage's reservation hardly depends on its number of layers, so every layout needs force.
    tokens = next(t for t in range(TIGHT_TOKENS, MAX_TOKENS, 512) if limited.preview(t)["tier"] == "force")
    context = ("--context", str(tokens))
    assert limited.refused(context_tokens=tokens, allow_low_memory=True)["tier"] == "force"
    refused = node.shoal("place", MODEL, *context, "--allow-low-memory")
    assert refused.returncode != 0 and "--force" in refused.stderr

    placed = node.shoal("place", MODEL, *context, "--force", check=True)
    assert "warning: no memory is reserved for the system" in placed.stderr
    instance = limited.instance()
    assert (instance["phase"], instance["tier"]) == ("ready", "force")
    assert limited.answer(instance["id"]).startswith(ANSWER)

    def oom_error() -> dict[str, Any] | None:
        now = limited.instance()
        return now["error"] if now["phase"] == "failed" else None

    with limited.hogs[instance["nodes"][0]].leaving(STARVED_BYTES):
        error = eventually(oom_error, "the forced instance gives way")
        assert error["code"] == "no_room" and "forced onto this node" in error["message"]
        assert limited.processes() == before, "the nodes live on"

    node.shoal("stop", instance["id"], check=True)
    limited.wait_idle()
    node.shoal("place", MODEL, *context, "--force", check=True)
    instance = limited.instance()
    assert limited.answer(instance["id"]).startswith(ANSWER)
    node.shoal("stop", instance["id"], check=True)
    assert limited.processes() == before
