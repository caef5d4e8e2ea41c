"""Two machines, one killed: every surface names the one that is gone, and the model answers on the other one."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shoal_cli.node.down import supervisor_status
from shoal_cli.node_home import Home
from shoal_demo import DEMO_MODEL, MODELS_DIR
from shoal_demo.hub_server import running_hub
from tests.harness.shoal import ShoalCluster, ShoalNode, eventually

RUN_DEADLINE_S = 45.0
"""The instance moves, and its stage loads on a busy machine."""


def kill_machine(node: ShoalNode) -> None:
    """Kill every process of a node at the same moment."""
    supervisor = supervisor_status(Home(node.home))
    assert supervisor is not None
    root = psutil.Process(supervisor.pid)
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def events_of(node: ShoalNode) -> list[tuple[str, str]]:
    """Return the events about nodes and what lacks them: name and node."""
    lines = node.shoal("events", "--since", "10m", "--json", check=True).stdout.splitlines()
    events = [json.loads(line) for line in lines]
    about = {"node_joined", "node_lost", "node_returned", "instance_degraded"}
    named = [(e["event"], e["fields"]) for e in events if e["event"] in about]
    return [(name, fields.get("node") or fields["reason"].split(" ")[1]) for name, fields in named]


@pytest.mark.deadline_s(280.0)
def test_a_killed_machine_is_named_everywhere_and_run_goes_on(tmp_path: Path) -> None:
    with (
        running_hub(MODELS_DIR, process=True) as hub,
        ShoalCluster(tmp_path, hub.base_url, names=("a", "b")) as cluster,
    ):
        a, b = cluster["a"], cluster["b"]
        a.shoal("pull", DEMO_MODEL, "--all", check=True)
        placed = str(a.call("POST", "/v1/instances", {"model": DEMO_MODEL, "min_nodes": 2})["id"])
        kill_machine(b)

        def view() -> dict[str, str] | None:
            shown = a.call("GET", f"/v1/instances/{placed}")
            phases = {s["node"]: s["phase"] for s in shown["stages"] if s["phase"] == "down"}
            since_s = ((shown["error"] or {}).get("details") or {}).get("down_since_s", {})
            return phases if since_s.get("b") else None

        assert eventually(view, "the instance names b and since when") == {"b": "down"}
        request = {"model": DEMO_MODEL, "messages": [{"role": "user", "content": "Hello"}]}
        refused = a.client.post(f"{a.url}/v1/chat/completions", json=request)
        assert refused.status_code == 503 and "node b is down since" in refused.text, refused.text
        assert "b (down)" in a.shoal("ls", check=True).stdout
        assert "node b is down since" in " ".join(a.shoal("doctor").stdout.split())
        eventually(lambda: ("node_lost", "b") in events_of(a), "an event says that b is lost")
        eventually(lambda: ("instance_degraded", "b") in events_of(a), "an event says what lacks b")
        started_s = time.monotonic()
        answer = a.shoal("run", DEMO_MODEL, "Why do fish swim together?", check=True)
        assert answer.stdout.strip() and time.monotonic() - started_s < RUN_DEADLINE_S
        assert "node b is down since" in answer.stderr
        assert ["a"] in [i["nodes"] for i in a.call("GET", "/v1/instances")["instances"]]
        b.up()
        eventually(lambda: ("node_returned", "b") in events_of(a), "an event says that b has returned")
        about_b = [name for name, node in events_of(a) if node == "b"]
        assert sorted(about_b) == ["instance_degraded", "node_joined", "node_lost", "node_returned"]
