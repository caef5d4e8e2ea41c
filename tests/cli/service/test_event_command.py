"""`shoal events` as a real process, at a real gateway with a real NATS."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from shoal_cli.api.client import iter_lines
from shoal_cli.api.event_stream import EventView, ServerSentEvent, parse_events
from shoal_cli.cli import run
from shoal_cli.commands.events import event_line
from shoal_common.errors import BadInput, InternalError, Unavailable
from tests.gateway.event_stream_client import publish_event
from tests.gateway.running_gateway import running_gateway
from tests.harness.nats import NatsServer, joined
from tests.harness.process import Process, node_environment, started


@asynccontextmanager
async def shoal_events(home: Path, *arguments: str) -> AsyncIterator[Process]:
    """`shoal events …` for the gateway whose address is in this home, as `shoal up` leaves it."""
    environment = node_environment(home, "", PYTHONUNBUFFERED="1", TZ="UTC")
    async with started("-m", "shoal_cli", "events", *arguments, environment=environment) as process:
        yield process


def at(home: Path, url: str) -> None:
    """Say where the gateway is."""
    (home / "run").mkdir(parents=True, exist_ok=True)
    (home / "run" / "gateway.url").write_text(url)


async def test_events_prints_the_last_ones_filtered_and_as_json(own_nats: NatsServer, tmp_path: Path) -> None:
    with running_gateway(tmp_path / "gateway", own_nats) as gateway:
        at(tmp_path, gateway.url)
        async with joined(own_nats) as here:
            for number in range(60):
                await publish_event(here, number, node="a" if number % 2 else "b")
        for arguments, count, last in (
            ([], 50, 59),
            (["-n", "3"], 3, 59),
            (["--since", "1h"], 60, 59),
            (["--node", "b", "-n", "5"], 5, 58),
            (["--service", "fetcher"], 0, None),
            (["--event", "told", "--since", "10m", "--node", "a"], 30, 59),
        ):
            async with shoal_events(tmp_path, *arguments, "--json") as shown:
                assert await shown.wait_exit() == 0, shown.output
            rows = [json.loads(text) for text in shown.lines]
            assert len(rows) == count, (arguments, shown.output)
            assert last is None or rows[-1]["fields"] == {"number": last}
        async with shoal_events(tmp_path, "-n", "1") as shown:
            assert await shown.wait_exit() == 0
        assert shown.lines == ["1970-01-01 00:17:39  a  storage  told  number=59"]


async def test_events_follows_through_restarts_of_gateway_and_nats(own_nats: NatsServer, tmp_path: Path) -> None:
    at(tmp_path, "http://127.0.0.1:9")
    async with shoal_events(tmp_path, "-f") as alone:
        assert await alone.wait_exit() == 5
    async with joined(own_nats) as here:
        with running_gateway(tmp_path / "one", own_nats, node="one") as gateway:
            at(tmp_path, gateway.url)
            await publish_event(here, 0)
            following = shoal_events(tmp_path, "-f", "--json")
            shown = await following.__aenter__()
            try:
                await shown.wait_line('"number":0')
                own_nats.restart()
                async with joined(own_nats) as again:
                    await publish_event(again, 1)
                await shown.wait_line('"number":1')
                gateway.process.kill()
                await shown.wait_line("retrying until it answers")
                async with joined(own_nats) as again:
                    await publish_event(again, 2)
                with running_gateway(tmp_path / "two", own_nats, node="two") as other:
                    at(tmp_path, other.url)
                    async with joined(own_nats) as again:
                        await publish_event(again, 3)
                    await shown.wait_line('"number":3')
                    other.process.terminate()
                    await shown.wait_line("this gateway stops")
                own_nats.wipe()
                async with joined(own_nats) as again:
                    await publish_event(again, 4)
                with running_gateway(tmp_path / "three", own_nats, node="three") as last:
                    at(tmp_path, last.url)
                    await shown.wait_line('"number":4')
                    shown.send(signal.SIGINT)
                    assert await shown.wait_exit() == 0, shown.output
            finally:
                await following.__aexit__(None, None, None)
    rows = [json.loads(text) for text in shown.lines if text.startswith("{")]
    assert [row["fields"]["number"] for row in rows if "notice" not in row] == [0, 1, 2, 3, 4]
    assert [row["notice"] for row in rows if "notice" in row] == ["reset"]
    assert "Traceback" not in shown.output


def test_an_event_is_one_line_without_terminal_control_codes() -> None:
    row = EventView(
        sequence=1,
        service="storage",
        node="a",
        event="told\x1b[2J",
        fields={"models": ["org/a", "org/b"], "reason": "two\nlines \x9b31m", "\x07": None, "size_bytes": 7},
    )
    shown = event_line(row)
    assert shown.isprintable()
    assert "models=org/a,org/b" in shown and shown.endswith("size_bytes=7")


def test_a_stream_is_read_as_its_format_has_it() -> None:
    lines = [": hello", "id: 4", "", "event: lost", "id: 5", "data: {}", "", "id:6", 'data:{"a":1}', "", "id: 7"]
    assert list(parse_events(iter(lines))) == [
        ServerSentEvent("", "4", b""),
        ServerSentEvent("lost", "5", b"{}"),
        ServerSentEvent("", "6", b'{"a":1}'),
    ]


def test_a_line_of_a_stream_ends_at_a_line_feed_alone() -> None:
    """A text may hold other separators of lines, and bytes arrive in any pieces."""
    sent = 'data: "a\u2028b\x85c\x0bd"\r\n\nid: 7\nrest'.encode()
    for size in (1, 3, len(sent)):
        pieces = (sent[at : at + size] for at in range(0, len(sent), size))
        response = httpx2.Response(200, content=pieces)
        assert list(iter_lines(response)) == ['data: "a\u2028b\x85c\x0bd"', "", "id: 7", "rest"]


def test_a_line_of_a_stream_that_never_ends_is_refused() -> None:
    endless = httpx2.Response(200, content=itertools.repeat(b"x" * (1 << 20)))
    endless.request = httpx2.Request("GET", "http://gateway/events")
    with pytest.raises(InternalError, match="more than 16 MiB"):
        list(iter_lines(endless))


@pytest.mark.parametrize("arguments", [["--since", "1h", "-n", "3"], ["--service", "nonsense"], ["-n", "0"]])
def test_what_events_does_not_understand_is_refused(arguments: list[str]) -> None:
    nobody = ["--gateway", "http://127.0.0.1:9"]
    assert run(["events", *arguments, *nobody]) == BadInput.exit_code
    assert run(["events", *nobody]) == Unavailable.exit_code
