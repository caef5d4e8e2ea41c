"""Configuration of the streams and buckets, and typed access to the buckets.

Only the functions at the end build keys. A write that meets a NATS outage is retried for a while: all writes are
idempotent, since a put states the whole value and a compare-and-set loses at worst to itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any, TypeVar

import msgspec
from nats.errors import ConnectionClosedError, ConnectionReconnectingError, NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext, api
from nats.js import errors as jse

from shoal_common import subjects
from shoal_common.errors import Unavailable
from shoal_common.logs import Log
from shoal_common.messages import decode, encode
from shoal_common.names import check_id, check_node, quote_key

T = TypeVar("T")
log = Log("buckets")

MIB = 1 << 20
LIVE_TTL_S = 20
LEASE_TTL_S = 10
DONE_TTL_S = 3600
COMMAND_MAX_AGE_S = 3600
EVENT_MAX_AGE_S = 7 * 86400
MARKER_TTL_S = 600
"""How long watchers that were disconnected can still see a deletion; then the key leaves no trace (I8)."""
MAX_CONSUMERS = 100_000
OUTAGE_PATIENCE_S = 60.0
_RETRY_S = 0.25

OUTAGE = (
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

    def bucket(name: str, max_bytes: int, ttl_s: float = 0) -> api.StreamConfig:
        return api.StreamConfig(
            name=f"KV_{name}",
            subjects=[f"$KV.{name}.>"],
            retention=api.RetentionPolicy.LIMITS,
            max_msgs_per_subject=1,
            max_age=ttl_s,
            max_bytes=max_bytes,
            max_msg_size=MIB,
            discard=api.DiscardPolicy.NEW,
            allow_rollup_hdrs=True,
            allow_direct=True,
            allow_msg_ttl=True,
            deny_delete=True,
            duplicate_window=min(ttl_s, 120) or 120,
            subject_delete_marker_ttl=MARKER_TTL_S,
            **common,
        )

    return [
        command,
        event,
        bucket("live", 16 * MIB, LIVE_TTL_S),
        bucket("spec", 64 * MIB),
        bucket("state", 256 * MIB),
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
    "allow_direct",
    "subject_delete_marker_ttl",
)


def differences(wanted: api.StreamConfig, actual: api.StreamConfig) -> list[str]:
    """Return the settings of an existing stream that are not as wanted: `max_age: 60 instead of 3600`."""
    out = []
    for name in _COMPARED:
        want, have = getattr(wanted, name), getattr(actual, name)
        if (want or None) != (have or None):
            out.append(f"{name}: {_plain(have)} instead of {_plain(want)}")
    return out


def _plain(value: object) -> object:
    """Return a setting as NATS writes it: `memory`, not `StorageType.MEMORY`."""
    return value.value if isinstance(value, Enum) else value


async def ensure_streams(js: JetStreamContext, replicas: int = 1) -> None:
    """Create missing streams and correct the settings of existing ones, with a warning.

    Raises Unavailable if the server refuses; the message names the stream and the settings.
    """
    for wanted in stream_configs(replicas):
        name = str(wanted.name)
        try:
            actual = (await patiently(lambda n=name: js.stream_info(n))).config  # type: ignore[misc]  # lambda default binds the loop variable
        except jse.NotFoundError:
            try:
                await patiently(lambda w=wanted: js.add_stream(w))  # type: ignore[misc]  # the same
            except jse.APIError as e:
                raise Unavailable(f"this NATS server refuses the stream {name}: {e.description}") from None
            continue
        mismatches = differences(wanted, actual)
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


async def store_made(js: JetStreamContext) -> str:
    """Return when the stream of `spec` was created: another time after NATS has lost its store."""
    return str((await patiently(lambda: js.stream_info("KV_spec"))).created)


async def patiently(call: Callable[[], Awaitable[T]], patience_s: float = OUTAGE_PATIENCE_S) -> T:
    """Run an idempotent call, retrying while NATS is out. Raises Unavailable after `patience_s`."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + patience_s
    while True:
        try:
            return await call()
        except OUTAGE as e:
            if loop.time() >= give_up:
                raise Unavailable(f"NATS has not answered for {patience_s:.0f} s ({type(e).__name__})") from e
            await asyncio.sleep(_RETRY_S)
        except ConnectionClosedError as e:
            raise Unavailable("the connection to NATS is closed") from e


class Entry(msgspec.Struct, frozen=True):
    """A key's value as read, with the revision that fences a later write."""

    value: bytes
    revision: int


class Fence(msgspec.Struct, frozen=True):
    """A key and its revision: fenced writes succeed only while that key is unchanged."""

    key: str
    revision: int


KV_MARKERS = frozenset({"KV-Operation", "Nats-Marker-Reason"})
"""A message with one of these headers marks a key without a value."""
_WRONG_LAST_SEQUENCE = (10071, 10164)


class Bucket:
    """A KV bucket. All methods ride out short outages and raise Unavailable after long ones."""

    def __init__(self, js: JetStreamContext, name: str) -> None:
        self.js, self.name = js, name
        self.stream = f"KV_{name}"

    def subject(self, key: str) -> str:
        """Return the subject on which a key's values are published."""
        return f"$KV.{self.name}.{key}"

    async def _publish(self, key: str, value: bytes, headers: dict[str, str], ttl_s: int | None) -> int:
        ack = await patiently(lambda: self.js.publish(self.subject(key), value, headers=dict(headers), msg_ttl=ttl_s))
        return int(ack.seq)

    async def put(self, key: str, value: object) -> int:
        """Write a value and return the revision."""
        return await self._publish(key, encode(value), {}, None)

    async def put_behind(self, fence: Fence, key: str, value: object) -> int | None:
        """Write a value, unless the fence has changed: then return None and write nothing."""
        return await self._publish_behind(fence, key, encode(value), {}, None)

    async def delete_behind(self, fence: Fence, key: str) -> bool | None:
        """Remove a key. Returns False if it is absent already, None if the fence has changed."""
        last = await self._last(key)
        if last is None or _is_marker(last):
            return False
        headers = {"KV-Operation": "PURGE", "Nats-Rollup": "sub"}
        return True if await self._publish_behind(fence, key, b"", headers, MARKER_TTL_S) is not None else None

    async def _publish_behind(
        self, fence: Fence, key: str, data: bytes, headers: dict[str, str], ttl_s: int | None
    ) -> int | None:
        expected = {
            "Nats-Expected-Last-Subject-Sequence": str(fence.revision),
            "Nats-Expected-Last-Subject-Sequence-Subject": self.subject(fence.key),
        }
        try:
            return await self._publish(key, data, {**headers, **expected}, ttl_s)
        except jse.APIError as e:
            if e.err_code in _WRONG_LAST_SEQUENCE:
                return None
            raise

    async def swap(self, key: str, value: object, revision: int, ttl_s: int | None = None) -> int | None:
        """Write only if the key's last revision is `revision` (0: it never existed). Returns None otherwise."""
        data = encode(value)
        try:
            return await self._publish(key, data, {"Nats-Expected-Last-Subject-Sequence": str(revision)}, ttl_s)
        except jse.APIError as e:
            if e.err_code not in _WRONG_LAST_SEQUENCE:
                raise
        # A write whose ack was lost in an outage is retried, and then loses to itself.
        last = await self._last(key)
        if last is not None and last.data == data and not _is_marker(last):
            return last.seq
        return None

    async def create(self, key: str, value: object, ttl_s: int | None = None) -> int | None:
        """Write only if the key is absent; an expired key's marker counts as absent. Returns None if it exists."""
        revision = await self.swap(key, value, 0, ttl_s)
        if revision is not None:
            return revision
        last = await self._last(key)
        if last is not None and not _is_marker(last):
            return None
        return await self.swap(key, value, (last.seq or 0) if last is not None else 0, ttl_s)

    async def get(self, key: str) -> Entry | None:
        """Return a key's value and revision, or None."""
        last = await self._last(key)
        if last is None or _is_marker(last):
            return None
        return Entry(value=last.data or b"", revision=last.seq or 0)

    async def get_as(self, key: str, kind: type[T]) -> T | None:
        """Return a key's decoded value, or None."""
        entry = await self.get(key)
        return decode(entry.value, kind) if entry else None

    async def keys(self, pattern: str) -> list[str]:
        """Return the keys that match a pattern (`*.storage`), including recently removed ones."""
        info = await patiently(lambda: self.js.stream_info(self.stream, subjects_filter=self.subject(pattern)))
        return sorted(subject.removeprefix(self.subject("")) for subject in info.state.subjects or {})

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Remove a key; return False if it is absent already. Its marker expires after a while (I8)."""
        last = await self._last(key)
        if last is None or _is_marker(last):
            return False
        fence = last.seq if revision is None else revision
        headers = {
            "KV-Operation": "PURGE",
            "Nats-Rollup": "sub",
            "Nats-Expected-Last-Subject-Sequence": str(fence),
        }
        try:
            await self._publish(key, b"", headers, MARKER_TTL_S)
        except jse.APIError as e:
            if e.err_code in _WRONG_LAST_SEQUENCE and revision is not None:
                return False
            if e.err_code in _WRONG_LAST_SEQUENCE:
                return await self.delete(key)
            raise
        return True

    async def _last(self, key: str) -> api.RawStreamMsg | None:
        try:
            return await patiently(lambda: self.js.get_last_msg(self.stream, self.subject(key), direct=True))
        except jse.NotFoundError:
            return None


def _is_marker(message: api.RawStreamMsg) -> bool:
    return bool((message.headers or {}).keys() & KV_MARKERS)


class Buckets:
    """All buckets of the cluster."""

    def __init__(self, js: JetStreamContext) -> None:
        self.live = Bucket(js, "live")
        self.spec = Bucket(js, "spec")
        self.state = Bucket(js, "state")
        self.lease = Bucket(js, "lease")
        self.done = Bucket(js, "done")


def live_key(node: str, service: str) -> str:
    """Key in `live` of a node's service."""
    return f"{check_node(node)}.{service}"


def download_key(node: str, model: str) -> str:
    """Key in `spec` and `state` of a download of a model (`org/name[@revision]`) to a node."""
    return f"download.{check_node(node)}.{quote_key(model)}"


def model_key(node: str, model: str) -> str:
    """Key in `state` of a model (`org/name@commit`) that a node holds."""
    return f"model.{check_node(node)}.{quote_key(model)}"


def part_key(node: str, model: str) -> str:
    """Key in `state` of a node's shard of a model (`org/name@commit`)."""
    return f"part.{check_node(node)}.{quote_key(model)}"


def node_key(node: str) -> str:
    """Key in `state` of a node that is down, and in `spec` of a drained one."""
    return f"node.{check_node(node)}"


def storage_key(node: str) -> str:
    """Key in `state` of a node's disk."""
    return f"storage.{check_node(node)}"


def links_key(node: str) -> str:
    """Key in `state` of a node's link measurements."""
    return f"links.{check_node(node)}"


def instance_key(instance: str) -> str:
    """Key in `spec` and `state` of an instance."""
    return f"instance.{check_id(instance)}"


def stage_key(instance: str, rank: int) -> str:
    """Key in `state` of a stage of an instance."""
    return f"stage.{check_id(instance)}.{rank}"


def origin_key(blob: str) -> str:
    """Key in `lease` of the node that reads a blob from the hub."""
    return f"origin.{blob}"


def leader_key(service: str) -> str:
    """Key in `lease` of a service's leader."""
    return f"leader.{service}"


def done_key(command: str) -> str:
    """Key in `done` of a command's outcome."""
    return check_id(command)
