"""A view follows its bucket, whatever happens to NATS in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from nats.js.kv import KeyValue

from shoal_common.buckets import ensure_streams
from shoal_common.messages import Message
from shoal_common.watch import View, follow
from tests.harness.nats import Joined, NatsServer, joined

Fresh = Callable[[str], str]


class Note(Message):
    """Something to keep."""

    text: str


@asynccontextmanager
async def viewing(here: Joined, bucket: str, keys: str = ">") -> AsyncIterator[View]:
    view = View(bucket)
    following = asyncio.create_task(follow(here.nats, view, keys))
    try:
        await view.complete(10)
        yield view
    finally:
        following.cancel()
        await asyncio.wait({following})


def texts(view: View, prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): note.text for key, note in view.items(prefix, Note)}


async def holds(view: View, prefix: str, wanted: dict[str, str]) -> None:
    """Return once the view holds exactly this under the prefix."""
    assert await view.until(lambda v: texts(v, prefix) == wanted or None, 20), texts(view, prefix)


async def test_a_view_begins_whole_and_follows_every_change(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        prefix, state = f"{fresh('view')}.", here.buckets.state
        await state.put(f"{prefix}a", Note(text="1"))
        await state.put(f"{prefix}gone", Note(text="1"))
        await state.delete(f"{prefix}gone")
        async with viewing(here, "state", f"{prefix}>") as view:
            assert texts(view, prefix) == {"a": "1"}
            await state.put(f"{prefix}b", Note(text="2"))
            await state.put(f"{prefix}a", Note(text="3"))
            await holds(view, prefix, {"a": "3", "b": "2"})
            await state.delete(f"{prefix}a")
            await holds(view, prefix, {"b": "2"})
            assert view.get(f"{prefix}a", Note) is None


class Hasty:
    """A real watcher whose word that all has come overtakes what comes, as that of nats-py may."""

    def __init__(self, watcher: KeyValue.KeyWatcher) -> None:
        self._watcher, self._sub, self.stop = watcher, watcher._sub, watcher.stop

    async def __aiter__(self) -> AsyncIterator[KeyValue.Entry | None]:
        yield None
        async for entry in self._watcher:
            if entry is not None:
                yield entry


async def test_a_view_is_not_whole_before_all_that_the_server_has_sent_is_in_it(
    nats: NatsServer, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = KeyValue.watch

    async def hasty(bucket: KeyValue, keys: str) -> Hasty:
        return Hasty(await watch(bucket, keys))

    monkeypatch.setattr(KeyValue, "watch", hasty)
    async with joined(nats) as here:
        prefix, state = f"{fresh('hasty')}.", here.buckets.state
        await state.put(f"{prefix}a", Note(text="1"))
        await state.put(f"{prefix}b", Note(text="2"))
        async with viewing(here, "state", f"{prefix}>") as view:
            assert texts(view, prefix) == {"a": "1", "b": "2"}
            await state.put(f"{prefix}c", Note(text="3"))
            await holds(view, prefix, {"a": "1", "b": "2", "c": "3"})


async def test_a_key_that_expires_leaves_the_view(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        prefix = f"{fresh('expiring')}."
        async with viewing(here, "lease", f"{prefix}>") as view:
            await here.buckets.lease.create(f"{prefix}a", Note(text="short"), 1)
            await holds(view, prefix, {"a": "short"})
            await holds(view, prefix, {})


async def test_an_empty_bucket_is_a_complete_view(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, viewing(here, "state", f"{fresh('nothing')}.>") as view:
        assert list(view.items("", Note)) == []


async def test_writing_the_same_again_is_no_change(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        prefix, state = f"{fresh('same')}.", here.buckets.state
        await state.put(f"{prefix}a", Note(text="1"))
        async with viewing(here, "state", f"{prefix}>") as view:
            seen = view.changes
            await state.put(f"{prefix}a", Note(text="1"))
            last = await state.put(f"{prefix}b", Note(text="2"))
            await view.reached(last)
            assert view.changes == seen + 1


async def test_values_that_do_not_decode_are_absent_and_harm_nothing(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        prefix, state = f"{fresh('bad')}.", here.buckets.state
        for name, junk in {"a": b"{", "b": b'{"text": 7}', "c": b"\xff", "d": b"[]"}.items():
            await here.js.publish(state.subject(f"{prefix}{name}"), junk)
        await state.put(f"{prefix}good", Note(text="1"))
        async with viewing(here, "state", f"{prefix}>") as view:
            assert texts(view, prefix) == {"good": "1"}
            await here.js.publish(state.subject(f"{prefix}good"), b"{")
            await holds(view, prefix, {})
            await state.put(f"{prefix}good", Note(text="2"))
            await holds(view, prefix, {"good": "2"})


async def test_after_a_kill_of_nats_a_view_knows_what_changed_meanwhile(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here, viewing(here, "state", "n.>") as view:
        for name in ("stays", "changes", "goes"):
            await here.buckets.state.put(f"n.{name}", Note(text="1"))
        await holds(view, "n.", {"stays": "1", "changes": "1", "goes": "1"})
        own_nats.restart()
        async with joined(own_nats) as other:  # faster than the view's own reconnection, which waits a second
            await other.buckets.state.put("n.changes", Note(text="2"))
            await other.buckets.state.put("n.new", Note(text="1"))
            await other.buckets.state.delete("n.goes")
        await holds(view, "n.", {"stays": "1", "changes": "2", "new": "1"})
        await here.buckets.state.put("n.later", Note(text="1"))
        await holds(view, "n.", {"stays": "1", "changes": "2", "new": "1", "later": "1"})


async def test_a_view_survives_a_nats_that_lost_everything(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here, viewing(here, "state", "n.>") as view:
        await here.buckets.state.put("n.a", Note(text="1"))
        await holds(view, "n.", {"a": "1"})
        own_nats.wipe()
        async with joined(own_nats) as other:
            await ensure_streams(other.js)
        await holds(view, "n.", {})
        await here.buckets.state.put("n.b", Note(text="2"))
        await holds(view, "n.", {"b": "2"})


async def test_I8_views_leave_no_consumer_behind(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        for _ in range(3):
            async with viewing(here, "state") as view:
                assert view.changes
        async with viewing(here, "state"):
            assert len(await here.js.consumers_info("KV_state")) <= 1 + 3  # ephemeral: the server reaps the others


async def test_waiting_for_what_never_comes_ends_at_the_deadline(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, viewing(here, "state", f"{fresh('never')}.>") as view:
        assert await view.until(lambda v: v.get("never", Note), 0.05) is None
