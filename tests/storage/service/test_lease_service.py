"""Leases with the real service: holders that live, die and restart, and what a lease protects."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import time
from pathlib import Path

import pytest

from shoal_common.bus import subjects
from shoal_common.bus.keys import instance_key
from shoal_common.errors import BadName, Busy, InUse, NotFound, QuotaExceeded
from shoal_common.messages import encode
from shoal_common.messages.downloads import StopDownloads
from shoal_common.messages.envelope import Empty
from shoal_common.messages.leases import AcquireLease, LeaseGrant, ReleaseLease
from shoal_common.messages.storage import CollectGarbage, Verify
from shoal_common.names import ModelId
from shoal_common.rpc.request_reply import RpcEndpoint, serve
from shoal_storage.leases import lease_files
from shoal_storage.ledger.lease import LOCK_DEADLINE_S, MAX_LEASES, ModelLease
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.storage.lease_fixtures import holder_of
from tests.storage.running_storage import Node, on_node
from tests.storage.service.test_deletion import instance_of
from tests.storage.service.test_verifier import flip
from tests.storage.storage_parts import storage_parts
from tests.storage.store_fixtures import Model, StoreFixture, check_invariants, files_below, files_of, put, sha256

MODEL = Model("org/model", {"weights.bin": b"w" * 4000, "sub/config.json": b"{}"})


OTHER = Model("org/other", {"weights.bin": b"o" * 4000})


# The service


async def wait_leases(node: Node, *holders: str) -> None:
    """Return the published state once it matches."""

    async def published() -> bool:
        return [x.holder for x in (await node.storage_state()).leases] == list(holders)

    await eventually(published, f"the leases are those of {holders}")


async def test_I4_a_living_holder_keeps_its_model_and_a_killed_one_not(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    lru = {"SHOAL_MAX_STORAGE_BYTES": "8100", "SHOAL_EVICTION_POLICY": "lru"}
    new = Model("org/new", {"weights.bin": b"n" * 5000})
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(**lru), node.fetcher():
        await node.bring_in(MODEL)
        await node.bring_in(OTHER)
        lease = await node.lease("org/model", "a long read")
        assert lease.commit == MODEL.manifest.commit and Path(lease.view).is_absolute()
        with holder_of(lease.lock) as holder:
            who = f"a long read (pid {holder.pid})"
            refused = await node.delete("org/model")
            assert refused.error is not None and refused.error.code == "in_use"
            assert f"is used by {who}: end that program first" in refused.error.message
            assert refused.error.details["users"] == [who]
            assert node.withdrawn == []
            with pytest.raises(QuotaExceeded, match="1 model is pinned or in use"):
                await node.reserve(new.manifest)
            assert (await node.plan(5000)).protected == {MODEL.name: f"used by {who}"}
            assert (await node.command("gc", CollectGarbage())).result["blobs"] == 0
            with pytest.raises(InUse, match="is held by a long read"):
                await node.unlease(lease.id)
            leases = (await node.storage_state()).leases
            assert [(x.id, x.model, x.holder) for x in leases] == [(lease.id, MODEL.name, "a long read")]
            assert (Path(lease.view) / "weights.bin").read_bytes() == MODEL.bytes["weights.bin"]
            holder.kill()
            holder.wait()
        await wait_leases(node)
        assert not any(node.layout.leases.iterdir())
        assert (await node.delete("org/model")).ok
        assert files_below(node.layout.root) == files_of(OTHER)
        check_invariants(node.layout.root)


async def test_I6_after_a_restart_live_leases_are_known_and_dead_gone(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.fetcher():
        async with node.storage() as process:
            await node.bring_in(MODEL)
            lives, dies, unheld, old = [await node.lease(MODEL.name, n) for n in ("lives", "dies", "unheld", "old")]
            await process.kill()
        with holder_of(lives.lock) as holder:
            with holder_of(dies.lock):
                pass
            for lease in (dies, old):  # as if long ago: a start cannot know whether they were ever held
                record = node.layout.lease(lease.id) / "lease.json"
                record.write_text(json.dumps({**json.loads(record.read_text()), "since_s": 1.0}))
            async with node.storage() as process:
                await wait_leases(node, "lives", "unheld")
                assert {p.name for p in node.layout.leases.iterdir()} == {lives.id, unheld.id}
                await node.unlease(unheld.id)
                refused = await node.delete("org/model")
                assert refused.error is not None and f"lives (pid {holder.pid})" in refused.error.message
                holder.kill()
                holder.wait()
                assert (await node.delete("org/model")).ok, "the kernel says at once that nobody holds it"
                assert files_below(node.layout.root) == set()


async def test_I5_a_lease_that_nobody_holds_is_released_at_once(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(), node.fetcher():
        await node.bring_in(MODEL)
        one, two = await node.lease("org/model"), await node.lease(f"org/model@{MODEL.manifest.commit}")
        assert one.id != two.id and one.view != two.view
        refused = await node.delete("org/model")
        assert refused.error is not None and refused.error.code == "in_use", "given a moment ago, not taken up yet"
        for _ in range(2):
            await node.unlease(one.id)
        await wait_leases(node, "a test")
        assert (Path(two.view) / "weights.bin").read_bytes() == MODEL.bytes["weights.bin"]
        shutil.rmtree(node.layout.lease(two.id))  # deleted by hand: nothing is left to return
        await node.unlease(two.id)
        assert (await node.delete("org/model")).ok
        with pytest.raises(NotFound, match="pull it"):
            await node.lease("org/model")
        for bad in ("", "two\nlines"):
            with pytest.raises(BadName):
                await node.lease("org/model", bad)
        with pytest.raises(BadName):
            await node.unlease("../blobs")


async def test_I7_a_node_has_so_many_leases_and_no_more(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage")) as parts:
        names = [f"l{n}" for n in range(MAX_LEASES)]
        for name in names:
            parts.ledger.uses.add_lease(ModelLease(name, ModelId("org/m@c"), "me", "", time.time(), {}, float("inf")))
        question = AcquireLease(model="org/other", holder="one too many")
        with pytest.raises(Busy, match="`shoal storage`"):
            await parts.leases.lease(question)
        await parts.leases.release(ReleaseLease(id=names[0]))
        with pytest.raises(NotFound):  # room for another lease, but no model to lease
            await parts.leases.lease(question)


async def test_a_lock_that_cannot_be_tested_counts_as_held(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StoreFixture(root)
    store.bring_in(MODEL)
    lease = store.lease(MODEL, "one")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "the disk refuses")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert lease_files.is_held(store.layout, lease.id)
    assert set(lease_files.read_leases(store.disk, 0.0, time.time() + 2 * LOCK_DEADLINE_S)) == {"one"}


async def test_I4_a_leased_model_without_a_manifest_keeps_its_blobs(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        async with node.storage() as process:
            await node.bring_in(MODEL)
            lease = await node.lease("org/model")
            await process.kill()
        with holder_of(lease.lock) as holder:
            node.layout.manifest(MODEL.manifest.model).unlink()
            async with node.storage():
                assert (await node.command("gc", CollectGarbage())).result["blobs"] == 0
                assert (Path(lease.view) / "weights.bin").read_bytes() == MODEL.bytes["weights.bin"]
                holder.kill()
                holder.wait()
                await wait_leases(node)
                assert (await node.command("gc", CollectGarbage())).result["blobs"] == 2
                assert not node.layout.blob(sha256(MODEL.bytes["weights.bin"])).exists()


async def test_I1_what_turns_out_corrupt_leaves_leased_views_too(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage():
        await node.bring_in(MODEL)
        lease = await node.lease("org/model")
        blob = sha256(MODEL.bytes["weights.bin"])
        with holder_of(lease.lock):
            flip(node.layout.blob(blob), 7)
            assert (await node.command("verify", Verify())).result["corrupt"] == [blob]
            assert not (Path(lease.view) / "weights.bin").exists()
            assert (Path(lease.view) / "sub/config.json").exists()
            with pytest.raises(NotFound):
                await node.lease("org/model")
            for name in (await node.reserve(MODEL.manifest)).missing:
                put(node.layout, name, MODEL.blobs[name])
                await node.commit(name)
            await node.seal(MODEL.sealed)
            again = await node.lease("org/model")
            assert (Path(again.view) / "weights.bin").read_bytes() == MODEL.bytes["weights.bin"]


async def test_a_delete_waits_for_the_stages_of_a_stopped_instance(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    name = fresh("instance")
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage() as storage, node.fetcher():
        await node.bring_in(MODEL)
        spec = node.here.buckets.spec
        await spec.put(instance_key(name), instance_of(MODEL, name, node.node))
        lease = await node.lease("org/model", f"stage 0 of instance {name}", name)
        with holder_of(lease.lock) as stage:
            refused = await node.delete("org/model")
            assert refused.error is not None and refused.error.code == "in_use"
            assert refused.error.message.endswith(
                f"is used by stage 0 of instance {name} (pid {stage.pid}): stop it first with `shoal stop {name}`"
            )
            assert refused.error.details["instance"] == name
            await spec.delete(instance_key(name))
            deleting = asyncio.create_task(node.delete("org/model"))
            await storage.wait_line("waiting for ending stages")
            stage.kill()
            assert (await deleting).ok
        assert files_below(node.layout.root) == set()


async def test_I4_a_lease_taken_during_a_delete_stops_the_delete(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage():
        await node.bring_in(MODEL)
        taken: list[LeaseGrant] = []

        async def withdraw(_: StopDownloads) -> Empty:
            taken.append(await node.lease("org/model", "just in time"))
            return Empty()

        stopping = asyncio.Event()
        serving = asyncio.create_task(
            serve(
                node.here.nats,
                "fetcher",
                node.node,
                {"stop_downloads": RpcEndpoint(StopDownloads, withdraw)},
                stopping,
            )
        )
        try:
            refused = await node.delete("org/model")
            assert refused.error is not None and "just in time" in refused.error.message
            assert (Path(taken[0].view) / "weights.bin").read_bytes() == MODEL.bytes["weights.bin"]
            assert await node.model_state(MODEL) is not None
        finally:
            stopping.set()
            await serving


IN_A_SCRIPT = 'exec 9<"$0" && flock -s 9 && exec cat'


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock(1): the documented example is NOT run here")
@pytest.mark.parametrize(("command", "has_pid"), [(("flock", "-s"), True), (("sh", "-c", IN_A_SCRIPT), False)])
async def test_a_shell_holds_a_lease_as_documented(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, command: tuple[str, ...], has_pid: bool
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(), node.fetcher():
        await node.bring_in(MODEL)
        subject = subjects.rpc("storage", node.node, "lease")
        body = encode({"model": "org/model", "holder": "me"})
        reply = json.loads((await node.here.client.request(subject, body, timeout=20)).data)["result"]
        program = (*command, reply["lock"], *(("cat",) if has_pid else ()))
        shell = await asyncio.create_subprocess_exec(
            *program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert shell.stdout is not None and shell.stdin is not None
        shell.stdin.write(b"held\n")
        assert await shell.stdout.readline() == b"held\n"
        refused = await node.delete("org/model")
        who = f"me (pid {shell.pid})" if has_pid else "me"
        assert refused.error is not None and f"is used by {who}: end that program" in refused.error.message
        shell.stdin.close()
        await shell.wait()
        assert (await node.delete("org/model")).ok
