"""Commands for a node that is down: each ends, names the node, and is not carried out later."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from shoal_common.bus.keys import instance_key, liveness_key, model_key, storage_key
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.instances import InstanceSpec, StageSpec
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.messages.storage import ModelState, StorageState
from shoal_common.names import model_id
from shoal_demo.hub_server import running_hub
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site
from tests.harness.nats import NatsServer
from tests.harness.node import Node, running_nodes
from tests.harness.waiting import eventually

ENDS_DEADLINE_S = 150.0
"""Generous: a key expires after 20 s, and commands wait 15 s for a service."""
INSTANCE, MODEL, OTHER = "instance-1", "org/kept", "org/wanted"

TO_STORAGE: dict[str, tuple[str, str, object]] = {
    "delete": ("DELETE", f"/v1/models/{MODEL}?node=b", None),
    "configure": ("PUT", "/v1/storage/config", {"node": "b", "max_storage_bytes": 1 << 30}),
    "pin": ("POST", "/v1/storage/pins", {"node": "b", "model": MODEL}),
    "gc": ("POST", "/v1/storage/gc", {"node": "b"}),
    "verify": ("POST", "/v1/storage/verify", {"node": "b"}),
}
TO_FETCHER: dict[str, tuple[str, str, object]] = {
    "download": ("POST", "/v1/downloads", {"model": OTHER, "nodes": ["b"], "wait": True}),
    "pause": ("POST", "/v1/downloads/pause", {"model": OTHER, "nodes": ["b"]}),
    "resume": ("POST", "/v1/downloads/resume", {"model": OTHER, "nodes": ["b"]}),
    "cancel": ("POST", "/v1/downloads/cancel", {"model": OTHER, "nodes": ["b"]}),
}
TO_PLACEMENT: dict[str, tuple[str, str, object]] = {
    "place": ("POST", "/v1/instances", {"model": MODEL}),
    "unplace": ("DELETE", f"/v1/instances/{INSTANCE}", None),
    "forget": ("DELETE", "/v1/nodes/gone", None),
}


async def ends(http: httpx2.AsyncClient, request: tuple[str, str, object]) -> dict[str, Any]:
    """Return the error that a request is answered with."""
    method, path, body = request
    response = await http.request(method, path, json=body)
    assert response.status_code == 503, response.text
    return dict(response.json()["error"])


async def gateway_url(here: Pulls) -> str:
    live = await here.buckets.live.get_as(liveness_key("a", "gateway"), LivenessRecord)
    assert live is not None
    return f"http://127.0.0.1:{live.facts.addresses[0].rpartition(':')[2]}"


def shoal(url: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a `shoal` command."""
    return subprocess.run(
        [sys.executable, "-m", "shoal_cli", *arguments],
        env={**os.environ, "SHOAL_HOME": str(home), "SHOAL_GATEWAY": url},
        capture_output=True,
        text=True,
        timeout=ENDS_DEADLINE_S,
        check=False,
    )


@pytest.mark.deadline_s(400.0)
@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_I7_commands_for_a_down_node_end_and_are_never_executed(
    tmp_path: Path, own_nats: NatsServer, how: str
) -> None:
    hub_root = tmp_path / "hub"
    hub_root.mkdir()
    with running_hub(hub_root, process=True) as hub:
        a = Node(tmp_path / "a", "a", own_nats.url, ("placement", "gateway"), SHOAL_GATEWAY_PORT="0")
        b = Node(tmp_path / "b", "b", own_nats.url, ("storage", "fetcher"), HF_ENDPOINT=hub.base_url)
        site = Site(own_nats, hub, hub_root, {"a": a, "b": b}, repo=MODEL)
        site.make({"model.bin": noise(1 << 16, "kept")})
        site.make({"model.bin": noise(1 << 16, "wanted")}, OTHER)
        with running_nodes(a, b):
            async with site.join() as here:
                for node in (a, b):
                    await node.ready(here.here)
                pulled = await here.pull_ok("b")
                stage = StageSpec(rank=0, node="b", first_layer=0, last_layer=1)
                spec = InstanceSpec(id=INSTANCE, repo=MODEL, commit="c" * 40, stages=[stage], context_tokens=1)
                await here.buckets.spec.put(instance_key(INSTANCE), spec)
                url = await gateway_url(here)
                async with httpx2.AsyncClient(base_url=url, timeout=ENDS_DEADLINE_S) as http:

                    async def seen() -> bool:
                        return len((await http.get("/v1/instances")).json()["instances"]) == 1

                    await eventually(seen, "the gateway knows what there is")
                    down = [b["storage"], b["fetcher"], a["placement"]]
                    for service in down:
                        if how == "killed":
                            await asyncio.to_thread(service.kill)
                        else:
                            service.send(signal.SIGSTOP)
                    try:
                        requests = {**TO_STORAGE, **TO_FETCHER, **TO_PLACEMENT}
                        typed = asyncio.to_thread(shoal, url, tmp_path, "rm", MODEL, "--node", "b")
                        begun = http.post("/v1/downloads", json={"model": OTHER, "nodes": ["b"]})
                        found, removed, asked = await asyncio.gather(
                            asyncio.gather(*(ends(http, request) for request in requests.values())), typed, begun
                        )
                        errors = dict(zip(requests, found, strict=True))
                        for verb, error in errors.items():
                            assert error["code"] == "node_down", (verb, error)
                            who = "placement" if verb in TO_PLACEMENT else "node b"
                            assert verb in error["message"] and who in error["message"], error
                        assert removed.returncode == 5 and "node b" in removed.stderr, removed
                        # A client that does not wait is told that the command is under way.
                        assert asked.status_code == 202, asked.text
                        identity = asked.json()["commands"]["b"]

                        async def ended() -> Outcome | None:
                            return await here.buckets.done.get_as(identity, Outcome)

                        outcome = await eventually(ended, "the download has an outcome", ENDS_DEADLINE_S)
                        assert outcome.error is not None and outcome.error.code == "node_down"
                        # By now the node is known to be down: nothing is sent any more.
                        known = await ends(http, TO_STORAGE["gc"])
                        assert known["code"] == "node_down" and "nothing was sent" in known["message"]
                    finally:
                        for service in down:
                            if how == "killed":
                                service.start()
                            else:
                                service.send(signal.SIGCONT)

                    async def queue_is_empty() -> bool:
                        return (await here.here.js.stream_info("CMD")).state.messages == 0

                    await eventually(queue_is_empty, "the queue is empty", ENDS_DEADLINE_S)
                    state = await here.buckets.state.get_as(storage_key("b"), StorageState)
                    assert state is not None and state.quota_bytes is None and state.pinned == []
                    held = await here.buckets.state.get_as(model_key("b", model_id(MODEL, pulled.commit)), ModelState)
                    assert held is not None
                    assert await here.state_now("b", OTHER) is None and site.hub_bytes(OTHER) == 0
                    assert await here.buckets.spec.get(instance_key(INSTANCE)) is not None
