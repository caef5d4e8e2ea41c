"""`GET /events` over a real gateway and a real NATS: in order, each once, through restarts and failures of both."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from shoal_common.bus.connection import connected
from shoal_common.bus.keys import download_key, model_key
from shoal_common.bus.streams import EVENT_MAX_AGE_S
from shoal_common.messages import encode
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.storage import ModelState
from shoal_gateway.events import log_reader
from shoal_gateway.events.endpoint import MAX_CLIENTS
from shoal_gateway.events.log_reader import EventLogReader
from shoal_gateway.events.sse import Event, EventQuery, KeepAlive
from tests.gateway.event_stream_client import READ_DEADLINE_S, consumers, event_stream, publish_event
from tests.gateway.fake_cluster import error_of
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer, joined
from tests.harness.waiting import eventually


async def test_an_event_is_streamed_with_its_cursor_and_its_emitter(gateway: RunningGateway, fresh: Fresh) -> None:
    node = fresh("node")
    async with joined(gateway.nats) as here, event_stream(gateway, node=node) as stream:
        await stream.begun()
        place = await publish_event(here, 7, node)
        await stream.wait_until(lambda s: s.received, "the event")
    (event,) = stream.received
    assert (event.name, event.cursor) == ("", place)
    assert event.data == {
        "sequence": place,
        "service": "storage",
        "node": node,
        "event": "told",
        "at_s": 1007.0,
        "fields": {"number": 7},
    }


async def test_without_a_cursor_a_stream_begins_with_new_events(gateway: RunningGateway, fresh: Fresh) -> None:
    node = fresh("node")
    async with joined(gateway.nats) as here:
        await publish_event(here, 1, node)
        async with event_stream(gateway, node=node) as stream:
            await stream.begun()
            await publish_event(here, 2, node)
            await stream.wait_until(lambda s: s.received, "an event")
            assert stream.numbers == [2]


async def test_filters_name_a_service_a_node_and_an_event(gateway: RunningGateway, fresh: Fresh) -> None:
    one, other = fresh("node"), fresh("node")
    async with joined(gateway.nats) as here:
        begin = await publish_event(here, 0, one)
        await publish_event(here, 1, one, "storage", "model_ready")
        await publish_event(here, 2, other, "storage", "model_ready")
        await publish_event(here, 3, one, "fetcher", "rejected")
        await publish_event(here, 4, other, "fetcher", "rejected")
        filters: list[tuple[dict[str, str], list[int]]] = [
            ({"node": one}, [1, 3]),
            ({"service": "fetcher"}, [3, 4]),
            ({"event": "model_ready"}, [1, 2]),
            ({"event": "rejected", "node": other}, [4]),
        ]
        for query, numbers in filters:
            async with event_stream(gateway, None, **query, after=str(begin), follow="false") as stream:
                await stream.over.wait()
                assert stream.numbers == numbers, query


async def test_a_cursor_resumes_and_the_header_wins_over_the_query(gateway: RunningGateway, fresh: Fresh) -> None:
    node = fresh("node")
    async with joined(gateway.nats) as here:
        places = [await publish_event(here, number, node) for number in range(5)]
        async with event_stream(gateway, node=node, after=str(places[1]), follow="false") as stream:
            await stream.over.wait()
            assert stream.numbers == [2, 3, 4]
        async with event_stream(gateway, places[3], node=node, last="5", follow="false") as stream:
            await stream.over.wait()
            assert stream.numbers == [4]


async def test_a_cursor_advances_while_no_matching_event_happens(own_nats: NatsServer, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "home", own_nats) as gateway:
        async with joined(own_nats) as here, event_stream(gateway, service="fetcher") as stream:
            await stream.begun()
            place = await publish_event(here, 1, service="storage")
            # Otherwise a client that follows a rare event would get gaps that do not concern it.
            await stream.wait_until(lambda s: s.cursor == place and s.comments, "the cursor has passed it")
            assert stream.received == []


async def test_since_streams_what_is_as_young_and_then_follows(gateway: RunningGateway, fresh: Fresh) -> None:
    node = fresh("node")
    async with joined(gateway.nats) as here:
        await publish_event(here, 1, node)
        for since, before in (("10m", [1]), ("0s", [])):
            async with event_stream(gateway, node=node, since=since, follow="false") as stream:
                await stream.over.wait()
                assert stream.numbers == before
        async with event_stream(gateway, node=node, since="1h") as stream:
            await stream.wait_until(lambda s: s.received, "what was")
            await publish_event(here, 2, node)
            await stream.wait_until(lambda s: len(s.received) == 2, "what is")
            assert stream.numbers == [1, 2]


@pytest.mark.parametrize("last", [0, 1, 3, 12, 100])
async def test_last_streams_as_many_however_rare_they_are(gateway: RunningGateway, fresh: Fresh, last: int) -> None:
    node, other = fresh("node"), fresh("node")
    async with joined(gateway.nats) as here:
        for number in range(12):
            await publish_event(here, number, node)
            for _ in range(number):
                await publish_event(here, -1, other)
        async with event_stream(gateway, node=node, last=str(last), follow="false") as stream:
            await stream.over.wait()
            assert stream.numbers == list(range(12))[max(0, 12 - last) :]


async def test_I7_a_cursor_older_than_the_log_gets_a_gap_and_resumes(own_nats: NatsServer, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "home", own_nats) as gateway:
        async with joined(own_nats) as here:
            config = (await here.js.stream_info("EVT")).config
            assert (config.max_age, config.max_bytes) == (EVENT_MAX_AGE_S, 64 << 20)
            places = [await publish_event(here, number) for number in range(10)]
            await here.js.purge_stream("EVT", keep=4)
            async with event_stream(gateway, places[2], follow="false") as stream:
                await stream.over.wait()
            (lost,) = stream.notices("lost")
            assert (lost["after"], lost["lost_first"], lost["lost_last"]) == (places[2], places[3], places[5])
            assert stream.received[0].name == "lost" and stream.received[0].cursor == lost["cursor"] == places[5]
            assert stream.numbers == [6, 7, 8, 9]
            async with event_stream(gateway, places[5], follow="false") as stream:
                await stream.over.wait()
                assert not stream.notices("lost") and stream.numbers == [6, 7, 8, 9]


async def test_a_cursor_beyond_the_log_starts_over_with_a_log_reset(own_nats: NatsServer, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "home", own_nats) as gateway:
        async with joined(own_nats) as here:
            for number in range(3):
                await publish_event(here, number)
            async with event_stream(gateway, 4711, follow="false") as stream:
                await stream.over.wait()
            assert [n["after"] for n in stream.notices("reset")] == [4711]
            assert stream.numbers == [0, 1, 2]


async def test_a_restart_of_nats_loses_and_repeats_no_event(own_nats: NatsServer, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "home", own_nats) as gateway:
        async with event_stream(gateway) as stream:
            await stream.begun()
            for life in range(3):
                async with joined(own_nats) as here:
                    for number in range(4):
                        await publish_event(here, life * 4 + number)
                own_nats.restart()
            await stream.wait_until(lambda s: len(s.numbers) >= 12, "all events")
            async with joined(own_nats) as here:
                await publish_event(here, 12)
            await stream.wait_until(lambda s: 12 in s.numbers, "one after all restarts")
            assert stream.numbers == list(range(13))
            assert not stream.over.is_set()


async def test_a_stream_survives_a_lost_nats_store_and_reports_it(own_nats: NatsServer, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "home", own_nats) as gateway:
        async with event_stream(gateway) as stream:
            await stream.begun()
            async with joined(own_nats) as here:
                await publish_event(here, 0)
            await stream.wait_until(lambda s: s.numbers == [0], "the first")
            own_nats.wipe()
            async with joined(own_nats) as here:
                # More than before: the number alone would not show that the log was recreated.
                for number in range(1, 4):
                    await publish_event(here, number)
            await stream.wait_until(lambda s: 3 in s.numbers, "those of the new log")
            assert len(stream.notices("reset")) == 1
            assert stream.numbers == [0, 1, 2, 3]


async def test_a_client_of_a_killed_gateway_resumes_at_another(own_nats: NatsServer, tmp_path: Path) -> None:
    async with joined(own_nats) as here:
        with running_gateway(tmp_path / "one", own_nats, node="one") as gateway:
            async with event_stream(gateway) as stream:
                await stream.begun()
                await publish_event(here, 0)
                await stream.wait_until(lambda s: s.numbers == [0], "the first")
                gateway.process.kill()
                await asyncio.wait_for(stream.over.wait(), READ_DEADLINE_S)
        await publish_event(here, 1)
        with running_gateway(tmp_path / "two", own_nats, node="two") as gateway:
            async with event_stream(gateway, stream.cursor) as again:
                await publish_event(here, 2)
                await again.wait_until(lambda s: 2 in s.numbers, "the last")
                assert again.numbers == [1, 2]


async def test_a_gateway_that_stops_ends_its_streams_with_their_cursor(own_nats: NatsServer, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "home", own_nats) as gateway:
        async with joined(own_nats) as here, event_stream(gateway) as stream:
            await stream.begun()
            place = await publish_event(here, 0)
            await stream.wait_until(lambda s: s.received, "the first")
            gateway.process.terminate()
            await asyncio.wait_for(stream.over.wait(), READ_DEADLINE_S)
            (ended,) = stream.notices("ended")
            assert ended["cursor"] == place and "stops" in ended["message"]
            assert await asyncio.to_thread(gateway.process.wait, READ_DEADLINE_S) == 0
            assert "level=error" not in gateway.log.read_text()


async def test_I7_a_client_that_does_not_read_is_ended_with_its_cursor(own_nats: NatsServer, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "home", own_nats) as gateway:
        async with joined(own_nats) as here:
            address = urlsplit(gateway.url)
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect((address.hostname, address.port))
                credential = f"Authorization: {gateway.key['Authorization']}".encode()
                client.sendall(
                    b"GET /events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%b\r\n\r\n" % credential
                )

                async def listens() -> bool:
                    return await consumers(here) == 1

                await eventually(listens, "the stream has begun")
                for number in range(60):
                    body = encode({"number": number, "padding": "x" * 500_000})
                    await here.js.publish("shoal.v1.evt.storage.a.told", body)

                async def given_up() -> bool:
                    return await consumers(here) == 0

                await eventually(given_up, "the gateway has given the client up", READ_DEADLINE_S)
                client.settimeout(READ_DEADLINE_S)
                text = (await asyncio.to_thread(_rest, client)).decode()
            frames = [f for f in text.split("\n\n") if "data: " in f]
            cursors = [int(f.split("id: ")[1].split("\n")[0]) for f in frames]
            assert "event: ended" in frames[-1] and f'"cursor":{cursors[-2]},' in frames[-1]
            # All of it would be 30 MB: only the contents of sockets and one buffer were sent.
            assert cursors[:-1] == list(range(1, len(frames))) and len(frames) < 50
            async with event_stream(gateway, cursors[-1], follow="false") as stream:
                await stream.over.wait()
                assert stream.numbers == list(range(len(frames) - 1, 60))


def _rest(client: socket.socket) -> bytes:
    pieces = []
    while piece := client.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


async def test_I8_a_client_that_disconnects_takes_its_consumer_along(gateway: RunningGateway) -> None:
    async with joined(gateway.nats) as here:

        async def gone() -> bool:
            return await consumers(here) == 0

        await eventually(gone, "no consumer is left of other tests")
        async with event_stream(gateway) as stream:
            await stream.begun()
            (consumer,) = await here.js.consumers_info("EVT")
            assert consumer.config.inactive_threshold == log_reader.CONSUMER_INACTIVE_TIMEOUT_S
        await eventually(gone, "its consumer is removed")


async def test_I8_a_consumer_whose_gateway_vanished_goes_by_itself(
    own_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_reader, "CONSUMER_INACTIVE_TIMEOUT_S", 1.0)
    async with joined(own_nats) as here:
        async with connected([own_nats.url], "vanishing", timeout_s=30) as doomed:
            reader = EventLogReader(doomed, EventQuery(subject="shoal.v1.evt.*.*.*"), 0.2, asyncio.Event())
            items = reader.read()
            assert await anext(items) == KeepAlive(0)
            assert await consumers(here) == 1
            await doomed.client.close()  # nothing can be sent to NATS any more, as after kill -9
            await items.aclose()

        async def gone() -> bool:
            return await consumers(here) == 0

        await eventually(gone, "NATS has removed it", READ_DEADLINE_S)


async def test_a_deleted_consumer_is_recreated_without_loss(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        reader = EventLogReader(here.nats, EventQuery(subject="shoal.v1.evt.*.*.*"), 0.2, asyncio.Event())
        items, numbers = reader.read(), []
        assert await anext(items) == KeepAlive(0)
        for number in range(5):
            await publish_event(here, number)
            async for item in items:
                if isinstance(item, Event):
                    numbers.append(item.fields["number"])
                    break
            for consumer in await here.js.consumers_info("EVT"):
                await here.js.delete_consumer("EVT", consumer.name)
        await items.aclose()
        assert numbers == list(range(5))
        assert await consumers(here) == 0


async def test_I7_only_so_many_clients_follow_at_a_time(own_nats: NatsServer, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "home", own_nats) as gateway:
        async with (
            AsyncExitStack() as streams,
            httpx2.AsyncClient(base_url=gateway.url, trust_env=False, headers=gateway.key) as http,
        ):
            for _ in range(MAX_CLIENTS):
                stream = await streams.enter_async_context(event_stream(gateway))
                await stream.begun()
            assert error_of(await http.get("/events"), 429)["code"] == "busy"
            assert (await http.head("/events")).status_code == 429


async def test_a_malformed_event_query_is_refused_before_streaming(gateway: RunningGateway) -> None:
    async with httpx2.AsyncClient(
        base_url=gateway.url, timeout=READ_DEADLINE_S, trust_env=False, headers=gateway.key
    ) as http:
        for query, param in (
            ({"after": "-1"}, "after"),
            ({"after": "9" * 30}, "after"),
            ({"last": "x"}, "last"),
            ({"last": "10001"}, "last"),
            ({"after": "1", "since": "1h"}, "since"),
            ({"service": "nonsense"}, "service"),
            ({"event": "a.b"}, "event"),
            ({"follow": "perhaps"}, "follow"),
            ({"sinse": "1h"}, "sinse"),
        ):
            assert error_of(await http.get("/events", params=query), 400)["param"] == param
        error_of(await http.get("/events", params={"node": "a.>"}), 400)
        error_of(await http.get("/events", params={"since": "soon"}), 400)
        error_of(await http.get("/events", headers={"Last-Event-ID": "x"}), 400)
        assert (await http.head("/v1/events")).status_code == 200


async def test_whatever_was_published_as_an_event_can_be_streamed(gateway: RunningGateway, fresh: Fresh) -> None:
    node, bodies = (
        fresh("node"),
        [b"\xff\n\nid: 1\n\n", b"[]", b"{}", b'{"at_s": 1e300}', b'{"at_s": "x", "number": 1}'],
    )
    async with joined(gateway.nats) as here:
        for body in bodies:
            await here.js.publish(f"shoal.v1.evt.storage.{node}.told", body)
        async with event_stream(gateway, node=node, last="9", follow="false") as stream:
            await stream.over.wait()
    assert [h.data["fields"] for h in stream.received] == [
        {"text": "�\n\nid: 1\n\n"},
        {"text": "[]"},
        {},
        {},
        {"number": 1},
    ]
    assert all(1e9 < h.data["at_s"] < 1e11 for h in stream.received)


@pytest.mark.parametrize("how", ["purged", "deleted"])
async def test_a_service_that_starts_is_current_without_the_log(
    own_nats: NatsServer, tmp_path: Path, how: str
) -> None:
    commit = "c" * 40
    async with joined(own_nats) as here:
        held = ModelState(node="b", repo="org/m", commit=commit, size_bytes=7, file_count=1)
        await here.buckets.state.put(model_key("b", held.model), held)
        arriving = DownloadState(node="b", model="org/n", phase="fetching", done_bytes=5)
        await here.buckets.state.put(download_key("b", "org/n"), arriving)
        await publish_event(here, 1, event="model_ready")
        await (here.js.purge_stream("EVT") if how == "purged" else here.js.delete_stream("EVT"))
        with running_gateway(tmp_path / "home", own_nats) as gateway:
            async with httpx2.AsyncClient(base_url=gateway.url, trust_env=False, headers=gateway.key) as http:
                status = (await http.get("/v1/status")).json()
            assert [m["model"] for m in status["models"]] == [held.model]
            assert [(d["model"], d["phase"], d["done_bytes"]) for d in status["downloads"]] == [
                ("org/n", "fetching", 5)
            ]
            async with event_stream(gateway) as stream:
                await stream.begun()
                await publish_event(here, 2)
                await stream.wait_until(lambda s: s.numbers == [2], "the log goes on")
