"""A bucket: get, put, compare and set, with a TTL per key and fences.

A server that is killed, or loses its power, rebuilds a bucket from what is in its files: a key whose marker had
expired then has the value before the marker again (nats-server issue 8505). So a key is removed by two markers, of
which the first never expires: it is what comes back. And a lease that came back is known by its age.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from nats.js import JetStreamContext, api
from nats.js import errors as jse

from shoal_common.bus import cluster_clock
from shoal_common.bus.streams import DELETE_MARKER_TTL_S, T, retry_while_nats_down
from shoal_common.messages import decode, encode


class KvEntry(msgspec.Struct, frozen=True):
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
_CREATE_ATTEMPTS = 3
_DELETE, _PURGE = {"KV-Operation": "DEL"}, {"KV-Operation": "PURGE"}
_LEASE_MAX_AGE_S = DELETE_MARKER_TTL_S / 2
"""Far beyond LEASE_TTL_S, since this machine's clock may be off; and one that came back is older than a marker."""


class Bucket:
    """A KV bucket. All methods ride out short outages and raise Unavailable after long ones."""

    def __init__(self, js: JetStreamContext, name: str, max_age_s: float = math.inf) -> None:
        """`max_age_s`: older values have expired, whatever the server says."""
        self.js, self.name, self._max_age_s = js, name, max_age_s
        self.stream = f"KV_{name}"

    def subject(self, key: str) -> str:
        """Return the subject on which a key's values are published."""
        return f"$KV.{self.name}.{key}"

    async def _publish(self, key: str, value: bytes, headers: dict[str, str], ttl_s: int | None) -> int:
        ack = await retry_while_nats_down(
            lambda: self.js.publish(self.subject(key), value, headers=dict(headers), msg_ttl=ttl_s)
        )
        return int(ack.seq)

    async def put(self, key: str, value: object) -> int:
        """Write a value and return the revision."""
        return await self._publish(key, encode(value), {}, None)

    async def put_fenced(self, fence: Fence, key: str, value: object) -> int | None:
        """Write a value, unless the fence has changed: then return None and write nothing."""
        return await self._publish_fenced(fence, key, encode(value), {}, None)

    async def delete_fenced(self, fence: Fence, key: str) -> bool | None:
        """Remove a key. Returns False if it is absent already, None if the fence has changed."""
        last = await self._last_message(key)
        if last is None or self._is_absent(last):
            return False
        return await self._remove(fence, key) or None

    async def _publish_fenced(
        self, fence: Fence, key: str, data: bytes, headers: Mapping[str, str], ttl_s: int | None
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

    async def compare_and_set(self, key: str, value: object, revision: int, ttl_s: int | None = None) -> int | None:
        """Write only if the key's last revision is `revision` (0: it never existed). Returns None otherwise."""
        data = encode(value)
        try:
            return await self._publish(key, data, {"Nats-Expected-Last-Subject-Sequence": str(revision)}, ttl_s)
        except jse.APIError as e:
            if e.err_code not in _WRONG_LAST_SEQUENCE:
                raise
        # A write whose ack was lost in an outage is retried, and then loses to itself.
        last = await self._last_message(key)
        if last is not None and last.data == data and not self._is_absent(last):
            return last.seq
        return None

    async def create(self, key: str, value: object, ttl_s: int | None = None) -> int | None:
        """Write only if the key is absent; an expired key's marker counts as absent. Returns None if it exists."""
        revision = await self.compare_and_set(key, value, 0, ttl_s)
        # The second marker of a removal may come between: whether the key is absent is then looked at again.
        for _ in range(_CREATE_ATTEMPTS):
            if revision is not None:
                break
            last = await self._last_message(key)
            if last is not None and not self._is_absent(last):
                return None
            revision = await self.compare_and_set(key, value, (last.seq or 0) if last is not None else 0, ttl_s)
        return revision

    async def get(self, key: str) -> KvEntry | None:
        """Return a key's value and revision, or None."""
        last = await self._last_message(key)
        if last is None or self._is_absent(last):
            return None
        return KvEntry(value=last.data or b"", revision=last.seq or 0)

    async def get_as(self, key: str, kind: type[T]) -> T | None:
        """Return a key's decoded value, or None."""
        entry = await self.get(key)
        return decode(entry.value, kind) if entry else None

    async def keys(self, pattern: str) -> list[str]:
        """Return the keys that match a pattern (`*.storage`), including recently removed ones."""
        info = await retry_while_nats_down(
            lambda: self.js.stream_info(self.stream, subjects_filter=self.subject(pattern))
        )
        return sorted(subject.removeprefix(self.subject("")) for subject in info.state.subjects or {})

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Remove a key; return False if it is absent already. Its marker expires after a while (I8)."""
        last = await self._last_message(key)
        if last is None or self._is_absent(last):
            return False
        fence = (last.seq or 0) if revision is None else revision
        if await self._remove(Fence(key, fence), key):
            return True
        return False if revision is not None else await self.delete(key)

    async def _remove(self, fence: Fence, key: str) -> bool:
        """Write both markers of a removal, unless the fence has changed: then return False and write nothing.

        The second one, which expires, only replaces the first: the key may have been written again meanwhile.
        """
        marker = await self._publish_fenced(fence, key, b"", _DELETE, None)
        if marker is not None:
            await self._publish_fenced(Fence(key, marker), key, b"", _PURGE, DELETE_MARKER_TTL_S)
        return marker is not None

    async def _last_message(self, key: str) -> api.RawStreamMsg | None:
        try:
            return await retry_while_nats_down(
                lambda: self.js.get_last_msg(self.stream, self.subject(key), direct=True)
            )
        except jse.NotFoundError:
            return None

    def _is_absent(self, message: api.RawStreamMsg) -> bool:
        if (message.headers or {}).keys() & KV_MARKERS:
            return True
        return message.time is not None and cluster_clock.now_s() - message.time.timestamp() > self._max_age_s


class Buckets:
    """All buckets of the cluster."""

    def __init__(self, js: JetStreamContext) -> None:
        self.live = Bucket(js, "live")
        self.spec = Bucket(js, "spec")
        self.state = Bucket(js, "state")
        self.lease = Bucket(js, "lease", _LEASE_MAX_AGE_S)
        self.done = Bucket(js, "done")
