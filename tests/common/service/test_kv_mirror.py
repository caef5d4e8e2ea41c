"""A mirror follows its bucket, whatever happens to NATS meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from nats.aio.msg import Msg

from shoal_common.bus.kv_mirror import KvMirror, MirrorConsumer, follow_forever
from shoal_common.bus.streams import ensure_streams
from shoal_common.messages import WireStruct, encode
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined


class Note(WireStruct):
    """A stored value."""

    text: str


@asynccontextmanager
async def viewing(here: Joined, bucket: str, *keys: str) -> AsyncIterator[KvMirror]:
    view = KvMirror(bucket)
    following = asyncio.create_task(follow_forever(here.nats, view, *keys))
    try:
        await view.wait_loaded(10)
        yield view
    finally:
        following.cancel()
        await asyncio.wait({following})


def texts(view: KvMirror, prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): note.text for key, note in view.items(prefix, Note)}


async def holds(view: KvMirror, prefix: str, wanted: dict[str, str]) -> None:
    """Return once the mirror holds exactly this under the prefix."""
    assert await view.wait_for(lambda v: texts(v, prefix) == wanted or None, 20), texts(view, prefix)


async def test_a_mirror_begins_complete_and_follows_every_change(nats: NatsServer, fresh: Fresh) -> None:
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


async def test_a_snapshot_is_complete_though_its_last_key_expired(
    nats: NatsServer, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = MirrorConsumer.on_message

    async def more_to_come(watch: MirrorConsumer, message: Msg) -> None:
        if not watch.has_snapshot and message.reply.startswith("$JS.ACK"):
            message._metadata = replace(message.metadata, num_pending=1)
        await take(watch, message)

    monkeypatch.setattr(MirrorConsumer, "on_message", more_to_come)
    async with joined(nats) as here:
        prefix, state = f"{fresh('expired')}.", here.buckets.state
        await state.put(f"{prefix}a", Note(text="1"))
        await state.put(f"{prefix}b", Note(text="2"))
        async with viewing(here, "state", f"{prefix}>") as view:
            assert texts(view, prefix) == {"a": "1", "b": "2"}
            await state.put(f"{prefix}c", Note(text="3"))
            await holds(view, prefix, {"a": "1", "b": "2", "c": "3"})


@pytest.mark.parametrize("lost", ["c", "d"])
async def test_a_change_that_never_came_is_noticed(
    nats: NatsServer, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    take, missing = MirrorConsumer.on_message, {lost}

    async def drop_message(watch: MirrorConsumer, message: Msg) -> None:
        key = message.subject.rpartition(".")[2]
        if key in missing:
            missing.remove(key)
        else:
            await take(watch, message)

    monkeypatch.setattr(MirrorConsumer, "on_message", drop_message)
    monkeypatch.setattr("shoal_common.bus.kv_mirror._HEARTBEAT_S", 0.2)
    async with joined(nats) as here:
        prefix, state = f"{fresh('lost')}.", here.buckets.state
        await state.put(f"{prefix}a", Note(text="1"))
        async with viewing(here, "state", f"{prefix}>") as view:
            await state.put(f"{prefix}c", Note(text="3"))
            await state.put(
                f"{prefix}d", Note(text="4")
            )  # by the next message or, after the last one, by the heartbeat
            await holds(view, prefix, {"a": "1", "c": "3", "d": "4"})
            assert not missing


async def test_a_mirror_follows_some_keys_only(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        prefix, state = f"{fresh('some')}.", here.buckets.state
        await state.put(f"{prefix}x.a", Note(text="1"))
        await state.put(f"{prefix}y.a", Note(text="1"))
        async with viewing(here, "state", f"{prefix}x.*", f"{prefix}z.>") as view:
            assert texts(view, prefix) == {"x.a": "1"}
            await state.put(f"{prefix}y.b", Note(text="2"))
            await state.put(f"{prefix}z.b", Note(text="2"))
            await holds(view, prefix, {"x.a": "1", "z.b": "2"})


async def test_ten_thousand_keys_come_in_while_others_are_written(own_nats: NatsServer) -> None:
    count = 10_000
    async with joined(own_nats) as here, joined(own_nats) as other:
        values = [here.buckets.state.subject(f"n.{i}") for i in range(count)]
        note = encode(Note(text="x" * 500))
        for start in range(0, count, 500):
            await asyncio.gather(*(here.js.publish(s, note) for s in values[start : start + 500]))
        async with viewing(here, "state") as view:
            assert len(view.keys()) == count
            await asyncio.gather(*(other.js.publish(s, encode(Note(text="y"))) for s in values[:500]))
            changed = await view.wait_for(
                lambda v: sum(n.text == "y" for _, n in v.items("n.", Note)) == 500 or None, 30
            )
            assert changed


async def test_a_key_that_expires_leaves_the_mirror(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        prefix = f"{fresh('expiring')}."
        async with viewing(here, "lease", f"{prefix}>") as view:
            await here.buckets.lease.create(f"{prefix}a", Note(text="short"), 1)
            await holds(view, prefix, {"a": "short"})
            await holds(view, prefix, {})


async def test_an_empty_bucket_is_a_complete_mirror(nats: NatsServer, fresh: Fresh) -> None:
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
            await view.wait_revision(last)
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


async def test_after_a_kill_of_nats_a_mirror_sees_what_changed(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here, viewing(here, "state", "n.>") as view:
        for name in ("stays", "changes", "goes"):
            await here.buckets.state.put(f"n.{name}", Note(text="1"))
        await holds(view, "n.", {"stays": "1", "changes": "1", "goes": "1"})
        own_nats.restart()
        async with joined(own_nats) as other:  # faster than the mirror's own reconnection, which waits a second
            await other.buckets.state.put("n.changes", Note(text="2"))
            await other.buckets.state.put("n.new", Note(text="1"))
            await other.buckets.state.delete("n.goes")
        await holds(view, "n.", {"stays": "1", "changes": "2", "new": "1"})
        await here.buckets.state.put("n.later", Note(text="1"))
        await holds(view, "n.", {"stays": "1", "changes": "2", "new": "1", "later": "1"})


async def test_a_mirror_survives_a_nats_that_lost_its_store(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here, viewing(here, "state", "n.>") as view:
        await here.buckets.state.put("n.a", Note(text="1"))
        await holds(view, "n.", {"a": "1"})
        own_nats.wipe()
        async with joined(own_nats) as other:
            await ensure_streams(other.js)
        await holds(view, "n.", {})
        await here.buckets.state.put("n.b", Note(text="2"))
        await holds(view, "n.", {"b": "2"})


async def test_I8_mirrors_leave_no_consumer_behind(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        for _ in range(3):
            async with viewing(here, "state") as view:
                assert view.changes
                assert len(await here.js.consumers_info("KV_state")) == 1
        assert await here.js.consumers_info("KV_state") == []


async def test_waiting_for_what_never_comes_ends_at_the_deadline(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, viewing(here, "state", f"{fresh('never')}.>") as view:
        assert await view.wait_for(lambda v: v.get("never", Note), 0.05) is None
