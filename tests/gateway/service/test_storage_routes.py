"""Storage over REST: a fake storage with the real command worker and RPC endpoints."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shoal_common.bus.keys import storage_key
from shoal_common.errors import NotFound, Refused
from shoal_common.messages.envelope import Command
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.storage import (
    CollectGarbage,
    Configure,
    EvictionPlan,
    Pin,
    PlanEviction,
    Reload,
    StorageState,
    Verify,
    Victim,
)
from shoal_common.names import ModelId
from shoal_common.rpc.request_reply import RpcEndpoint, serve
from tests.gateway.fake_cluster import Cluster, cluster, error_of
from tests.gateway.running_gateway import NODE, RunningGateway

KINDS: dict[str, type[Command]] = {
    "configure": Configure,
    "reload": Reload,
    "pin": Pin,
    "gc": CollectGarbage,
    "verify": Verify,
}


async def storage(c: Cluster, node: str, verb: str) -> list[Command]:
    """Run a live storage that handles one command; yield the list of received commands."""
    asked: list[Command] = []

    async def handle(command: Command) -> object:
        asked.append(command)
        return {"done": verb, "note": "said by storage"}

    await c.worker("storage", node, verb, KINDS[verb], handle)
    return asked


async def planner(c: Cluster, node: str, plan: EvictionPlan) -> list[int]:
    """Run a live storage that returns one plan; yield the list of requested byte counts."""
    asked: list[int] = []

    async def answer(question: PlanEviction) -> EvictionPlan:
        asked.append(question.need_bytes)
        return plan

    questions = {"plan": RpcEndpoint(PlanEviction, answer)}
    c.tasks.create_task(serve(c.joined.nats, "storage", node, questions, c.stopping))
    await c.live(node, "storage")
    return asked


async def test_storage_lists_every_disk_with_its_last_published_state(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        published = StorageState(
            node="a", quota_bytes=100, used_bytes=5, eviction_policy="lru", pinned=[ModelId("org/m@x")]
        )
        await c.write("state", storage_key("a"), published)
        await c.write("state", storage_key("gone"), StorageState(node="gone", used_bytes=7))
        await c.live("a", "storage", NodeFacts(disk_free_bytes=900))
        await c.live("new", "storage", NodeFacts(disk_free_bytes=11))
        answer = await c.seen("/v1/storage", lambda s: len(s["nodes"]) == 3)
    assert answer["node"] == NODE
    assert [(n["node"], n["live"], n["disk_free_bytes"]) for n in answer["nodes"]] == [
        ("a", True, 900),
        ("gone", False, None),
        ("new", True, 11),
    ]
    a, gone, new = (n["storage"] for n in answer["nodes"])
    assert (a["quota_bytes"], a["eviction_policy"], a["pinned"]) == (100, "lru", ["org/m@x"])
    assert (gone["used_bytes"], gone["eviction_policy"], new) == (7, "manual", None)


@pytest.mark.parametrize(
    ("method", "path", "verb", "body", "sent"),
    [
        (
            "PUT",
            "/v1/storage/config",
            "configure",
            {"max_storage_bytes": 200, "eviction_policy": "lru", "headroom_bytes": 5, "partial_retention_s": 0},
            {"max_storage_bytes": 200, "eviction_policy": "lru", "headroom_bytes": 5, "partial_retention_s": 0},
        ),
        ("PUT", "/storage/config", "configure", {"max_storage_bytes": None}, {"max_storage_bytes": None}),
        ("PUT", "/v1/storage/config", "configure", {"headroom_bytes": 0, "id": "x"}, {"headroom_bytes": 0}),
        ("POST", "/v1/storage/reload", "reload", {}, {}),
        ("POST", "/v1/storage/pins", "pin", {"model": "org/m"}, {"model": "org/m"}),
        ("POST", "/v1/storage/pins", "pin", {"model": "org/m", "pinned": False}, {"model": "org/m", "pinned": False}),
        ("POST", "/v1/storage/gc", "gc", {}, {}),
        ("POST", "/v1/storage/gc", "gc", {"deadline_s": 9}, {"deadline_s": 9}),
        ("POST", "/v1/storage/verify", "verify", {}, {}),
        ("POST", "/v1/storage/verify", "verify", {"model": "org/m@v1"}, {"model": "org/m@v1"}),
    ],
)
async def test_each_route_sends_the_documented_command_to_its_own_node(
    gateway: RunningGateway, method: str, path: str, verb: str, body: dict[str, Any], sent: dict[str, Any]
) -> None:
    async with cluster(gateway) as c:
        commands = await c.joined.client.subscribe("shoal.v1.cmd.>")
        await c.joined.client.flush()
        asked = await storage(c, NODE, verb)
        await storage(c, "other", verb)
        response = await c.http.request(method, path, json=body)
        assert response.status_code == 200, response.text
        message = await commands.next_msg(timeout=5)
        assert commands.pending_msgs == 0 and len(asked) == 1
    assert message.subject == f"shoal.v1.cmd.storage.{NODE}.{verb}"
    body = msgspec.json.decode(message.data)
    assert body.pop("expires_at_s") > 0
    assert body == sent
    assert message.headers is not None
    command = message.headers["Nats-Msg-Id"]
    assert response.json() == {
        "nodes": {NODE: {"done": verb, "note": "said by storage", "command": command}},
    }


@pytest.mark.parametrize(
    ("where", "meant"),
    [
        ({"node": "a"}, ["a"]),
        ({"nodes": ["b", "a"]}, ["a", "b"]),
        ({"nodes": "b"}, ["b"]),
        ({"node": "all"}, ["a", "b"]),
        ({"nodes": "all"}, ["a", "b"]),
    ],
)
async def test_a_command_goes_to_the_named_nodes_or_to_every_live_one(
    gateway: RunningGateway, where: dict[str, Any], meant: list[str]
) -> None:
    async with cluster(gateway) as c:
        asked = {node: await storage(c, node, "gc") for node in ("a", "b")}
        await c.write("state", storage_key("gone"), StorageState(node="gone"))
        answer = (await c.http.post("/v1/storage/gc", json=where)).json()
    assert sorted(answer["nodes"]) == meant == [node for node, commands in asked.items() if commands]


async def test_a_dry_run_asks_storage_and_answers_with_its_plan(gateway: RunningGateway) -> None:
    plan = EvictionPlan(
        required_bytes=50,
        garbage=["ab"],
        garbage_bytes=10,
        victims=[Victim(model=ModelId("org/old@c"), freed_bytes=60, last_use_s=5.0)],
        freed_bytes=70,
        enough=True,
        evictable_bytes=90,
        protected={ModelId("org/kept@c"): "pinned"},
        ended_downloads=[Victim(model=ModelId("org/half@c"), freed_bytes=1, last_use_s=4.0)],
    )
    async with cluster(gateway) as c:
        before = await c.joined.last_sequence("CMD")
        here, other = await planner(c, NODE, plan), await planner(c, "other", EvictionPlan(required_bytes=50))
        answer = (await c.http.get("/v1/storage/plan", params={"need_bytes": "50"})).json()
        assert answer == {"nodes": {NODE: msgspec.to_builtins(plan)}}
        everywhere = (await c.http.get("/v1/storage/plan", params={"need_bytes": "0", "node": "all"})).json()
        assert await c.joined.last_sequence("CMD") == before, "a question changes nothing"
    assert (here, other) == ([50, 0], [0])
    assert list(everywhere["nodes"]) == [NODE, "other"]
    assert everywhere["nodes"]["other"] == {
        "required_bytes": 50,
        "garbage": [],
        "garbage_bytes": 0,
        "victims": [],
        "freed_bytes": 0,
        "enough": False,
        "evictable_bytes": 0,
        "protected": {},
        "ended_downloads": [],
    }


@pytest.mark.parametrize("path", ["/v1/storage/config", "/storage/config"])
@pytest.mark.parametrize("setting", [{"libraries": ["/home"]}, {"libraries": []}, {"volumes": ["/b"]}], ids=str)
async def test_I12_directories_of_a_machine_are_not_set_over_HTTP(
    gateway: RunningGateway, path: str, setting: dict[str, list[str]]
) -> None:
    async with cluster(gateway) as c:
        asked = await storage(c, NODE, "configure")
        error = error_of(await c.http.put(path, json={"headroom_bytes": 1, **setting}), 409)
        assert "shoal storage set" in error["message"] and error["param"] in setting
        assert asked == []


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("PUT", "/v1/storage/config", {}, "there is nothing to change"),
        ("PUT", "/v1/storage/config", {"max_storage_bytes": -1}, "max_storage_bytes is -1"),
        ("PUT", "/v1/storage/config", {"headroom_bytes": 2**63}, "headroom_bytes is"),
        ("PUT", "/v1/storage/config", {"partial_retention_s": -1}, "partial_retention_s is -1"),
        ("PUT", "/v1/storage/config", {"headroom_bytes": None}, "headroom_bytes"),
        ("PUT", "/v1/storage/config", {"max_storage_bytes": "200GB"}, "max_storage_bytes"),
        ("PUT", "/v1/storage/config", {"eviction_policy": "fifo"}, "eviction_policy"),
        ("PUT", "/v1/storage/config", {"headroom_bytes": 1, "node": "a", "nodes": ["a"]}, "give one of them"),
        ("PUT", "/v1/storage/config", {"headroom_bytes": 1, "node": "a.>"}, "not a node id"),
        ("POST", "/v1/storage/pins", {"model": "../up"}, "is not a model"),
        ("POST", "/v1/storage/pins", {}, "model"),
        ("POST", "/v1/storage/verify", {"model": "up"}, "is not a model"),
        ("POST", "/v1/storage/gc", {"nodes": []}, "`nodes` is empty"),
        ("GET", "/v1/storage/plan", None, "need_bytes"),
        ("GET", "/v1/storage/plan?need_bytes=-5", None, "need_bytes is '-5'"),
        ("GET", "/v1/storage/plan?need_bytes=99999999999999999999999", None, "need_bytes is"),
        ("GET", "/v1/storage/plan?need_bytes=5&node=A", None, "not a node id"),
    ],
)
async def test_I10_a_malformed_request_is_400_and_sends_nothing(
    gateway: RunningGateway, method: str, path: str, body: object, expected: str
) -> None:
    async with cluster(gateway) as c:
        await storage(c, NODE, "configure")
        before = await c.joined.last_sequence("CMD")
        error = error_of(await c.http.request(method, path, json=body), 400)
        assert expected in error["message"]
        assert await c.joined.last_sequence("CMD") == before


async def test_a_node_whose_storage_is_down_is_named_and_sends_nothing(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        await storage(c, "a", "gc")
        await c.write("state", storage_key("gone"), StorageState(node="gone"))
        await c.seen("/v1/storage", lambda s: any(n["node"] == "gone" for n in s["nodes"]))
        before = await c.joined.last_sequence("CMD")
        for body in ({"nodes": ["a", "gone"]}, {}):
            error = error_of(await c.http.post("/v1/storage/gc", json=body), 503)
            assert error["code"] == "node_down"
        assert error_of(await c.http.get("/v1/storage/plan?need_bytes=1&node=gone"), 503)["code"] == "node_down"
        assert await c.joined.last_sequence("CMD") == before


async def test_a_refusal_of_storage_is_answered_with_its_message(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:

        async def refuse(_command: Configure) -> object:
            raise Refused("headroom_bytes comes from the environment here", variable="SHOAL_HEADROOM_BYTES")

        async def not_here(_command: Pin) -> object:
            raise NotFound("org/m is not on node here")

        await c.worker("storage", "a", "configure", Configure, refuse)
        await storage(c, "b", "configure")
        body = {"nodes": ["a", "b"], "headroom_bytes": 5}
        error = error_of(await c.http.put("/v1/storage/config", json=body), 409)
        assert error["code"] == "refused" and error["details"]["variable"] == "SHOAL_HEADROOM_BYTES"
        assert error["details"]["other_nodes_ok"] == {"b": True}
        await c.worker("storage", NODE, "pin", Pin, not_here)
        assert error_of(await c.http.post("/v1/storage/pins", json={"model": "org/m"}), 404)["code"] == "not_found"
