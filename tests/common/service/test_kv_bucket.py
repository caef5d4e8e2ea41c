"""Streams and buckets: compare-and-set across deletions, and stream settings."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from nats.js import api
from nats.js import errors as jse

from shoal_common.bus import kv_bucket, streams
from shoal_common.bus.kv_bucket import Bucket, Fence
from shoal_common.bus.streams import config_mismatches, ensure_streams, stream_configs
from shoal_common.errors import Unavailable
from shoal_common.messages import WireStruct
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.waiting import eventually


class Note(WireStruct):
    """A stored value."""

    text: str


async def test_a_value_reads_back_with_the_revision_for_a_fenced_write(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        key, state = fresh("key"), here.buckets.state
        first = await state.put(key, Note(text="one"))
        assert await state.compare_and_set(key, Note(text="two"), first - 1) is None
        second = await state.compare_and_set(key, Note(text="two"), first)
        assert second is not None and second > first
        entry = await state.get(key)
        assert entry is not None and entry.revision == second
        assert await state.get_as(key, Note) == Note(text="two")
        assert await state.get_as(fresh("absent"), Note) is None


async def test_of_twenty_racers_one_creates_a_key(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        for round_name in ("absent", "deleted"):
            key = fresh(round_name)
            if round_name == "deleted":
                await here.buckets.lease.put(key, Note(text="before"))
                await here.buckets.lease.delete(key)
            racers = [here.buckets.lease.create(key, Note(text=f"racer {i}"), 10) for i in range(20)]
            won = [r for r in await asyncio.gather(*racers) if r is not None]
            assert len(won) == 1
            entry = await here.buckets.lease.get(key)
            assert entry is not None and entry.revision == won[0]


async def test_a_key_can_be_created_over_its_expiry_marker(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        key, lease = fresh("expiring"), here.buckets.lease
        assert await lease.create(key, Note(text="short"), 1) is not None
        assert await lease.create(key, Note(text="too early"), 1) is None
        await eventually(lambda: expired(here, key), "the key expires and leaves a marker")
        assert await lease.get(key) is None
        assert await lease.create(key, Note(text="again"), 10) is not None
        assert await lease.get_as(key, Note) == Note(text="again")


async def expired(here: Joined, key: str) -> api.RawStreamMsg | None:
    last = await here.js.get_last_msg("KV_lease", f"$KV.lease.{key}")
    return last if "Nats-Marker-Reason" in (last.headers or {}) else None


async def test_I5_deleting_what_is_absent_writes_nothing(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        key, spec = fresh("gone"), here.buckets.spec
        await spec.put(key, Note(text="here"))
        assert await spec.delete(key)
        before = await here.last_sequence("KV_spec")
        assert not await spec.delete(key)
        assert not await spec.delete(fresh("never"))
        assert await here.last_sequence("KV_spec") == before


async def test_I5_many_may_delete_one_key_and_only_one_writes(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        key, spec = fresh("contested"), here.buckets.spec
        await spec.put(key, Note(text="here"))
        before = await here.last_sequence("KV_spec")
        await asyncio.gather(*(spec.delete(key) for _ in range(10)))
        assert await spec.get(key) is None
        assert await here.last_sequence("KV_spec") == before + 2, "a marker that stays, then one that expires"


async def test_a_fenced_delete_spares_a_newer_value(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        key, state = fresh("newer"), here.buckets.state
        old = await state.put(key, Note(text="old"))
        await state.put(key, Note(text="new"))
        assert not await state.delete(key, old)
        assert await state.get_as(key, Note) == Note(text="new")


async def test_I8_a_deletion_leaves_no_trace_for_ever(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        key = fresh("traceless")
        await here.buckets.state.put(key, Note(text="here"))
        await here.buckets.state.delete(key)
        marker = await here.js.get_last_msg("KV_state", f"$KV.state.{key}")
        assert (marker.headers or {})["Nats-TTL"].rstrip("s") == str(streams.DELETE_MARKER_TTL_S)


async def test_a_write_rides_out_a_restart_of_nats(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        state = Bucket(here.client.jetstream(timeout=1), "state")
        own_nats.kill()
        writing = asyncio.create_task(state.put("patient", Note(text="kept")))
        own_nats.start()
        await writing  # it was sent into a dead connection, and is sent again
        assert await here.buckets.state.get_as("patient", Note) == Note(text="kept")


async def test_an_outage_longer_than_the_timeout_raises(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        own_nats.kill()
        impatient = here.client.jetstream(timeout=0.2)
        with pytest.raises(Unavailable, match="NATS"):
            await streams.retry_while_nats_down(lambda: impatient.stream_info("CMD"), deadline_s=0.1)


async def test_I5_ensuring_the_streams_again_changes_nothing(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        wanted = stream_configs(1)
        for config in wanted:
            assert config_mismatches(config, (await here.js.stream_info(str(config.name))).config) == []
        await here.buckets.state.put("kept", Note(text="kept"))
        await asyncio.gather(*(ensure_streams(here.js) for _ in range(5)))
        assert {s.config.name for s in await here.js.streams_info()} == {c.name for c in wanted}
        assert await here.buckets.state.get_as("kept", Note) == Note(text="kept")


async def test_I7_every_stream_has_a_limit(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        infos = await here.js.streams_info()
        assert len(infos) == len(stream_configs(1))
        for info in infos:
            assert (info.config.max_bytes or 0) > 0
            assert info.config.storage == api.StorageType.FILE


async def test_an_existing_stream_is_reconfigured_and_keeps_messages(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        await here.buckets.state.put("kept", Note(text="kept"))
        config = (await here.js.stream_info("KV_state")).config
        config.max_bytes = 10 * streams.MIB
        await here.js.update_stream(config)
        await ensure_streams(here.js)
        assert (await here.js.stream_info("KV_state")).config.max_bytes == 256 * streams.MIB
        assert await here.buckets.state.get_as("kept", Note) == Note(text="kept")


async def test_a_stream_that_cannot_be_reconfigured_is_refused_by_name(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        await here.js.delete_stream("KV_done")
        wanted = next(c for c in stream_configs(1) if c.name == "KV_done")
        wanted.storage = api.StorageType.MEMORY
        await here.js.add_stream(wanted)
        with pytest.raises(Unavailable, match=r"KV_done.*storage"):
            await ensure_streams(here.js)


async def test_a_foreign_stream_on_our_subjects_is_refused_by_name(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        await here.js.delete_stream("EVT")
        await here.js.add_stream(api.StreamConfig(name="THEIRS", subjects=["shoal.v1.evt.>"]))
        with pytest.raises(Unavailable, match="EVT"):
            await ensure_streams(here.js)


def test_a_bucket_names_its_subjects_as_key_value_stores_do() -> None:
    assert Bucket.subject(Bucket(None, "state"), "a.b") == "$KV.state.a.b"  # type: ignore[arg-type]  # no I/O here


async def test_I12_one_key_written_cannot_remove_the_others(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        for bucket in (here.buckets.spec, here.buckets.state):
            key = fresh("key")
            await bucket.put(key, Note(text="kept"))
            with pytest.raises(jse.APIError, match="rollup not permitted"):
                await here.js.publish(bucket.subject(fresh("key")), b"{}", headers={"Nats-Rollup": "all"})
            assert await bucket.get_as(key, Note) == Note(text="kept")
            assert await bucket.delete(key)


async def test_I6_a_removed_key_stays_so_when_nats_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_bucket, "DELETE_MARKER_TTL_S", 1)
    with NatsServer(tmp_path / "nats") as server:
        async with joined(server) as here:
            spec = here.buckets.spec
            kept = await spec.put("download.a.kept", Note(text="kept"))
            for key in ("download.a.one", "download.a.two"):
                await spec.put(key, Note(text="wanted"))
            assert await spec.delete("download.a.one")
            assert await spec.delete_fenced(Fence("download.a.kept", kept), "download.a.two")

            async def markers_expired() -> bool:
                return not [k for k in await spec.keys("download.>") if k != "download.a.kept"]

            await eventually(markers_expired, "the markers have expired")
        server.restart()
        async with joined(server) as here:
            assert await here.buckets.spec.get_as("download.a.kept", Note) == Note(text="kept")
            for key in ("download.a.one", "download.a.two"):
                assert await here.buckets.spec.get(key) is None
                assert await here.buckets.spec.create(key, Note(text="again")) is not None


async def test_a_key_can_be_created_between_the_two_markers(
    nats: NatsServer, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with joined(nats) as here:
        key, lease = fresh("handed-over"), here.buckets.lease
        await lease.put(key, Note(text="the first holder"))
        last_message, seen = Bucket._last_message, 0

        async def remove_after_reading(bucket: Bucket, key: str) -> api.RawStreamMsg | None:
            nonlocal seen
            found, seen = await last_message(bucket, key), seen + 1
            if seen == 1:
                await here.js.publish(bucket.subject(key), b"", headers={"KV-Operation": "PURGE"})
            return found

        await here.js.publish(lease.subject(key), b"", headers={"KV-Operation": "DEL"})
        monkeypatch.setattr(Bucket, "_last_message", remove_after_reading)
        assert await lease.create(key, Note(text="the next one"), 10) is not None
        assert seen == 2


async def test_I9_a_lease_that_came_back_is_held_by_nobody(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        key, lease = fresh("origin"), Bucket(here.js, "lease", max_age_s=0.5)
        # Without a TTL, as the server treats one that it has found again.
        await lease.put(key, Note(text="an earlier holder"))

        async def is_free() -> bool:
            return await lease.get(key) is None

        await eventually(is_free, "it counts as expired")
        assert await lease.create(key, Note(text="the next one"), 10) is not None
        assert await lease.get_as(key, Note) == Note(text="the next one")
