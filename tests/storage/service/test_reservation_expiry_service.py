"""The ends of reservations in a store: after a deletion request, a restart, a dead fetcher and an outage of NATS."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec import structs

from shoal_common.bus.keys import download_key, liveness_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.errors import NotFound
from shoal_common.host.process_identity import this_process
from shoal_common.messages import encode
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.messages.storage import CommitBlob, Release, Reserve, SealModel
from shoal_common.settings.node import StorageSettings
from shoal_storage.admission.reservation_expiry import (
    FETCHER_DOWN_AFTER_S,
    RESERVATION_GRACE_S,
)
from shoal_storage.eviction.planner import protected_models
from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.handlers.reservations import ReservationExpiry
from shoal_storage.startup import recover_store
from shoal_storage.store.partials import has_partial
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.storage.running_storage import on_node
from tests.storage.service.test_eviction_races import A, B, model_of
from tests.storage.storage_parts import StorageParts, storage_parts
from tests.storage.store_fixtures import Model, files_below, files_of, put
from tests.storage.unit.test_reservation_expiry import DAY_S, NOW_S

# In a store, with a cluster state set by the test


class Cluster:
    """The cluster state as storage sees it: its fetcher and its downloads."""

    def __init__(self, parts: StorageParts) -> None:
        self.parts, self.specs, self.downloads, self.live = parts, parts.specs, KvMirror("state"), KvMirror("live")
        self.begun_s = self.monotonic_s = 0.0
        self.reservations = ReservationExpiry(parts.context, parts.deleter, parts.shards, self.downloads, self.live)
        self.fetcher(True)

    def fetcher(self, here: bool) -> None:
        live = encode(LivenessRecord(holder=this_process(), version="0"))
        self.live.apply(liveness_key(self.parts.node, "fetcher"), live if here else None)

    def set_request(self, model: Model, there: bool = True) -> None:
        repo, commit = model.manifest.repo, model.manifest.commit
        key, node = download_key(self.parts.node, repo), self.parts.node
        self.downloads.apply(
            key, encode(DownloadState(node=node, model=repo, phase="fetching", commit=commit)) if there else None
        )
        self.specs.apply(key, encode(DownloadRequest(model=repo, requested_at_s=1.0)) if there else None)

    async def check_after(self, after_s: float, passing_s: float = 0.0) -> None:
        """Check after so many seconds; `passing_s` of them since the last check."""
        self.monotonic_s += passing_s
        await self.reservations.check(self.begun_s + after_s, self.monotonic_s)


COMES = model_of("comes", 3000)


BLOB = next(iter(COMES.blobs))


@asynccontextmanager
async def a_fetch(
    nats: NatsServer, home: Path, node: str, limits: StorageSettings
) -> AsyncIterator[tuple[StorageParts, Cluster]]:
    """COMES is reserved and requested, and all of it has arrived."""
    async with storage_parts(nats, home, node, limits) as parts:
        cluster = Cluster(parts)
        cluster.set_request(COMES)
        await parts.fetch.reserve(Reserve(manifest=COMES.manifest))
        put(parts.disk.layout, BLOB, COMES.blobs[BLOB])
        cluster.begun_s = parts.ledger.arrivals.last_wanted_s[COMES.name]
        yield parts, cluster


async def test_a_reservation_and_then_its_bytes_outlive_the_request(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with a_fetch(nats, tmp_path, fresh("storage"), StorageSettings(4000, 0)) as (parts, cluster):
        for after_s in (100.0, DAY_S, 30 * DAY_S):
            await cluster.check_after(after_s)
            assert (
                parts.ledger.arrivals.ended_reservations == set()
                and parts.ledger.arrivals.last_wanted_s[COMES.name] == cluster.begun_s + after_s
            )
        cluster.set_request(COMES, False)
        await cluster.check_after(30 * DAY_S + RESERVATION_GRACE_S - 1)
        assert parts.ledger.arrivals.ended_reservations == set()
        await cluster.check_after(30 * DAY_S + RESERVATION_GRACE_S)
        assert parts.ledger.arrivals.ended_reservations == {COMES.name}
        assert protected_models(parts.ledger, {}) == {}
        with pytest.raises(NotFound, match="has ended because nobody wanted it; reserve it again"):
            await parts.fetch.commit(CommitBlob(blob=BLOB))
        # Its whole size no longer counts: there is space for others.
        await parts.refresh_free_space()
        occupied = parts.ledger.arrivals.partials[BLOB].allocated_bytes
        assert parts.ledger.reserved_bytes == occupied <= 3000 and parts.ledger.arrivals.in_flight_bytes == 0
        await cluster.check_after(37 * DAY_S - 1)
        assert has_partial(parts.disk, BLOB)
        await cluster.check_after(37 * DAY_S)
        assert (
            files_below(parts.disk.layout.root) == set()
            and parts.ledger.arrivals.partials == {} == parts.ledger.arrivals.reservations
        )
        assert parts.ledger.arrivals.ended_reservations == set() and parts.ledger.arrivals.last_wanted_s == {}


async def test_reserving_again_revives_a_reservation_with_its_bytes(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with a_fetch(nats, tmp_path, fresh("storage"), StorageSettings(4000, 0)) as (parts, cluster):
        cluster.set_request(COMES, False)
        await cluster.check_after(RESERVATION_GRACE_S)
        assert parts.ledger.arrivals.ended_reservations == {COMES.name}
        await parts.fetch.reserve(Reserve(manifest=COMES.manifest))
        assert parts.ledger.arrivals.ended_reservations == set()
        assert (await parts.fetch.commit(CommitBlob(blob=BLOB))).size_bytes == 3000
        await parts.fetch.seal(SealModel(manifest=COMES.sealed))
        assert files_below(parts.disk.layout.root) == files_of(COMES)
        assert parts.ledger.arrivals.last_wanted_s == {}


async def test_a_retention_of_0_keeps_nothing(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with a_fetch(nats, tmp_path, fresh("storage"), StorageSettings(None, 0)) as (parts, cluster):
        parts.context.settings = structs.replace(parts.context.settings, partial_retention_s=0)
        await cluster.check_after(RESERVATION_GRACE_S)
        assert has_partial(parts.disk, BLOB), "it is requested"
        cluster.set_request(COMES, False)
        await cluster.check_after(2 * RESERVATION_GRACE_S)
        assert files_below(parts.disk.layout.root) == set()


async def test_a_dead_fetcher_ends_its_reservations_unless_it_restarts(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with a_fetch(nats, tmp_path, fresh("storage"), StorageSettings(None, 0)) as (parts, cluster):
        await cluster.check_after(0.0)
        cluster.fetcher(False)
        await cluster.check_after(FETCHER_DOWN_AFTER_S - 1, FETCHER_DOWN_AFTER_S - 1)
        assert parts.ledger.arrivals.ended_reservations == set()
        cluster.fetcher(True)
        await cluster.check_after(FETCHER_DOWN_AFTER_S, 1.0)
        assert parts.ledger.arrivals.last_wanted_s[COMES.name] == cluster.begun_s + FETCHER_DOWN_AFTER_S
        cluster.fetcher(False)
        await cluster.check_after(2 * FETCHER_DOWN_AFTER_S, FETCHER_DOWN_AFTER_S)
        assert parts.ledger.arrivals.ended_reservations == {COMES.name} and has_partial(parts.disk, BLOB)


async def test_a_storage_without_nats_ends_no_reservation(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_fetch(nats, tmp_path, fresh("storage"), StorageSettings(None, 0)) as (parts, cluster):
        cluster.fetcher(False)
        connected = type(parts.here.nats.client)
        with monkeypatch.context() as patched:
            patched.setattr(connected, "is_connected", property(lambda _: False))
            await cluster.check_after(10 * FETCHER_DOWN_AFTER_S, 10 * FETCHER_DOWN_AFTER_S)
            await cluster.check_after(20 * FETCHER_DOWN_AFTER_S, 10 * FETCHER_DOWN_AFTER_S)
        assert parts.ledger.arrivals.ended_reservations == set()


async def test_I4_leftovers_of_a_download_are_evicted_before_any_model(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with a_fetch(nats, tmp_path, fresh("storage"), StorageSettings(9000, 0, "lru")) as (parts, cluster):
        await parts.bring_in(A, B)
        cluster.set_request(COMES, False)
        await cluster.check_after(RESERVATION_GRACE_S)
        await parts.refresh_free_space()
        occupied = parts.ledger.arrivals.partials[BLOB].allocated_bytes
        new = model_of("larger", 9000 - 2000 - occupied + 1)
        dry = await parts.evictions.plan_for_new_bytes(new.manifest.size_bytes)
        assert [v.model for v in dry.ended_downloads] == [COMES.name] and not dry.victims
        assert dry.freed_bytes == occupied
        went = await parts.reserve(new)
        assert went is not None and went.ended_downloads == dry.ended_downloads and went.freed_bytes == occupied
        assert parts.ledger.manifests.keys() == {A.name, B.name} and BLOB not in parts.ledger.arrivals.partials


async def test_what_two_downloads_share_stays_reserved_for_the_other(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    twin = Model("org/twin", {"weights.bin": COMES.bytes["weights.bin"]})
    async with a_fetch(nats, tmp_path, fresh("storage"), StorageSettings(None, 0)) as (parts, cluster):
        await parts.fetch.reserve(Reserve(manifest=twin.manifest))
        parts.context.settings = structs.replace(parts.context.settings, partial_retention_s=0)
        cluster.set_request(COMES, False)
        cluster.set_request(twin)
        await cluster.check_after(RESERVATION_GRACE_S + 60)
        assert parts.ledger.arrivals.partials[BLOB].models == {twin.name}
        assert (await parts.fetch.commit(CommitBlob(blob=BLOB))).size_bytes == 3000
        await parts.fetch.release(Release(model=twin.name, blobs=[BLOB]))


async def test_I6_a_restart_knows_when_a_reservation_was_last_wanted(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    """By the reservation's file; by the partial blobs if a full disk had no space for that."""
    async with a_fetch(nats, tmp_path, fresh("storage"), StorageSettings(None, 0)) as (parts, cluster):
        await cluster.check_after(1000.0)
        for without_reservation in (False, True):
            if without_reservation:
                for path in parts.disk.layout.reservations.iterdir():
                    path.unlink()
            ledger = recover_store(parts.disk)
            MetadataFiles(parts.disk.layout, ledger).read()
            assert ledger.arrivals.last_wanted_s.keys() == {COMES.name}
            assert abs(ledger.arrivals.last_wanted_s[COMES.name] - cluster.begun_s - 1000.0) < 0.001


async def test_a_start_ends_long_unwanted_reservations_with_an_event(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        async with node.storage() as process:
            await node.reserve(COMES.manifest)
            assert (await node.storage_state()).ended_downloads == []
            await process.kill()
        long_ago_s = NOW_S - 3600 * 24 * 365 * 8

        def age(seconds: float) -> None:
            for path in (*node.layout.reservations.iterdir(), *node.layout.partials.glob("*/meta.json")):
                os.utime(path, (seconds, seconds))

        age(long_ago_s)
        async with node.storage(SHOAL_PARTIAL_RETENTION_S=str(10**10)) as process:

            async def published() -> bool:
                return (await node.storage_state()).ended_downloads == [COMES.name]

            await eventually(published, "the promise has ended")
            state = await node.storage_state()
            assert (state.reserved_bytes, state.partial_retention_s) == (0, 10**10)
            await node.reserve(COMES.manifest)
            state = await node.storage_state()
            assert (state.reserved_bytes, state.ended_downloads) == (3000, [])
            await process.kill()
        age(long_ago_s)
        async with node.storage():

            async def gone() -> bool:
                return await asyncio.to_thread(files_below, node.layout.root) == set()

            await eventually(gone, "what it had left is removed")
