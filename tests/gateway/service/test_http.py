"""The HTTP server: errors in OpenAI's shape everywhere, limits, credentials, health, stopping."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx2
import pytest

from tests.gateway.fake_cluster import chat_request, cluster, error_of, events_of, running, text_of
from tests.gateway.running_gateway import NODE, RunningGateway, running_gateway
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually


async def test_unknown_routes_and_methods_have_the_error_shape(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        for path in ("/nothing", "/v1/completions", "/v1/models/", "/v1/models/a/b/c", "/static/index.html"):
            assert error_of(await c.http.get(path), 404)["code"] == "not_found"
        response = await c.http.put("/v1/downloads")
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert {"GET", "POST"} <= set(response.headers["allow"].split(", "))


async def test_I10_names_in_paths_are_checked(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        for path in ("/v1/models/%2e%2e/x", "/v1/models/org/..%2f..", "/v1/instances/a.b", "/v1/commands/a.%3E"):
            response = await c.http.get(path)
            error_of(response, response.status_code)
            assert response.status_code in (400, 404)
        error_of(await c.http.delete("/v1/models/org/name", params={"node": "*"}), 400)


async def test_unknown_command_is_404(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        assert "nope" in error_of(await c.http.get("/v1/commands/nope"), 404)["message"]


async def test_bodies_that_are_no_json_are_400_on_every_route(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        for path in ("/v1/downloads", "/v1/downloads/cancel", "/v1/instances", "/v1/chat/completions"):
            for body in (b"{", b"[]", b"\xff", b"", b"[" * 100_000):
                assert error_of(await c.http.post(path, content=body), 400)["code"] == "bad_message"


async def test_body_past_the_limit_is_413_stated_or_not(gateway: RunningGateway) -> None:
    async def pieces(count: int) -> object:
        for _ in range(count):
            yield b" " * (1 << 20)

    async with cluster(gateway) as c:
        error_of(await c.http.post("/v1/chat/completions", content=b" " * ((8 << 20) + 1)), 413)
        error_of(await c.http.post("/v1/chat/completions", content=pieces(9)), 413)  # type: ignore[arg-type]  # chunks
        error_of(await c.http.post("/v1/chat/completions", content=pieces(8)), 400)  # type: ignore[arg-type]  # chunks


async def test_page_is_one_file_that_may_load_nothing_from_elsewhere(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        response = await c.http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    for loading in ("src=", "@import", "url(", "http:", "https:", "innerHTML"):
        assert loading not in response.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
    ],
    ids=str,
)
async def test_I12_foreign_page_may_not_drive_the_api(gateway: RunningGateway, headers: dict[str, str]) -> None:
    async with cluster(gateway) as c:
        response = await c.http.post("/v1/downloads", json={"model": "org/x"}, headers=headers)
        assert error_of(response, 403)["code"] == "cross_origin"
        if "Host" in headers:
            error_of(await c.http.get("/v1/status", headers=headers), 403)


async def test_own_page_may_use_the_api(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        headers = {"Origin": c.gateway.url, "Sec-Fetch-Site": "same-origin"}
        error_of(await c.http.post("/v1/downloads", json={"model": "org/x"}, headers=headers), 503)


async def test_health_is_503_while_nats_is_down_and_ok_when_it_is_back(tmp_path: Path, own_nats: NatsServer) -> None:
    with running_gateway(tmp_path / "home", own_nats) as gateway:
        async with httpx2.AsyncClient(base_url=gateway.url, trust_env=False, headers=gateway.key) as http:

            async def status_is(code: int) -> bool:
                return (await http.get("/health")).status_code == code

            assert (await http.get("/health")).json()["node"] == NODE
            own_nats.kill()
            await eventually(lambda: status_is(503), "503 from /health")
            error_of(await http.get("/health"), 503)
            error_of(await http.post("/v1/chat/completions", json=chat_request()), 503)
            error_of(await http.get("/v1/commands/some-id"), 503)
            status = (await http.get("/v1/status")).json()
            assert status["nats_connected"] is False and [n["node"] for n in status["nodes"]] == [NODE]
            own_nats.start()
            await eventually(lambda: status_is(200), "200 from /health")
            assert (await http.get("/v1/status")).json()["nats_connected"] is True


async def test_stopping_finishes_the_running_answer_and_takes_no_more(tmp_path: Path, own_nats: NatsServer) -> None:
    with running_gateway(tmp_path / "home", own_nats) as own:
        async with running(own) as (c, peer):
            asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request(stream=True)))
            prompt = await peer.prompt()
            await prompt.publish_tokens("be")
            own.process.send_signal(signal.SIGTERM)

            async def refused() -> bool:
                async with httpx2.AsyncClient(base_url=own.url, trust_env=False) as http:
                    try:
                        await http.get("/health")
                    except httpx2.TransportError:
                        return True
                    return False

            await eventually(refused, "no new connections")
            await prompt.publish_tokens("fore", first=1, finish=True)
            assert text_of(events_of((await asking).text)) == "before"
        assert await asyncio.to_thread(own.process.wait, 10) == 0
        assert "Traceback" not in own.log.read_text()


async def test_port_in_use_is_logged_and_ends_the_process(gateway: RunningGateway, tmp_path: Path) -> None:
    port = gateway.url.rpartition(":")[2]
    with (
        pytest.raises(AssertionError, match=r"cannot listen on 127\.0\.0\.1 port"),
        running_gateway(tmp_path / "home", gateway.nats, node="other", SHOAL_GATEWAY_PORT=port),
    ):
        pass


async def test_answers_are_not_held_back_by_nagles_algorithm(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        loop, took_s = asyncio.get_running_loop(), []
        for _ in range(20):
            began_s = loop.time()
            await c.http.get("/health")
            took_s.append(loop.time() - began_s)
    # Headers and body are two writes: with Nagle's algorithm each answer waits 40 ms for the acknowledgement.
    assert min(took_s) < 0.035, took_s
