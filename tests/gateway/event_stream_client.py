"""A client of `GET /events`: a task that reads a stream, and the events so far."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2
import msgspec

from shoal_common.bus import subjects
from shoal_common.messages import encode
from tests.gateway.running_gateway import RunningGateway
from tests.harness.nats import Joined
from tests.harness.waiting import eventually

READ_DEADLINE_S = 60.0


class ReceivedEvent(msgspec.Struct, frozen=True):
    """One server-sent event."""

    name: str
    cursor: int | None
    data: Any


class EventStreamClient:
    """The events that a stream has delivered."""

    def __init__(self) -> None:
        self.received: list[ReceivedEvent] = []
        self.comments = 0
        self.cursor: int | None = None
        self.over = asyncio.Event()

    def parse_line(self, line: str, parts: dict[str, str]) -> None:
        """Parse one line."""
        if line.startswith(":"):
            self.comments += 1
        elif line:
            name, _, value = line.partition(": ")
            parts[name] = value
        else:
            cursor = int(parts["id"]) if "id" in parts else None
            self.cursor = self.cursor if cursor is None else cursor
            if "data" in parts:
                self.received.append(ReceivedEvent(parts.get("event", ""), cursor, json.loads(parts["data"])))
            parts.clear()

    @property
    def numbers(self) -> list[int]:
        """Return the field `number` of each event, in order of delivery."""
        return [h.data["fields"]["number"] for h in self.received if not h.name]

    def notices(self, name: str) -> list[Any]:
        """Return the events about the stream itself."""
        return [h.data for h in self.received if h.name == name]

    async def wait_until(self, wanted: Callable[[EventStreamClient], object], what: str) -> None:
        """Wait until the condition holds."""

        async def ask() -> bool:
            return bool(wanted(self))

        try:
            await eventually(ask, what, READ_DEADLINE_S)
        except AssertionError:
            raise AssertionError(f"{what}; heard {self.received[-5:]}, cursor {self.cursor}") from None

    async def begun(self) -> None:
        """Wait for the first cursor: everything published from now on is delivered."""
        await self.wait_until(lambda s: s.cursor is not None or s.over.is_set(), "the stream has begun")


@asynccontextmanager
async def event_stream(
    gateway: RunningGateway, last_event_id: int | None = None, **query: str
) -> AsyncIterator[EventStreamClient]:
    """Follow events while the body runs. A stream that breaks counts as ended."""
    listener = EventStreamClient()
    headers = {} if last_event_id is None else {"Last-Event-ID": str(last_event_id)}
    async with (
        httpx2.AsyncClient(
            base_url=gateway.url, timeout=READ_DEADLINE_S, trust_env=False, headers=gateway.key
        ) as http,
        http.stream("GET", "/events", params=query, headers=headers) as response,
    ):
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")

        async def read() -> None:
            parts: dict[str, str] = {}
            with suppress(httpx2.TransportError):
                async for line in response.aiter_lines():
                    listener.parse_line(line, parts)
            listener.over.set()

        reading = asyncio.create_task(read())
        try:
            yield listener
        finally:
            reading.cancel()
            await asyncio.wait({reading})


async def publish_event(
    here: Joined, number: int, node: str = "a", service: str = "storage", event: str = "told"
) -> int:
    """Emit an event as a service does; return its sequence in the log."""
    body = encode({"at_s": 1000.0 + number, "number": number})
    return int((await here.js.publish(subjects.event(service, node, event), body)).seq)


async def consumers(here: Joined) -> int:
    """Return the number of the log's consumers."""
    return len(await here.js.consumers_info("EVT"))
