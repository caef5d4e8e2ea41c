"""The streams and buckets, and typed access to them.

Keys are made by the functions at the end and nowhere else. A write that meets an outage of NATS is tried again
for a while, because all of them are idempotent: a put says what is, a compare-and-set loses to itself at worst.
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
"""How long a deletion stays readable for watchers that were away; then the key leaves no trace (I8)."""
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
"""What a NATS server that is restarting looks like from here."""


def stream_configs(replicas: int) -> list[api.StreamConfig]:
    """Every stream, buckets included, as it has to be."""
    common: dict[str, Any] = {
        "storage": api.StorageType.FILE,
        "num_replicas": replicas,
        # Six services a node follow `live`: a server's own default, a thousand, is not enough for two hundred nodes.
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


def differences(wanted: api.StreamConfig, found: api.StreamConfig) -> list[str]:
    """Which settings of an existing stream are not as wanted: `max_age: 60 instead of 3600`."""
    out = []
    for name in _COMPARED:
        want, have = getattr(wanted, name), getattr(found, name)
        if (want or None) != (have or None):
            out.append(f"{name}: {_plain(have)} instead of {_plain(want)}")
    return out


def _plain(value: object) -> object:
    """A setting as NATS writes it: `memory`, not `StorageType.MEMORY`."""
    return value.value if isinstance(value, Enum) else value


async def ensure_streams(js: JetStreamContext, replicas: int = 1) -> None:
    """Create what is missing, and bring what exists with other settings in line, saying so.

    Raises Unavailable when the server refuses: the message names the stream and the settings.
    """
    for wanted in stream_configs(replicas):
        name = str(wanted.name)
        try:
            found = (await patiently(lambda n=name: js.stream_info(n))).config  # type: ignore[misc]  # lambda default binds the loop variable
        except jse.NotFoundError:
            try:
                await patiently(lambda w=wanted: js.add_stream(w))  # type: ignore[misc]  # the same
            except jse.APIError as e:
                raise Unavailable(f"this NATS server refuses the stream {name}: {e.description}") from None
            continue
        wrong = differences(wanted, found)
        if not wrong:
            continue
        log.warning("a stream's settings differ; changing them", stream=name, differences="; ".join(wrong))
        # What cannot be changed of a stream that exists stays as it is.
        wanted.num_replicas, wanted.max_consumers = found.num_replicas, found.max_consumers
        try:
            await js.update_stream(wanted)
        except jse.APIError as e:
            raise Unavailable(
                f"stream {name} on this NATS server has other settings ({'; '.join(wrong)}) and they cannot be "
                f"changed: {e.description}; remove it with `nats stream rm {name}` if nothing else uses it"
            ) from None


async def store_made(js: JetStreamContext) -> str:
    """When what NATS keeps of what people asked for was begun: another moment after it has lost its store."""
    return str((await patiently(lambda: js.stream_info("KV_spec"))).created)


async def patiently(call: Callable[[], Awaitable[T]], patience_s: float = OUTAGE_PATIENCE_S) -> T:
    """Run an idempotent call, again and again while NATS is out, for `patience_s`. Then Unavailable."""
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
    """A key and its revision: writes behind it are taken only as long as nobody has written that key since."""

    key: str
    revision: int


KV_MARKERS = frozenset({"KV-Operation", "Nats-Marker-Reason"})
"""A message with one of these headers says that its key has no value."""
_LOST_RACE = (10071, 10164)


class Bucket:
    """One KV bucket. All methods ride out short outages and raise Unavailable after long ones."""

    def __init__(self, js: JetStreamContext, name: str) -> None:
        self.js, self.name = js, name
        self.stream = f"KV_{name}"

    def subject(self, key: str) -> str:
        """Where a key's values are published."""
        return f"$KV.{self.name}.{key}"

    async def _publish(self, key: str, value: bytes, headers: dict[str, str], ttl_s: int | None) -> int:
        ack = await patiently(lambda: self.js.publish(self.subject(key), value, headers=dict(headers), msg_ttl=ttl_s))
        return int(ack.seq)

    async def put(self, key: str, value: object) -> int:
        """Say what is. Returns the revision."""
        return await self._publish(key, encode(value), {}, None)

    async def put_behind(self, fence: Fence, key: str, value: object) -> int | None:
        """Say what is, unless the fence is another's by now: then None, and nothing is written."""
        return await self._publish_behind(fence, key, encode(value), {}, None)

    async def delete_behind(self, fence: Fence, key: str) -> bool | None:
        """Remove a key. False when it is absent already; None when the fence is another's."""
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
            if e.err_code in _LOST_RACE:
                return None
            raise

    async def swap(self, key: str, value: object, revision: int, ttl_s: int | None = None) -> int | None:
        """Write only if the key's last revision is `revision` (0: it never was). None when somebody was faster."""
        data = encode(value)
        try:
            return await self._publish(key, data, {"Nats-Expected-Last-Subject-Sequence": str(revision)}, ttl_s)
        except jse.APIError as e:
            if e.err_code not in _LOST_RACE:
                raise
        # A write whose ack was lost in an outage is retried and then loses to itself.
        last = await self._last(key)
        if last is not None and last.data == data and not _is_marker(last):
            return last.seq
        return None

    async def create(self, key: str, value: object, ttl_s: int | None = None) -> int | None:
        """Write only if the key is absent, seeing through the marker of an expired one. None when it is held."""
        revision = await self.swap(key, value, 0, ttl_s)
        if revision is not None:
            return revision
        last = await self._last(key)
        if last is not None and not _is_marker(last):
            return None
        return await self.swap(key, value, (last.seq or 0) if last is not None else 0, ttl_s)

    async def get(self, key: str) -> Entry | None:
        """What the key holds, or None."""
        last = await self._last(key)
        if last is None or _is_marker(last):
            return None
        return Entry(value=last.data or b"", revision=last.seq or 0)

    async def get_as(self, key: str, kind: type[T]) -> T | None:
        """What the key holds, decoded, or None."""
        entry = await self.get(key)
        return decode(entry.value, kind) if entry else None

    async def keys(self, pattern: str) -> list[str]:
        """Keys that match (`*.storage`), those that were removed a moment ago among them."""
        info = await patiently(lambda: self.js.stream_info(self.stream, subjects_filter=self.subject(pattern)))
        return sorted(subject.removeprefix(self.subject("")) for subject in info.state.subjects or {})

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Remove a key. Absent already: nothing is written. Its marker goes by itself after a while (I8)."""
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
            if e.err_code in _LOST_RACE and revision is not None:
                return False
            if e.err_code in _LOST_RACE:
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
    """`live`: a node's service."""
    return f"{check_node(node)}.{service}"


def download_key(node: str, model: str) -> str:
    """`spec` and `state`: a model (`org/name[@revision]`) wanted on a node."""
    return f"download.{check_node(node)}.{quote_key(model)}"


def model_key(node: str, model: str) -> str:
    """`state`: a model (`org/name@commit`) held by a node."""
    return f"model.{check_node(node)}.{quote_key(model)}"


def part_key(node: str, model: str) -> str:
    """`state`: a model (`org/name@commit`) of which a node has some layers."""
    return f"part.{check_node(node)}.{quote_key(model)}"


def node_key(node: str) -> str:
    """`state`: a node that is silent. `spec`: one that is drained."""
    return f"node.{check_node(node)}"


def storage_key(node: str) -> str:
    """`state`: a node's disk."""
    return f"storage.{check_node(node)}"


def links_key(node: str) -> str:
    """`state`: what a node has measured of its ways to others."""
    return f"links.{check_node(node)}"


def instance_key(instance: str) -> str:
    """`spec` and `state`: an instance."""
    return f"instance.{check_id(instance)}"


def stage_key(instance: str, rank: int) -> str:
    """`state`: a stage of an instance."""
    return f"stage.{check_id(instance)}.{rank}"


def origin_key(blob: str) -> str:
    """`lease`: who reads a blob from the hub for everyone."""
    return f"origin.{blob}"


def leader_key(service: str) -> str:
    """`lease`: who leads a service."""
    return f"leader.{service}"


def done_key(command: str) -> str:
    """`done`: how a command ended."""
    return check_id(command)
