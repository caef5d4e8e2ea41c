"""The streams and buckets of the cluster: their configuration, and calls that outlast an outage of NATS."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any, TypeVar

import msgspec
from nats.errors import ConnectionClosedError, ConnectionReconnectingError, NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext, api
from nats.js import errors as jse

from shoal_common.bus import subjects
from shoal_common.bus.network_use import require_network_allowed
from shoal_common.errors import NatsDown, Unavailable
from shoal_common.logs import StructuredLogger

T = TypeVar("T")
log = StructuredLogger("buckets")
MIB = 1 << 20
LIVE_TTL_S = 20
LEASE_TTL_S = 10
DONE_TTL_S = 3600
COMMAND_MAX_AGE_S = 3600
EVENT_MAX_AGE_S = 7 * 86400
DELETE_MARKER_TTL_S = 600
"""How long watchers that were disconnected can still see a deletion; then the key leaves no trace (I8)."""
MAX_CONSUMERS = 100_000
MARK_KEY = "mark"
_MARKED_BUCKETS = ("spec", "state")
OUTAGE_DEADLINE_S = 60.0
_RETRY_INTERVAL_S = 0.25
OUTAGE_ERRORS = (
    NatsTimeoutError,
    NoRespondersError,
    ConnectionReconnectingError,
    jse.NoStreamResponseError,
    jse.ServiceUnavailableError,
)
"""Errors of a NATS server that is restarting."""


def stream_configs(replicas: int) -> list[api.StreamConfig]:
    """Return the configuration of every stream, buckets included."""
    common: dict[str, Any] = {
        "storage": api.StorageType.FILE,
        "num_replicas": replicas,
        # Six services per node follow `live`; a server's default of a thousand is too few for two hundred nodes.
        "max_consumers": MAX_CONSUMERS,
    }
    command = api.StreamConfig(
        name="CMD",
        subjects=[subjects.COMMANDS],
        retention=api.RetentionPolicy.WORK_QUEUE,
        max_age=COMMAND_MAX_AGE_S,
        max_bytes=64 * MIB,
        discard=api.DiscardPolicy.NEW,
        duplicate_window=120,
        # With acks, `nats req` would return "stored" at once. Without them the first reply is the outcome.
        no_ack=True,
        **common,
    )
    event = api.StreamConfig(
        name="EVT",
        subjects=[subjects.EVENTS],
        retention=api.RetentionPolicy.LIMITS,
        max_age=EVENT_MAX_AGE_S,
        max_bytes=64 * MIB,
        discard=api.DiscardPolicy.OLD,
        **common,
    )

    def bucket(name: str, max_bytes: int, ttl_s: float = 0, keys_expire: bool = True) -> api.StreamConfig:
        return api.StreamConfig(
            name=f"KV_{name}",
            subjects=[f"$KV.{name}.>"],
            retention=api.RetentionPolicy.LIMITS,
            max_msgs_per_subject=1,
            max_age=ttl_s,
            max_bytes=max_bytes,
            max_msg_size=MIB,
            discard=api.DiscardPolicy.NEW,
            allow_direct=True,
            allow_msg_ttl=True,
            deny_delete=True,
            duplicate_window=min(ttl_s, 120) or 120,
            # Expiry leaves a marker for watchers. The server then accepts roll-ups too, by which whoever may write
            # one key can remove all: so only where keys expire, and are written again.
            allow_rollup_hdrs=keys_expire,
            subject_delete_marker_ttl=DELETE_MARKER_TTL_S if keys_expire else None,
            **common,
        )

    return [
        command,
        event,
        bucket("live", 16 * MIB, LIVE_TTL_S),
        bucket("spec", 64 * MIB, keys_expire=False),
        bucket("state", 256 * MIB, keys_expire=False),
        bucket("lease", 16 * MIB),
        bucket("done", 64 * MIB, DONE_TTL_S),
    ]


_COMPARED = (
    "subjects",
    "retention",
    "max_age",
    "max_bytes",
    "max_msgs_per_subject",
    "discard",
    "storage",
    "no_ack",
    "allow_msg_ttl",
    "allow_rollup_hdrs",
    "allow_direct",
    "subject_delete_marker_ttl",
)


def config_mismatches(wanted: api.StreamConfig, actual: api.StreamConfig) -> list[str]:
    """Return the settings of an existing stream that are not as wanted: `max_age: 60 instead of 3600`."""
    out = []
    for name in _COMPARED:
        want, have = getattr(wanted, name), getattr(actual, name)
        if (want or None) != (have or None):
            out.append(f"{name}: {_as_nats_writes(have)} instead of {_as_nats_writes(want)}")
    return out


def _as_nats_writes(value: object) -> object:
    """Return a setting as NATS writes it: `memory`, not `StorageType.MEMORY`."""
    return value.value if isinstance(value, Enum) else value


async def ensure_streams(js: JetStreamContext, replicas: int = 1) -> None:
    """Create missing streams and correct the settings of existing ones, with a warning.

    Raises Unavailable if the server refuses; the message names the stream and the settings.
    """
    for wanted in stream_configs(replicas):
        name = str(wanted.name)
        try:
            actual = (await retry_while_nats_down(lambda n=name: js.stream_info(n))).config  # type: ignore[misc]  # lambda default binds the loop variable
        except jse.NotFoundError:
            try:
                await retry_while_nats_down(lambda w=wanted: js.add_stream(w))  # type: ignore[misc]  # the same
            except jse.APIError as e:
                raise Unavailable(f"this NATS server refuses the stream {name}: {e.description}") from None
            continue
        mismatches = config_mismatches(wanted, actual)
        if not mismatches:
            continue
        log.warning("correcting a stream's settings", stream=name, differences="; ".join(mismatches))
        # These cannot be changed for an existing stream.
        wanted.num_replicas, wanted.max_consumers = actual.num_replicas, actual.max_consumers
        try:
            await js.update_stream(wanted)
        except jse.APIError as e:
            raise Unavailable(
                f"stream {name} on this NATS server has other settings ({'; '.join(mismatches)}) and they cannot be "
                f"changed: {e.description}; remove it with `nats stream rm {name}` if nothing else uses it"
            ) from None
    await _write_marks(js)


async def wait_for_streams(js: JetStreamContext) -> None:
    """Return once every stream exists: in a cluster with identities the operator alone makes them.

    Raises Unavailable, naming the one that is missing.
    """
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + OUTAGE_DEADLINE_S
    for name in (str(config.name) for config in stream_configs(1)):
        while True:
            try:
                await retry_while_nats_down(lambda n=name: js.stream_info(n))  # type: ignore[misc]  # lambda default binds the loop variable
                break
            except jse.NotFoundError:
                if loop.time() >= give_up_s:
                    raise Unavailable(
                        f"NATS has no stream {name}: the operator's node makes it; see `shoal doctor` there"
                    ) from None
                await asyncio.sleep(_RETRY_INTERVAL_S)


class BucketMark(msgspec.Struct, frozen=True):
    """What tells that a bucket is still the one it was: a key that is written once, when the bucket is created."""

    created_at: str
    revision: int
    """Of the mark; 0 while there is none."""


async def read_bucket_marks(js: JetStreamContext) -> dict[str, BucketMark]:
    """Return the marks of the buckets that services publish to. Raises NotFoundError if one is gone."""
    return {bucket: await _read_mark(js, bucket) for bucket in _MARKED_BUCKETS}


async def _read_mark(js: JetStreamContext, bucket: str) -> BucketMark:
    stream = f"KV_{bucket}"
    info = await retry_while_nats_down(lambda: js.stream_info(stream))
    try:
        mark = await retry_while_nats_down(lambda: js.get_last_msg(stream, _mark_subject(bucket), direct=True))
    except jse.NotFoundError:
        return BucketMark(str(info.created), 0)
    return BucketMark(str(info.created), mark.seq or 0)


async def _write_marks(js: JetStreamContext) -> None:
    for bucket in _MARKED_BUCKETS:
        # Of several writers the first one wins.
        with suppress(jse.APIError):
            await retry_while_nats_down(
                lambda b=bucket: js.publish(  # type: ignore[misc]  # lambda default binds the loop variable
                    _mark_subject(b), b"{}", headers={"Nats-Expected-Last-Subject-Sequence": "0"}
                )
            )


def _mark_subject(bucket: str) -> str:
    return f"$KV.{bucket}.{MARK_KEY}"


def lost_buckets(before: Mapping[str, BucketMark], now: Mapping[str, BucketMark]) -> list[str]:
    """Return the buckets that have lost everything they held before: created again, or purged."""
    return [
        bucket
        for bucket, mark in now.items()
        if mark.created_at != before[bucket].created_at or mark.revision != before[bucket].revision != 0
    ]


async def retry_while_nats_down(call: Callable[[], Awaitable[T]], deadline_s: float = OUTAGE_DEADLINE_S) -> T:
    """Run an idempotent call, retrying while NATS is out. Raises NatsDown after `deadline_s`."""
    require_network_allowed()
    loop = asyncio.get_running_loop()
    give_up = loop.time() + deadline_s
    while True:
        try:
            return await call()
        except OUTAGE_ERRORS as e:
            if loop.time() >= give_up:
                raise NatsDown(f"NATS has not answered for {deadline_s:.0f} s ({type(e).__name__})") from e
            await asyncio.sleep(_RETRY_INTERVAL_S)
        except ConnectionClosedError as e:
            raise Unavailable("the connection to NATS is closed") from e
