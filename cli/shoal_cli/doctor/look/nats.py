"""Calling NATS: a greeting, a connection, and what JetStream says of itself, its streams and what `live` holds."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import msgspec
import nats
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js import api

from shoal_cli.doctor.clocks import Offset
from shoal_cli.doctor.look.dialling import dial, trouble_of
from shoal_cli.doctor.look.here import with_secret
from shoal_cli.doctor.look.waiting import within
from shoal_cli.doctor.nats import Monitor, NatsFacts, Server, Stream
from shoal_cli.node.natsd import Ports
from shoal_cli.node.plan import NATS_PORT, without_token
from shoal_common.buckets import Buckets, storage_key, stream_configs
from shoal_common.clock import read_time
from shoal_common.errors import BadMessage, ShoalError
from shoal_common.messages import decode
from shoal_common.messages.facts import Live
from shoal_common.messages.records import StorageState

_GREET_S = 3.0
_ANSWER_S = 3.0
_MONITOR_S = 2.0
_MAX_INFO_BYTES = 64 << 10
_NOT_FOUND = 10059
_NO_JETSTREAM = (10039, 10076)
_MAX_FORBIDDEN = 5


class Beat(msgspec.Struct, frozen=True):
    """A liveness value, and when NATS received it, by its own clock."""

    live: Live
    received_at_s: float


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """What NATS has shown."""

    facts: NatsFacts
    clock: Offset | None = None
    """Ours against that of NATS."""
    beats: dict[tuple[str, str], Beat] = {}
    """By node and service."""
    storage: StorageState | None = None


async def look(urls: list[str], secret: str, node: str, expected: bool, run_directory: Path) -> Cluster:
    """Call every server, connect to the first that answers, and ask. Each step has a deadline of its own."""
    greeted = await asyncio.gather(*(_greet(url) for url in urls))
    servers = [server for server, _ in greeted]
    facts = NatsFacts(servers=servers, expected=expected)
    good = [(url, info) for url, (server, info) in zip(urls, greeted, strict=True) if not server.trouble]
    if not good:
        return Cluster(facts=facts)
    url, info = good[0]
    # Whoever does not ask for a credential is not shown one.
    shown = with_secret(url, secret) if info.get("auth_required", True) else url
    said: list[str] = []

    async def on_error(error: Exception) -> None:
        if len(said) < _MAX_FORBIDDEN:
            said.append(str(error) or type(error).__name__)

    try:
        async with asyncio.timeout(_ANSWER_S):
            client = await nats.connect(
                servers=[shown],
                name="shoal doctor",
                allow_reconnect=False,
                connect_timeout=_ANSWER_S,
                error_cb=on_error,
            )
    except (NatsError, OSError, TimeoutError) as e:
        words = "; ".join(dict.fromkeys([*said, str(e) or type(e).__name__]))
        refused = "authorization" in words.lower() or "authentication" in words.lower()
        key = {"denied": words} if refused else {"error": words}
        return Cluster(facts=msgspec.structs.replace(facts, **key))
    try:
        found = await _ask(client, facts, node, run_directory)
    finally:
        with suppress(NatsError, OSError, TimeoutError):
            async with asyncio.timeout(_ANSWER_S):
                await client.close()
    forbidden = [words for words in said if "permission" in words.lower()]
    return msgspec.structs.replace(found, facts=msgspec.structs.replace(found.facts, forbidden=forbidden))


async def _greet(url: str) -> tuple[Server, dict[str, Any]]:
    parts, name = urlsplit(url), without_token(url)
    if parts.scheme not in ("nats", "tls"):
        return Server(url=name, jetstream=True), {}  # a web socket: only a client's handshake opens it
    try:
        _, reader, writer = await dial(parts.hostname or "", parts.port or NATS_PORT, _GREET_S)
    except (OSError, TimeoutError, ValueError) as e:
        trouble, why = trouble_of(e)
        return Server(url=name, trouble=trouble, why=why), {}
    try:
        async with asyncio.timeout(_GREET_S):
            line = await reader.readline()
    except TimeoutError:
        return Server(url=name, trouble="mute"), {}
    except (OSError, ValueError) as e:
        return Server(url=name, trouble="broken", why=trouble_of(e)[1]), {}
    finally:
        writer.close()
    if not line.startswith(b"INFO ") or len(line) > _MAX_INFO_BYTES:
        return Server(url=name, trouble="broken", why="what listens there does not speak NATS"), {}
    try:
        info = dict(json.loads(line.removeprefix(b"INFO ")))
    except (ValueError, TypeError):
        return Server(url=name, trouble="broken", why="what listens there does not speak NATS"), {}
    server = Server(
        url=name,
        version=str(info.get("version", "")),
        jetstream=bool(info.get("jetstream")),
        max_payload_bytes=int(info.get("max_payload", 0)),
    )
    return server, info


async def _ask(client: Client, facts: NatsFacts, node: str, run_directory: Path) -> Cluster:
    facts = msgspec.structs.replace(facts, connected=True, monitor=await _monitor(run_directory, facts.servers))
    try:
        account, _ = await _question(client, "$JS.API.INFO")
    except NoRespondersError:
        return Cluster(facts=msgspec.structs.replace(facts, no_jetstream="nobody answers for it"))
    except (NatsError, TimeoutError, ValueError) as e:
        return Cluster(facts=msgspec.structs.replace(facts, error=str(e) or type(e).__name__))
    if error := account.get("error"):
        return Cluster(facts=msgspec.structs.replace(facts, no_jetstream=str(error.get("description", error))))
    asked = await asyncio.gather(*(_stream(client, wanted) for wanted in stream_configs(1)))
    streams = [stream for stream, _ in asked]
    facts = msgspec.structs.replace(
        facts,
        store_used_bytes=int(account.get("storage", 0)),
        store_max_bytes=int(account.get("limits", {}).get("max_storage", -1)),
        streams=streams,
    )
    # Of several readings the one that took least is the best.
    clocks = [clock for _, clock in asked if clock is not None]
    there = {str(s.wanted.name) for s in streams if s.found is not None}
    return Cluster(
        facts=facts,
        clock=min(clocks, key=lambda c: c.within_s, default=None),
        beats=await _beats(client) if "KV_live" in there else {},
        storage=await _storage(client, node) if node and "KV_state" in there else None,
    )


async def _question(client: Client, subject: str) -> tuple[dict[str, Any], Offset | None]:
    """An answer of JetStream's API, and our clock against the time that it says."""
    began_s = time.time()
    reply = await client.request(subject, b"", timeout=_ANSWER_S)
    ended_s = time.time()
    answer = dict(json.loads(reply.data))
    with suppress(KeyError, ValueError):
        theirs_s = read_time(str(answer["ts"]))
        return answer, Offset("", (began_s + ended_s) / 2 - theirs_s, (ended_s - began_s) / 2)
    return answer, None


async def _stream(client: Client, wanted: api.StreamConfig) -> tuple[Stream, Offset | None]:
    try:
        answer, clock = await _question(client, f"$JS.API.STREAM.INFO.{wanted.name}")
    except (NatsError, TimeoutError, ValueError) as e:
        return Stream(wanted, error=str(e) or type(e).__name__), None
    if error := answer.get("error"):
        gone = error.get("err_code") == _NOT_FOUND
        return Stream(wanted, error="" if gone else str(error.get("description", error))), None
    found = api.StreamConfig.from_response(answer["config"])
    return Stream(wanted, found, int(answer.get("state", {}).get("bytes", 0))), clock


async def _beats(client: Client) -> dict[tuple[str, str], Beat]:
    found: dict[tuple[str, str], Beat] = {}
    with suppress(NatsError, TimeoutError):
        async with asyncio.timeout(_ANSWER_S):
            bucket = await client.jetstream(timeout=_ANSWER_S).key_value("live")
            left = (await bucket.status()).values
            watcher = await bucket.watchall()
            # nats-py says that all has come before any has, where NATS is faster than its own question.
            while left > 0:
                entry = await anext(watcher)
                if entry is None:
                    continue
                left -= 1
                node, _, service = entry.key.partition(".")
                if entry.operation or not service:
                    continue
                with suppress(BadMessage):
                    created: Any = entry.created  # a datetime, whatever its annotation says
                    found[node, service] = Beat(decode(entry.value or b"", Live), created.timestamp())
    return found


async def _storage(client: Client, node: str) -> StorageState | None:
    with suppress(ShoalError, NatsError, TimeoutError):
        async with asyncio.timeout(_ANSWER_S):
            return await Buckets(client.jetstream(timeout=_ANSWER_S)).state.get_as(storage_key(node), StorageState)
    return None


async def _monitor(run_directory: Path, servers: Sequence[Server]) -> Monitor | None:
    """What the monitoring port says, which our own server has on loopback and tells in its ports file."""
    places = {urlsplit(s.url).port for s in servers}
    with suppress(OSError, TimeoutError, ValueError, KeyError, TypeError, httpx2.HTTPError):
        monitoring = await within(_MONITOR_S, lambda: _monitoring(run_directory, places))
        if monitoring:
            async with httpx2.AsyncClient(trust_env=False, timeout=_MONITOR_S) as http:
                config = (await http.get(f"{monitoring}/jsz")).json()["config"]
            return Monitor(
                int(config.get("max_storage", 0)),
                bool(config.get("sync_always", False)),
                int(config.get("sync_interval", 0)) / 1e9,
            )
    return None


def _monitoring(run_directory: Path, places: set[int | None]) -> str:
    """The address of the monitoring port of a server that listens on one of these ports. Raises OSError."""
    for file in run_directory.glob("nats-server_*.ports"):
        with suppress(msgspec.DecodeError):
            ports = msgspec.json.decode(file.read_bytes(), type=Ports)
            if ports.monitoring and {urlsplit(u).port for u in ports.nats} & places:
                return ports.monitoring[0]
    return ""
