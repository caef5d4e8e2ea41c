"""Downloads over REST, with a fake fetcher and the real command worker."""

from __future__ import annotations

import asyncio

import msgspec

from shoal_common.errors import Cancelled, QuotaExceeded
from shoal_common.messages.downloads import CancelDownload, DownloadCommand, DownloadState, PauseDownload
from tests.gateway.fake_cluster import Cluster, cluster, error_of, now_s
from tests.gateway.running_gateway import NODE, RunningGateway

GIB = 1 << 30


class Fetcher:
    """A fetcher that publishes a download and keeps it running until it is released."""

    def __init__(self, c: Cluster, node: str) -> None:
        self.c, self.node = c, node
        self.asked: list[DownloadCommand] = []
        self.may_answer = asyncio.Event()

    async def download(self, command: DownloadCommand) -> object:
        self.asked.append(command)
        await self.publish_phase(command.model, "fetching")
        await self.may_answer.wait()
        await self.publish_phase(command.model, "ready")
        return {"phase": "ready"}

    async def publish_phase(self, model: str, phase: str) -> None:
        await self.c.downloading(
            DownloadState(
                node=self.node,
                model=model,
                phase=phase,  # type: ignore[arg-type]  # one of the phases, as a str
                total_bytes=10 * GIB,
                done_bytes=4 * GIB,
                updated_at_s=now_s(),
            )
        )


async def fetcher(c: Cluster, node: str) -> Fetcher:
    """Run a live fetcher on a node."""
    peer = Fetcher(c, node)
    await c.worker("fetcher", node, "download", DownloadCommand, peer.download)
    return peer


async def test_download_is_answered_as_soon_as_it_has_started(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        peer = await fetcher(c, NODE)
        response = await c.http.post("/v1/downloads", json={"model": "org/big@main"})
        assert response.status_code == 202, response.text
        body = response.json()
        assert [(d["node"], d["model"], d["phase"]) for d in body["downloads"]] == [(NODE, "org/big", "fetching")]
        assert body["downloads"][0]["done_bytes"] == 4 * GIB
        assert list(body["commands"]) == [NODE]
        assert [a.model for a in peer.asked] == ["org/big"]
        assert (await c.http.get("/v1/downloads")).json()["downloads"] == body["downloads"]
        peer.may_answer.set()
        outcome = await c.seen(f"/v1/commands/{body['commands'][NODE]}", lambda o: "ok" in o)
    assert outcome["ok"] and outcome["verb"] == "download" and outcome["result"] == {"phase": "ready"}


async def test_rest_sends_the_documented_command_and_nothing_else(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        sent = await c.joined.client.subscribe("shoal.v1.cmd.>")
        await c.joined.client.flush()
        peer = await fetcher(c, "a")
        peer.may_answer.set()
        body = {"model": "org/big@v1", "nodes": ["a"], "wait": True, "deadline_s": 30, "force": True}
        command = (await c.http.post("/v1/downloads", json=body)).json()["commands"]["a"]
        message = await sent.next_msg(timeout=5)
        assert sent.pending_msgs == 0
    assert message.subject == "shoal.v1.cmd.fetcher.a.download"
    sent_body = msgspec.json.decode(message.data)
    assert sent_body.pop("expires_at_s") > 0
    assert sent_body == {"model": "org/big@v1", "deadline_s": 30, "force": True}
    assert message.headers is not None and message.headers["Nats-Msg-Id"] == command


async def test_waiting_caller_is_answered_when_the_download_has_ended(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        peers = [await fetcher(c, "a"), await fetcher(c, "b")]
        body = {"model": "org/big", "nodes": "all", "wait": True}
        asking = asyncio.create_task(c.http.post("/v1/downloads", json=body))
        await c.seen("/v1/downloads", lambda s: len(s["downloads"]) == 2)
        assert not asking.done()
        for peer in peers:
            peer.may_answer.set()
        response = await asking
    assert response.status_code == 200
    assert {d["node"]: d["phase"] for d in response.json()["downloads"]} == {"a": "ready", "b": "ready"}


async def test_rejected_download_answers_507_with_the_figures(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:

        async def reject(_command: DownloadCommand) -> object:
            raise QuotaExceeded("it needs 80 GB and 20 GB are free", needed_bytes=80 * GIB, free_bytes=20 * GIB)

        await c.worker("fetcher", "a", "download", DownloadCommand, reject)
        error = error_of(await c.http.post("/v1/downloads", json={"model": "org/big", "nodes": ["a"]}), 507)
    assert error["code"] == "quota_exceeded"
    assert error["details"]["needed_bytes"] == 80 * GIB and error["details"]["node"] == "a"


async def test_state_from_before_the_request_is_not_its_answer(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        old = QuotaExceeded("no room last week").body()
        await c.downloading(DownloadState(node="a", model="org/big", phase="rejected", error=old, updated_at_s=1.0))
        await fetcher(c, "a")
        response = await c.http.post("/v1/downloads", json={"model": "org/big", "nodes": ["a"]})
    assert response.status_code == 202 and response.json()["downloads"][0]["phase"] == "fetching"


async def test_down_node_is_503_names_it_and_sends_nothing(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        await fetcher(c, "a")
        await c.downloading(DownloadState(node="gone", model="org/big", phase="fetching", updated_at_s=1.0))
        await c.seen("/v1/status", lambda s: any(n["node"] == "gone" for n in s["nodes"]))
        before = await c.joined.last_sequence("CMD")
        unknown = error_of(await c.http.post("/v1/downloads", json={"model": "org/big", "nodes": ["gome"]}), 404)
        assert unknown["message"] == "no node named gome: did you mean gone?"
        error = error_of(await c.http.post("/v1/downloads", json={"model": "org/big", "nodes": ["a", "gone"]}), 503)
        assert error["code"] == "node_down" and error["details"]["nodes"] == ["gone"]
        assert await c.joined.last_sequence("CMD") == before


async def test_I10_hostile_names_are_refused_before_anything_is_sent(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        before = await c.joined.last_sequence("CMD")
        for body in ({"model": "../up"}, {"model": "org/big", "nodes": ["a.>"]}, {"model": "org/big", "nodes": []}):
            error_of(await c.http.post("/v1/downloads", json=body), 400)
        assert await c.joined.last_sequence("CMD") == before


async def test_cancel_goes_to_every_node_that_downloads_it(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        asked: list[str] = []

        async def cancel(command: CancelDownload) -> object:
            asked.append(command.model)
            return {"cancelled": True}

        await c.worker("fetcher", "a", "cancel", CancelDownload, cancel)
        await c.downloading(DownloadState(node="a", model="org/big", phase="fetching"))
        await c.downloading(DownloadState(node="b", model="org/big", phase="ready"))
        await c.seen("/v1/downloads", lambda s: len(s["downloads"]) == 2)
        body = (await c.http.post("/v1/downloads/cancel", json={"model": "org/big"})).json()
        assert asked == ["org/big"] and body["nodes"]["a"]["cancelled"] is True and list(body["nodes"]) == ["a"]
        nothing = (await c.http.post("/v1/downloads/cancel", json={"model": "org/none"})).json()
    assert nothing == {"model": "org/none", "nodes": {}}


async def test_pause_and_resume_go_to_the_downloading_nodes_or_to_all(
    gateway: RunningGateway,
) -> None:
    async with cluster(gateway) as c:
        asked: list[tuple[str, str]] = []
        for node in ("a", "b"):

            async def pause(command: PauseDownload, node: str = node) -> object:
                asked.append((node, command.model))
                return {"models": {"org/big": "paused"}}

            await c.worker("fetcher", node, "pause", PauseDownload, pause)
        await c.downloading(DownloadState(node="a", model="org/big", phase="fetching"))
        await c.seen("/v1/downloads", lambda s: len(s["downloads"]) == 1)
        body = (await c.http.post("/v1/downloads/pause", json={"model": "org/big"})).json()
        assert asked == [("a", "org/big")] and body["nodes"]["a"]["models"] == {"org/big": "paused"}
        body = (await c.http.post("/v1/downloads/pause", json={"nodes": "all"})).json()
        assert sorted(asked[1:]) == [("a", ""), ("b", "")] and list(body["nodes"]) == ["a", "b"]
        assert (await c.http.post("/v1/downloads/resume", json={"model": "org/none"})).json()["nodes"] == {}
        error_of(await c.http.post("/v1/downloads/resume", json={"model": "../up"}), 400)


async def test_waiting_caller_hears_that_the_download_was_cancelled(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:

        async def withdrawn(_command: DownloadCommand) -> object:
            raise Cancelled("the download of org/big was cancelled")

        await c.worker("fetcher", "a", "download", DownloadCommand, withdrawn)
        body = {"model": "org/big", "nodes": ["a"], "wait": True}
        assert error_of(await c.http.post("/v1/downloads", json=body), 409)["code"] == "cancelled"
