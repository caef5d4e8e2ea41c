"""Verification: a byte that changed on disk is found, no longer loaded or served, and repaired (I1)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal_common.bus import subjects
from shoal_common.bus.keys import instance_key
from shoal_common.messages import decode, encode
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.storage import Verify
from shoal_storage.integrity import blob_check, quarantine
from shoal_storage.integrity.consequences import next_to_scrub
from shoal_storage.startup import recover_store
from tests.fileserver.running_fileserver import Fileserver
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.process import Process, node_environment, started
from tests.harness.waiting import eventually
from tests.storage.running_storage import Node, on_node
from tests.storage.service.test_deletion import instance_of
from tests.storage.store_fixtures import Model, StoreFixture, check_invariants, files_below, files_of, put, sha256

DEADLINE_S = 45.0
EXAMPLES = 12
LARGE = Model("org/large", {"weights.bin": bytes(range(256)) * 12000, "config.json": b"{}"})
TWIN = Model("org/twin", {"same/weights.bin": LARGE.bytes["weights.bin"], "own.bin": b"own"})
WEIGHTS = sha256(LARGE.bytes["weights.bin"])


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file in place, as a failing disk does: size and mtime stay the same."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as f:
        byte = os.pread(f.fileno(), 1, offset)[0]
        os.pwrite(f.fileno(), bytes([byte ^ 1]), offset)
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_unseen(storage: Process, path: Path, offset: int) -> None:
    """The same under a running storage, which must not scan while the file's mtime differs."""
    storage.send(signal.SIGSTOP)
    flip(path, offset)
    storage.send(signal.SIGCONT)


async def verify(node: Node, model: str = "") -> Outcome:
    """Send `verify` with `nats req` and return its outcome."""
    subject = subjects.command("storage", node.node, "verify")
    reply = await node.here.client.request(subject, encode(Verify(model=model)), timeout=DEADLINE_S)
    return decode(reply.data, Outcome)


@asynccontextmanager
async def fileserver_of(node: Node, server: NatsServer) -> AsyncIterator[Fileserver]:
    """The node's own fileserver."""
    async with started("-m", "shoal_fileserver", environment=node_environment(node.home, server.url)) as process:
        ready = await process.wait_line("msg=ready")
        host, _, port = ready.partition("addresses=")[2].split()[0].partition(":")
        yield Fileserver(process, node.node, node.layout, host, int(port))


async def test_I1_one_flipped_byte_is_found_never_served_and_repaired(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with (
        on_node(nats, tmp_path, fresh("storage")) as node,
        node.storage() as process,
        fileserver_of(node, nats) as fileserver,
    ):
        for model in (LARGE, TWIN):
            await node.bring_in(model)
        blobs = {sha256(data): data for model in (LARGE, TWIN) for data in model.bytes.values()}

        async def flip_find_repair(blob: str, offset: int) -> None:
            flip_unseen(process, node.layout.blob(blob), offset)
            hit = [m for m in (LARGE, TWIN) if blob in m.sealed.blob_sizes]
            outcome = await verify(node)
            assert outcome.ok, outcome.error
            assert outcome.result["checked"] == len(blobs)
            assert outcome.result["checked_bytes"] == sum(len(data) for data in blobs.values())
            assert outcome.result["corrupt"] == [blob]
            assert outcome.result["models"] == sorted(m.name for m in hit)
            assert (await fileserver.blob(blob)).status == 404
            assert all([await node.model_state(m) is None for m in hit])
            for model in hit:
                view = node.layout.view(model.manifest.model)
                assert not [
                    path for path, data in model.bytes.items() if data == blobs[blob] and (view / path).exists()
                ]
            assert (await node.storage_state()).quarantined == [blob]
            assert (await node.storage_state()).incomplete == sorted(m.name for m in hit)
            assert sha256((node.layout.quarantine / blob).read_bytes()) != blob
            assert ("quarantined", [m.name for m in sorted(hit, key=lambda m: m.name)]) in [
                (name, event.get("models")) for name, event in (await node.events())[-1:]
            ]
            for model in hit:
                missing = (await node.reserve(model.manifest)).missing
                assert missing in ([blob], []), "a repair fetches the corrupt blob alone"
                for name in missing:
                    put(node.layout, name, blobs[name])
                    await node.commit(name)
                await node.seal(model.sealed)
            assert (await fileserver.blob(blob)).body == blobs[blob]
            assert all([await node.model_state(m) for m in hit])
            assert (await node.storage_state()).quarantined == []
            assert (await node.storage_state()).incomplete == []
            assert files_below(node.layout.root) == files_of(LARGE, TWIN)
            check_invariants(node.layout.root)

        loop = asyncio.get_running_loop()

        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(sorted(blobs)), st.data())
        def anywhere(blob: str, data: st.DataObject) -> None:
            offset = data.draw(st.integers(0, len(blobs[blob]) - 1))
            asyncio.run_coroutine_threadsafe(flip_find_repair(blob, offset), loop).result(DEADLINE_S)

        await asyncio.to_thread(anywhere)


async def test_I1_a_quarantined_blob_stays_so_over_a_restart(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.fetcher():
        async with node.storage() as process:
            await node.bring_in(LARGE)
            flip_unseen(process, node.layout.blob(WEIGHTS), 1234)
            assert (await verify(node, "org/large")).result["corrupt"] == [WEIGHTS]
            again = await verify(node)
            assert again.ok and again.result["corrupt"] == [] and again.result["checked"] == 1
            await process.kill()
        async with node.storage():
            assert await node.model_state(LARGE) is None
            assert (await node.storage_state()).quarantined == [WEIGHTS]
            assert (await node.delete("org/large")).ok
            assert (await node.storage_state()).quarantined == []
            assert files_below(node.layout.root) == set()


async def test_I1_background_scrubbing_finds_corrupt_blobs(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        async with node.storage() as process:
            await node.bring_in(LARGE)
            await node.bring_in(TWIN)
            await process.kill()
        flip(node.layout.blob(WEIGHTS), 3_000_000)
        async with node.storage():

            async def found() -> bool:
                return (await node.storage_state()).quarantined == [WEIGHTS]

            await eventually(found, "the pass in the background has found it")
            assert await node.model_state(LARGE) is None and await node.model_state(TWIN) is None


async def test_a_corrupt_model_in_use_is_quarantined_naming_its_user(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    name = fresh("instance")
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage() as process, node.fetcher():
        await node.bring_in(LARGE)
        await node.here.buckets.spec.put(instance_key(name), instance_of(LARGE, name, node.node))
        try:
            # Refused: storage knows of the instance.
            assert not (await node.delete("org/large")).ok
            flip_unseen(process, node.layout.blob(WEIGHTS), 0)
            outcome = await verify(node, LARGE.name)
            assert outcome.result["corrupt"] == [WEIGHTS] and outcome.result["instances"] == [name]
            assert await node.model_state(LARGE) is None
            (event,) = [event for event_name, event in await node.events() if event_name == "quarantined"]
            assert (event["blob"], event["instances"]) == (WEIGHTS, [name])
        finally:
            await node.here.buckets.spec.delete(instance_key(name))


async def test_a_missing_blob_is_reported_and_cannot_be_verified(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage():
        await node.bring_in(LARGE)
        node.layout.blob(WEIGHTS).unlink()
        outcome = await verify(node, "org/large")
        assert outcome.ok and outcome.result["corrupt"] == []
        if not outcome.result["missing"]:  # storage has noticed by itself and published it

            async def noticed() -> bool:
                return "model_lost" in [name for name, _ in await node.events()]

            await eventually(noticed, "somebody has noticed")
        else:
            assert outcome.result["missing"] == [WEIGHTS]
        assert await node.model_state(LARGE) is None
        assert (await node.reserve(LARGE.manifest)).missing == [WEIGHTS]
        nothing = await verify(node, "org/never-was")
        assert not nothing.ok and nothing.error is not None and nothing.error.code == "not_found"


def test_a_blob_refetched_while_it_was_hashed_is_not_quarantined(root: Path) -> None:
    store = StoreFixture(root)
    store.bring_in(LARGE)
    path = store.layout.blob(WEIGHTS)
    flip(path, 5)
    checked = blob_check.hash_blob(store.disk, WEIGHTS, lambda _: None)
    assert checked is not None and not checked.intact
    # Kept aside, so that the new file cannot get the same inode.
    path.rename(root.parent / "corrupt")
    path.write_bytes(LARGE.bytes["weights.bin"])
    assert not quarantine.quarantine_blob(store.disk, checked, [LARGE.sealed])
    assert path.exists() and not list(store.layout.quarantine.iterdir())
    path.unlink()
    assert blob_check.hash_blob(store.disk, WEIGHTS, lambda _: None) is None
    assert not quarantine.quarantine_blob(store.disk, checked, [LARGE.sealed])
    path.write_bytes(LARGE.bytes["weights.bin"])


@pytest.mark.parametrize("how", ["hardlink", "symlink"])
def test_I1_every_view_of_a_corrupt_blob_is_removed(root: Path, how: str) -> None:
    store = StoreFixture(root)
    for model in (LARGE, TWIN):
        store.bring_in(model)
    views = [store.layout.view_file(m.sealed, path) for m in (LARGE, TWIN) for path in m.bytes if "weights" in path]
    if how == "symlink":
        for view in views:
            view.unlink()
            view.symlink_to(store.layout.blob(WEIGHTS))
    flip(store.layout.blob(WEIGHTS), 77)
    checked = blob_check.hash_blob(store.disk, WEIGHTS, lambda _: None)
    assert checked is not None
    assert quarantine.quarantine_blob(store.disk, checked, [LARGE.sealed, TWIN.sealed])
    assert not [view for view in views if os.path.lexists(view)]
    store.ledger = recover_store(store.disk)
    assert set(store.ledger.incomplete) == {LARGE.name, TWIN.name} and WEIGHTS not in store.ledger.blobs
    # Repaired: each view has the good bytes again.
    for model in (LARGE, TWIN):
        store.bring_in(model)
        assert store.holds(model)
    assert not list(store.layout.quarantine.iterdir())


names = st.text("0123456789abcdef", min_size=4, max_size=4)


@given(st.sets(names), names, st.dictionaries(names, st.floats(0, 2000)))
def test_due_blobs_are_scrubbed_once_longest_ago_first(
    blobs: set[str], begin: str, verified_s: dict[str, float]
) -> None:
    turns = next_to_scrub(blobs, verified_s, begin, now_s=2000.0, max_age_s=500.0)
    assert set(turns) == {b for b in blobs if verified_s.get(b, 0.0) <= 1500} and len(turns) == len(set(turns))
    order = [verified_s.get(blob, -1.0) for blob in turns]
    assert order == sorted(order)
    never = [blob for blob in turns if blob not in verified_s]
    assert never == sorted(b for b in never if b >= begin) + sorted(b for b in never if b < begin)
