"""Deleting: idempotent, final, and never what is in use."""

from __future__ import annotations

from pathlib import Path

from shoal_common.bus import subjects
from shoal_common.bus.keys import instance_key
from shoal_common.messages import encode
from shoal_common.messages.downloads import StopDownloads
from shoal_common.messages.instances import InstanceSpec, StageSpec
from shoal_common.messages.storage import Delete
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.storage.running_storage import Node, on_node
from tests.storage.store_fixtures import Model, check_invariants, files_below, files_of, put, sha256


def instance_of(model: Model, name: str, node: str) -> InstanceSpec:
    """An instance with one stage, on a node."""
    stage = StageSpec(rank=0, node=node, first_layer=0, last_layer=1)
    return InstanceSpec(
        id=name, repo=model.manifest.repo, commit=model.manifest.commit, stages=[stage], context_tokens=1
    )


async def test_a_deleted_model_is_removed_and_its_shared_blobs_stay(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model, pears: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(), node.fetcher():
        await node.bring_in(apples)
        await node.bring_in(pears)
        shared = len(apples.bytes["shared.bin"])
        outcome = await node.delete("org/apples")
        assert outcome.ok and outcome.result == {
            "deleted": True,
            "models": [apples.name],
            "freed_bytes": apples.manifest.size_bytes - shared,
        }
        assert node.withdrawn == [StopDownloads(repo="org/apples")]
        assert await node.model_state(apples) is None and await node.model_state(pears) is not None
        assert files_below(node.layout.root) == files_of(pears)
        state = await node.storage_state()
        assert (state.used_bytes, state.model_count) == (pears.manifest.size_bytes, 1)
        assert (await node.events())[2:][0][0] == "model_deleted" and len(await node.events()) == 3
        check_invariants(node.layout.root)


async def test_I5_deleting_what_is_absent_succeeds_and_writes_nothing(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(), node.fetcher():
        await node.bring_in(apples)
        await node.delete("org/apples")
        before, events = await node.storage_state(), await node.events()
        for model in ("org/apples", apples.name, "org/never-was"):
            outcome = await node.delete(model)
            assert outcome.ok and outcome.result == {"deleted": False, "models": [], "freed_bytes": 0}
        after = await node.storage_state()
        assert await node.events() == events, "no event for what was not there"
        assert (after.used_bytes, after.model_count) == (before.used_bytes, before.model_count) == (0, 0)
        again = await node.delete("org/apples", identity=fresh("delete"))
        assert again.ok and await node.events() == events


async def test_I4_a_model_in_use_on_this_node_is_not_deleted(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    name = fresh("instance")
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(), node.fetcher():
        await node.bring_in(apples)
        spec = node.here.buckets.spec
        for _ in range(5):  # the moment the instance exists, it counts
            await spec.put(instance_key(name), instance_of(apples, name, node.node))
            outcome = await node.delete("org/apples")
            assert not outcome.ok and outcome.error is not None and outcome.error.code == "in_use"
            assert f"is used by instance {name}: stop it first with `shoal stop {name}`" in outcome.error.message
            assert node.withdrawn == [] and files_below(node.layout.root) == files_of(apples)
            await spec.delete(instance_key(name))
        await spec.put(instance_key(name), instance_of(apples, name, "another-node"))
        assert (await node.delete("org/apples")).ok, "another node's instance uses that node's copy"
        await spec.delete(instance_key(name))


async def test_a_model_on_its_way_in_is_deleted_with_its_partial_bytes(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model, pears: Model
) -> None:
    shared, weights = (sha256(apples.bytes[p]) for p in ("shared.bin", "sub/weights.bin"))
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(), node.fetcher():
        await node.reserve(apples.manifest)
        await node.reserve(pears.manifest)
        for blob in (shared, weights):
            put(node.layout, blob, apples.blobs[blob])
            await node.commit(blob)
        outcome = await node.delete("org/apples")
        assert outcome.ok and not outcome.result["deleted"], "it was not here as a model"
        assert outcome.result["freed_bytes"] == len(apples.bytes["sub/weights.bin"])
        assert {p.name for p in node.layout.partials.iterdir()} == {sha256(pears.bytes["pears.bin"])}
        assert [p.name for p in node.layout.blobs.glob("*/*")] == [shared]
        await node.bring_in(pears)
        assert files_below(node.layout.root) == files_of(pears)
        assert (await node.storage_state()).reserved_bytes == 0


async def test_a_commit_of_a_model_is_deleted_alone(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    old = Model("org/model", {"same": b"both", "old": b"old"}, commit="1" * 40)
    new = Model("org/model", {"same": b"both", "new": b"new"}, commit="2" * 40)
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(), node.fetcher():
        await node.bring_in(old)
        await node.bring_in(new)
        assert (await node.delete(old.name)).result["models"] == [old.name]
        assert files_below(node.layout.root) == files_of(new)
        assert await node.model_state(old) is None and await node.model_state(new) is not None


async def test_what_is_open_stays_readable_after_the_delete(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(), node.fetcher():
        await node.bring_in(apples)
        with node.layout.view_file(apples.sealed, "sub/weights.bin").open("rb") as reading:
            assert (await node.delete("org/apples")).ok
            assert files_below(node.layout.root) == set()
            assert reading.read() == apples.bytes["sub/weights.bin"]


async def test_a_delete_without_the_fetcher_fails_and_deletes_nothing(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage():
        await node.bring_in(apples)
        outcome = await node.delete("org/apples")
        assert not outcome.ok and outcome.error is not None
        assert (outcome.error.code, outcome.error.retryable) == ("node_down", True)
        assert f"fetcher of node {node.node} does not answer stop_downloads" in outcome.error.message
        assert files_below(node.layout.root) == files_of(apples)
        assert await node.model_state(apples) is not None
        async with node.fetcher():
            assert (await node.delete("org/apples")).ok


async def test_I6_a_delete_whose_process_is_killed_is_finished_later(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model, pears: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        async with node.storage() as process:
            await node.bring_in(apples)
            await node.bring_in(pears)
            await process.kill()
        # As a kill leaves it after the first step of a deletion: the manifest is a tombstone, the rest is present.
        manifest = node.layout.manifest(apples.manifest.model)
        manifest.replace(node.layout.tombstones / f"{manifest.parent.name}@{manifest.name}")
        async with node.storage(), node.fetcher():
            assert files_below(node.layout.root) == files_of(pears)
            assert await node.model_state(apples) is None
            assert (await node.storage_state()).used_bytes == pears.manifest.size_bytes


async def test_a_delete_sent_while_storage_was_down_runs_at_its_start(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.fetcher():
        async with node.storage() as process:
            await node.bring_in(apples)
            await process.kill()
        subject = subjects.command("storage", node.node, "delete")
        await node.here.client.publish(subject, encode(Delete(model="org/apples")))
        async with node.storage():
            await eventually(lambda: is_removed(node, apples), "the model is deleted")


async def is_removed(node: Node, model: Model) -> bool:
    """Whether nothing of a model is on disk or published."""
    return not files_below(node.layout.root) and await node.model_state(model) is None
