"""Connecting to NATS and reading its INFO, JetStream's account, the streams, and the liveness records."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js import api

from shoal_cli.doctor.checks.clocks import ClockOffset
from shoal_cli.doctor.checks.nats import JetStreamSettings, NatsFacts, NatsServerInfo, StreamStatus
from shoal_cli.doctor.probes.tcp_connect import classify_connect_error, connect
from shoal_cli.doctor.probes.timeouts import run_with_timeout
from shoal_cli.node.children.nats_process import NatsPorts
from shoal_cli.node.node_plan import without_token
from shoal_common.bus.cluster_clock import parse_nats_time
from shoal_common.bus.connection import login_of, login_options
from shoal_common.bus.keys import MEMBERS_KEY, storage_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.bus.nats_client import NatsClient
from shoal_common.bus.streams import stream_configs
from shoal_common.config import NATS_PORT
from shoal_common.errors import BadInput, BadMessage, ShoalError
from shoal_common.identity.node_identity import CLI, NodeIdentity
from shoal_common.identity.tls import unverified_context
from shoal_common.messages import DECODE_ERRORS, decode
from shoal_common.messages.instances import InstanceState, StageState
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.messages.membership import Member
from shoal_common.messages.placement import MembersState, NodeState
from shoal_common.messages.storage import StorageState
from shoal_common.units import parse_bytes

_INFO_TIMEOUT_S = 3.0
_ANSWER_TIMEOUT_S = 3.0
_FILES_TIMEOUT_S = 2.0
_NATS_UNITS_S = {"s": 1, "m": 60, "h": 3600}
_NATS_SYNC_INTERVAL = "2m"
"""Where the configuration has none."""
_MAX_INFO_BYTES = 64 << 10
_STREAM_NOT_FOUND = 10059
_MAX_CLIENT_ERRORS = 5


class LivenessSample(msgspec.Struct, frozen=True):
    """A liveness record, and when NATS received it by its own clock."""

    live: LivenessRecord
    received_at_s: float


class ClusterProbe(msgspec.Struct, frozen=True, kw_only=True):
    """What NATS told."""

    facts: NatsFacts
    clock: ClockOffset | None = None
    """Ours against that of NATS."""
    samples: dict[tuple[str, str], LivenessSample] = {}
    """By node and service."""
    certificates: dict[str, str] = {}
    """Of the cluster's members, by node."""
    storage: StorageState | None = None
    stages: list[StageState] = []
    """Of all instances."""
    down_since_s: dict[str, float] = {}
    """Nodes that are down, as placement's leader has published."""
    lacking: dict[str, str] = {}
    """By instance that cannot answer, the reason."""


async def probe(
    urls: list[str], identity: NodeIdentity | None, node: str, expected: bool, run_directory: Path
) -> ClusterProbe:
    """Connect to every server, log in to the first that answers, and ask. Each step has a deadline of its own."""
    answers = await asyncio.gather(*(_read_info(url) for url in urls))
    servers = [server for server, _ in answers]
    facts = NatsFacts(servers=servers, expected=expected)
    good = [(url, info) for url, (server, info) in zip(urls, answers, strict=True) if not server.connect_error]
    if not good:
        return ClusterProbe(facts=facts)
    url, _ = good[0]
    errors: list[str] = []

    async def on_error(error: Exception) -> None:
        if len(errors) < _MAX_CLIENT_ERRORS:
            errors.append(str(error) or type(error).__name__)

    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            login = login_of(identity, CLI) if identity else None
            client = NatsClient(login.key if login else None)
            await client.connect(
                servers=[url],
                name="shoal doctor",
                allow_reconnect=False,
                connect_timeout=round(_ANSWER_TIMEOUT_S),
                error_cb=on_error,
                **login_options(login),
            )
    except BadInput as e:
        return ClusterProbe(facts=msgspec.structs.replace(facts, denied=e.message))
    except (NatsError, OSError, TimeoutError) as e:
        text = "; ".join(dict.fromkeys([*errors, str(e) or type(e).__name__]))
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return ClusterProbe(facts=msgspec.structs.replace(facts, is_foreign=True))
        refused = "authorization" in text.lower() or "authentication" in text.lower()
        return ClusterProbe(facts=msgspec.structs.replace(facts, **{"denied" if refused else "error": text}))
    try:
        result = await _ask(client, facts, node, run_directory)
    finally:
        with suppress(NatsError, OSError, TimeoutError):
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await client.close()
    forbidden = [text for text in errors if "permission" in text.lower()]
    return msgspec.structs.replace(result, facts=msgspec.structs.replace(result.facts, forbidden=forbidden))


async def _read_info(url: str) -> tuple[NatsServerInfo, dict[str, Any]]:
    parts, shown = urlsplit(url), without_token(url)
    if parts.scheme not in ("nats", "tls"):
        return NatsServerInfo(url=shown, jetstream=True), {}  # a web socket: only a client's handshake opens it
    try:
        tls = unverified_context() if parts.scheme == "tls" else None
        _, reader, writer = await connect(parts.hostname or "", parts.port or NATS_PORT, _INFO_TIMEOUT_S, tls)
    except (OSError, TimeoutError, ValueError) as e:
        error, reason = classify_connect_error(e)
        return NatsServerInfo(url=shown, connect_error=error, reason=reason), {}
    try:
        async with asyncio.timeout(_INFO_TIMEOUT_S):
            line = await reader.readline()
    except TimeoutError:
        return NatsServerInfo(url=shown, connect_error="no_reply"), {}
    except (OSError, ValueError) as e:
        return NatsServerInfo(url=shown, connect_error="broken", reason=classify_connect_error(e)[1]), {}
    finally:
        writer.close()
    if not line.startswith(b"INFO ") or len(line) > _MAX_INFO_BYTES:
        return NatsServerInfo(url=shown, connect_error="broken", reason="it is not a NATS server"), {}
    try:
        info = dict(json.loads(line.removeprefix(b"INFO ")))
    except (ValueError, TypeError):
        return NatsServerInfo(url=shown, connect_error="broken", reason="it is not a NATS server"), {}
    server = NatsServerInfo(
        url=shown,
        version=str(info.get("version", "")),
        jetstream=bool(info.get("jetstream")),
        max_payload_bytes=int(info.get("max_payload", 0)),
    )
    return server, info


async def _ask(client: Client, facts: NatsFacts, node: str, run_directory: Path) -> ClusterProbe:
    facts = msgspec.structs.replace(facts, connected=True, settings=await _settings(run_directory, facts.servers))
    try:
        account, _ = await _request(client, "$JS.API.INFO")
    except NoRespondersError:
        return ClusterProbe(facts=msgspec.structs.replace(facts, no_jetstream="nothing answers its API"))
    except (NatsError, TimeoutError, ValueError) as e:
        return ClusterProbe(facts=msgspec.structs.replace(facts, error=str(e) or type(e).__name__))
    if error := account.get("error"):
        return ClusterProbe(facts=msgspec.structs.replace(facts, no_jetstream=str(error.get("description", error))))
    answers = await asyncio.gather(*(_stream(client, config) for config in stream_configs(1)))
    streams = [stream for stream, _ in answers]
    facts = msgspec.structs.replace(
        facts,
        store_used_bytes=int(account.get("storage", 0)),
        store_max_bytes=int(account.get("limits", {}).get("max_storage", -1)),
        streams=streams,
    )
    # Of several readings the fastest one is the most precise.
    clocks = [clock for _, clock in answers if clock is not None]
    existing = {str(s.expected.name) for s in streams if s.actual is not None}
    down_since_s, lacking = await _down(client) if "KV_state" in existing else ({}, {})
    return ClusterProbe(
        facts=facts,
        down_since_s=down_since_s,
        lacking=lacking,
        clock=min(clocks, key=lambda c: c.error_s, default=None),
        samples=await _samples(client) if "KV_live" in existing else {},
        certificates=await _certificates(client) if "KV_spec" in existing else {},
        storage=await _storage(client, node) if node and "KV_state" in existing else None,
        stages=await _stages(client) if "KV_state" in existing else [],
    )


async def _request(client: Client, subject: str) -> tuple[dict[str, Any], ClockOffset | None]:
    """Return an answer of JetStream's API, and our clock against the time in it."""
    began_s = time.time()
    reply = await client.request(subject, b"", timeout=_ANSWER_TIMEOUT_S)
    ended_s = time.time()
    answer = dict(json.loads(reply.data))
    with suppress(KeyError, ValueError):
        nats_s = parse_nats_time(str(answer["ts"]))
        return answer, ClockOffset("", (began_s + ended_s) / 2 - nats_s, (ended_s - began_s) / 2)
    return answer, None


async def _stream(client: Client, expected: api.StreamConfig) -> tuple[StreamStatus, ClockOffset | None]:
    try:
        answer, clock = await _request(client, f"$JS.API.STREAM.INFO.{expected.name}")
    except (NatsError, TimeoutError, ValueError) as e:
        return StreamStatus(expected, error=str(e) or type(e).__name__), None
    if error := answer.get("error"):
        is_missing = error.get("err_code") == _STREAM_NOT_FOUND
        return StreamStatus(expected, error="" if is_missing else str(error.get("description", error))), None
    actual = api.StreamConfig.from_response(answer["config"])
    return StreamStatus(expected, actual, int(answer.get("state", {}).get("bytes", 0))), clock


async def _samples(client: Client) -> dict[tuple[str, str], LivenessSample]:
    samples: dict[tuple[str, str], LivenessSample] = {}
    with suppress(NatsError, TimeoutError):
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            bucket = await client.jetstream(timeout=_ANSWER_TIMEOUT_S).key_value("live")
            left = (await bucket.status()).values
            watcher = await bucket.watchall()
            # nats-py may report the end of the values before any came, when NATS is faster than its own request.
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
                    samples[node, service] = LivenessSample(
                        decode(entry.value or b"", LivenessRecord), created.timestamp()
                    )
    return samples


async def _certificates(client: Client) -> dict[str, str]:
    certificates: dict[str, str] = {}
    with suppress(ShoalError, NatsError, TimeoutError):
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            bucket = Buckets(client.jetstream(timeout=_ANSWER_TIMEOUT_S)).spec
            for key in await bucket.keys("member.*"):
                if member := await bucket.get_as(key, Member):
                    certificates[member.node] = member.certificate
    return certificates


async def _down(client: Client) -> tuple[dict[str, float], dict[str, str]]:
    """Return the nodes that are down, with since when, and the instances that cannot answer, with the reason."""
    down_since_s: dict[str, float] = {}
    lacking: dict[str, str] = {}
    with suppress(ShoalError, NatsError, TimeoutError):
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            state = Buckets(client.jetstream(timeout=_ANSWER_TIMEOUT_S)).state
            members = await state.get_as(MEMBERS_KEY, MembersState) or MembersState()
            for key in await state.keys("node.*"):
                if node := await state.get_as(key, NodeState):
                    down_since_s[node.node] = node.down_since_s
            down_since_s |= members.down_since_s
            for key in await state.keys("instance.*"):
                instance = await state.get_as(key, InstanceState)
                if instance is not None and instance.phase in ("degraded", "failed"):
                    lacking[instance.id] = instance.error.message if instance.error else f"it is {instance.phase}"
    return down_since_s, lacking


async def _storage(client: Client, node: str) -> StorageState | None:
    with suppress(ShoalError, NatsError, TimeoutError):
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            buckets = Buckets(client.jetstream(timeout=_ANSWER_TIMEOUT_S))
            return await buckets.state.get_as(storage_key(node), StorageState)
    return None


async def _stages(client: Client) -> list[StageState]:
    stages: list[StageState] = []
    with suppress(ShoalError, NatsError, TimeoutError):
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            bucket = Buckets(client.jetstream(timeout=_ANSWER_TIMEOUT_S)).state
            for key in await bucket.keys("stage.>"):
                if stage := await bucket.get_as(key, StageState):
                    stages.append(stage)
    return stages


async def _settings(run_directory: Path, servers: Sequence[NatsServerInfo]) -> JetStreamSettings | None:
    with suppress(TimeoutError):
        return await run_with_timeout(_FILES_TIMEOUT_S, lambda: _own_settings(run_directory, servers))
    return None


def _own_settings(run_directory: Path, servers: Sequence[NatsServerInfo]) -> JetStreamSettings | None:
    """Return JetStream's settings as configured, if this node's own server is one of these; else None. Blocking."""
    with suppress(OSError, ValueError, BadInput):
        if _own_ports(run_directory) & {urlsplit(server.url).port for server in servers}:
            return jetstream_settings((run_directory / "nats-server.conf").read_text())
    return None


def _own_ports(run_directory: Path) -> set[int | None]:
    found: set[int | None] = set()
    for file in run_directory.glob("nats-server_*.ports"):
        with suppress(*DECODE_ERRORS):
            found |= {urlsplit(url).port for url in msgspec.json.decode(file.read_bytes(), type=NatsPorts).nats}
    return found


def jetstream_settings(configuration: str) -> JetStreamSettings:
    """Return the settings of a configuration like deploy/nats/nats-server.conf. Raises ValueError, BadInput."""
    values = dict(re.findall(r'^\s*(sync_interval|max_file_store):\s*"?([\w.]+)"?\s*$', configuration, re.MULTILINE))
    size = re.sub("(?i)b$", "iB", values.get("max_file_store", "0"))  # its GB is a GiB, and a number alone is bytes
    sync = values.get("sync_interval", _NATS_SYNC_INTERVAL)
    return JetStreamSettings(
        max_store_bytes=parse_bytes(f"{size}B" if size.isdigit() else size),
        sync_always=sync == "always",
        sync_interval_s=0.0 if sync == "always" else float(sync[:-1]) * _NATS_UNITS_S.get(sync[-1], 1),
    )
