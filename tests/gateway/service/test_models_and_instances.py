"""Models and instances over REST, with fake storage and placement."""

from __future__ import annotations

import asyncio

import pytest

from shoal_common.bus.keys import liveness_key
from shoal_common.errors import Corrupt, NoMemory, ShoalError, StageLost
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.instances import InstancePhase, InstanceState
from shoal_common.messages.liveness import LivenessRecord, NodeAddress, NodeFacts, ProcessIdentity
from shoal_common.messages.placement import PlaceCommand, Unplace
from shoal_common.messages.storage import Delete, StorageState
from shoal_common.names import SERVICES
from tests.gateway.fake_cluster import COMMIT, cluster, error_of, running
from tests.gateway.running_gateway import NODE, RunningGateway


async def test_models_are_listed_as_openai_does_with_their_nodes(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, _):
        await c.held("a", "org/tiny")
        await c.held("b", "org/tiny")
        await c.held("b", "other/big", size_bytes=5)
        listed = (await c.http.get("/v1/models")).json()
        one = (await c.http.get("/v1/models/org/tiny")).json()
        by_commit = (await c.http.get(f"/v1/models/org/tiny@{COMMIT}")).json()
        error_of(await c.http.get("/v1/models/org/none"), 404)
        error_of(await c.http.get("/v1/models/org/tiny@v9"), 404)
    assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == ["org/tiny", "other/big"]
    assert (
        listed["data"][0]
        == one
        == {
            "id": "org/tiny",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "org",
            "shoal": {
                "commit": COMMIT,
                "nodes": ["a", "b"],
                "instances": [{"id": "i1", "phase": "ready"}],
                "ready": True,
                "size_bytes": 1000,
            },
        }
    )
    assert by_commit["shoal"] == one["shoal"]
    assert listed["data"][1]["shoal"]["ready"] is False


async def test_delete_goes_to_every_node_that_holds_or_downloads_it(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        asked: list[tuple[str, str]] = []
        for node in ("a", "b", "c"):

            async def delete(command: Delete, node: str = node) -> object:
                asked.append((node, command.model))
                return {"deleted": node == "a"}

            await c.worker("storage", node, "delete", Delete, delete)
        await c.held("a", "org/big")
        await c.downloading(DownloadState(node="b", model="org/big", phase="fetching"))
        await c.seen("/v1/downloads", lambda s: bool(s["downloads"]))
        body = (await c.http.delete("/v1/models/org/big")).json()
        assert sorted(asked) == [("a", "org/big"), ("b", "org/big")]
        assert body["deleted"] is True and body["nodes"]["b"]["deleted"] is False
        await c.http.delete("/v1/models/org/big", params={"node": "c", "revision": COMMIT})
        assert asked[-1] == ("c", f"org/big@{COMMIT}")
        await c.http.delete("/v1/models/org/big", params={"node": "c", "revision": "main"})
        assert asked[-1] == ("c", "org/big@main")


async def test_I5_deleting_what_is_nowhere_succeeds_and_sends_nothing(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        before = await c.joined.last_sequence("CMD")
        response = await c.http.delete("/v1/models/org/none")
        assert response.status_code == 200
        assert response.json() == {"model": "org/none", "deleted": False, "nodes": {}}
        gone = await c.http.delete("/v1/instances/none")
        assert gone.status_code == 200 and gone.json() == {"id": "none", "deleted": False}
        assert await c.joined.last_sequence("CMD") == before


async def test_delete_on_a_down_node_is_503(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        await c.held("away", "org/big")
        for params in ({}, {"node": "away"}):
            error = error_of(await c.http.delete("/v1/models/org/big", params=params), 503)
            assert error["code"] == "node_down" and "away" in error["details"]["nodes"]


async def test_place_waits_until_the_instance_is_ready(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        await c.inference("a")
        starting = asyncio.Event()

        async def place(command: PlaceCommand) -> object:
            assert (command.model, command.max_nodes, command.nodes) == ("org/tiny", 2, ["a"])
            await c.placed("i1", "org/tiny", ["a"], phase="starting")
            starting.set()
            return {"instance": "i1"}

        await c.worker("placement", "any", "place", PlaceCommand, place)
        body = {"model": "org/tiny", "max_nodes": 2, "nodes": ["a"]}
        asking = asyncio.create_task(c.http.post("/v1/instances", json=body))
        await starting.wait()
        assert not asking.done()
        await c.placed("i1", "org/tiny", ["a"])
        response = await asking
        assert response.status_code == 201 and response.headers["location"] == "/v1/instances/i1"
        placed = response.json()
        shown = (await c.http.get("/v1/instances/i1")).json()
        error_of(await c.http.get("/v1/instances/i9"), 404)
        again = await c.http.post("/v1/instances", json={**body, "wait": False})
        assert again.status_code == 201
    assert placed["phase"] == "ready" and placed["model"] == f"org/tiny@{COMMIT}"
    assert {k: placed["stages"][0][k] for k in ("rank", "node", "first_layer", "last_layer", "phase")} == {
        "rank": 0,
        "node": "a",
        "first_layer": 0,
        "last_layer": 4,
        "phase": "ready",
    }
    assert {k: v for k, v in placed.items() if k != "command"} == shown


async def test_place_without_capacity_is_507_with_every_nodes_figures(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:

        async def place(_command: PlaceCommand) -> object:
            raise NoMemory("nothing fits", nodes={"a": {"needed_bytes": 9, "available_bytes": 5, "total_bytes": 8}})

        await c.worker("placement", "any", "place", PlaceCommand, place)
        error = error_of(await c.http.post("/v1/instances", json={"model": "org/tiny"}), 507)
    assert error["code"] == "no_room" and error["details"]["nodes"]["a"]["available_bytes"] == 5


@pytest.mark.parametrize(
    ("phase", "error"),
    [
        ("failed", Corrupt("layer 3 does not match its hash")),
        ("starting", StageLost("node a is down since 1970-01-02T00:00:00+00:00", down_since_s={"a": 86400.0})),
    ],
)
async def test_place_of_what_cannot_start_answers_with_its_error(
    gateway: RunningGateway, phase: InstancePhase, error: ShoalError
) -> None:
    async with cluster(gateway) as c:

        async def place(_command: PlaceCommand) -> object:
            state = InstanceState(
                id="i1", repo="org/tiny", commit=COMMIT, phase=phase, nodes=["a"], error=error.body()
            )
            await c.write("state", "instance.i1", state)
            return {"instance": "i1"}

        await c.worker("placement", "any", "place", PlaceCommand, place)
        answer = error_of(await c.http.post("/v1/instances", json={"model": "org/tiny"}), error.http_status)
    assert (answer["code"], answer["message"]) == (error.code, error.message)
    assert answer["details"]["instance"] == "i1"


async def test_place_without_placement_is_503(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        error = error_of(await c.http.post("/v1/instances", json={"model": "org/tiny"}), 503)
    assert error["code"] == "node_down" and "placement" in error["message"]


async def test_stop_sends_unplace_and_reports_that_it_is_gone(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        asked: list[str] = []

        async def unplace(command: Unplace) -> object:
            asked.append(command.instance)
            return {}

        await c.worker("placement", "any", "unplace", Unplace, unplace)
        await c.placed("i1", "org/tiny", ["a"])
        body = (await c.http.delete("/v1/instances/i1")).json()
    assert asked == ["i1"] and body["deleted"] is True


async def test_status_has_every_node_with_its_services_memory_and_disk(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, _):
        await c.live("a", "storage", NodeFacts(disk_free_bytes=7))
        await c.live("a", "fileserver", NodeFacts(links=[NodeAddress(address="192.0.2.9:1", kind="wifi")]))
        await c.write("state", "storage.a", StorageState(node="a", used_bytes=3, free_bytes=7))
        await c.write("state", "storage.asleep", StorageState(node="asleep", used_bytes=3))
        status = await c.seen("/v1/status", lambda s: len(s["nodes"]) == 3 and any(n["link"] for n in s["nodes"]))
    assert status["node"] == NODE and status["nats_connected"] is True
    nodes = {n["node"]: n for n in status["nodes"]}
    assert nodes["asleep"]["live"] is False and nodes["asleep"]["missing_services"] == list(SERVICES)
    a = nodes["a"]
    assert a["live"] and sorted(a["services"]) == ["fileserver", "inference", "storage"]
    assert a["link"] == "wifi" and nodes["asleep"]["link"] == ""
    assert a["memory_total_bytes"] == 16 << 30 and a["storage"]["free_bytes"] == 7
    assert a["storage"]["quota_bytes"] is None
    assert nodes[NODE]["services"]["gateway"]["addresses"] == [c.gateway.url.removeprefix("http://")]
    assert [i["id"] for i in status["instances"]] == ["i1"]


async def test_a_node_of_another_major_version_is_shown_as_ignored(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        await c.held("b", "org/theirs")
        await c.seen("/v1/status", lambda s: any(m["repo"] == "org/theirs" for m in s["models"]))
        for service in ("storage", "fetcher"):
            theirs = LivenessRecord(holder=ProcessIdentity(uid="b", host="elsewhere", pid=1), version="99.0.0")
            await c.write("live", liveness_key("b", service), theirs)
        status = await c.seen("/v1/status", lambda s: any(len(n["other_versions"]) == 2 for n in s["nodes"]))
        (node,) = [n for n in status["nodes"] if n["node"] == "b"]
        assert node["other_versions"] == {"fetcher": "99.0.0", "storage": "99.0.0"}
        assert node["live"] is False and node["services"] == {}
        assert not any(m["repo"] == "org/theirs" for m in status["models"])
        refused = await c.http.post("/v1/downloads", json={"model": "org/x", "nodes": ["b"]})
        assert error_of(refused, 503)["code"] == "node_down"
