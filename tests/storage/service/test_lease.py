"""Leases: a model's users are known exactly as long as they use it, whoever dies (I4)."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shoal_common.errors import BadName
from shoal_common.messages.instances import InstanceSpec, StageSpec
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.names import ModelId, check_holder
from shoal_storage.eviction.planner import find_garbage, plan_eviction, protected_models
from shoal_storage.leases import lease_files
from shoal_storage.ledger.lease import LOCK_DEADLINE_S, ModelLease, grace_left_s, has_ended
from shoal_storage.ledger.references import blobs_freed_by
from shoal_storage.ledger.usage import ModelUser, join_names, release_hint, users_of
from shoal_storage.ledger.uses import ModelUses
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.storage.lease_fixtures import holder_of
from tests.storage.ledger_builder import build_ledger
from tests.storage.storage_parts import storage_parts

TIMES = st.floats(0, 1e6)


def lease_of(model: ModelId, name: str = "l", holder: str = "me", instance: str = "", pid: int = 0) -> ModelLease:
    return ModelLease(name, model, holder, instance, 0.0, {"a": "a" * 64}, LOCK_DEADLINE_S, pid=pid)


# Pure


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 20)), max_size=12))
def test_a_lease_lives_through_its_grace_and_while_it_is_held(
    polls: list[tuple[bool, float]],
) -> None:
    uses, now_s, taken_up = ModelUses(), 0.0, False
    uses.add_lease(lease_of(ModelId("m")))
    for held, after_s in polls:
        now_s += after_s
        lease = uses.record_lock(lease_of(ModelId("m")).id, held, 0)
        ended = has_ended(lease, held, now_s)
        assert ended == (not held and (taken_up or now_s >= LOCK_DEADLINE_S))
        if ended:
            return
        taken_up = taken_up or held


@given(TIMES, TIMES)
def test_I7_a_lease_found_at_a_start_has_no_more_than_its_grace(since_s: float, now_s: float) -> None:
    left_s = grace_left_s(since_s, now_s)
    assert 0 <= left_s <= LOCK_DEADLINE_S
    assert left_s == 0 or now_s - since_s < LOCK_DEADLINE_S


INSTANCES = st.sampled_from(["x", "y", "z", ""])


@given(st.sets(st.sampled_from("xyz")), st.lists(INSTANCES, max_size=4))
def test_every_instance_and_lease_is_a_user_and_none_twice(placed: set[str], leased: list[str]) -> None:
    stage = StageSpec(rank=0, node="a", first_layer=0, last_layer=1)
    specs = [
        InstanceSpec(id=i, repo="org/m", commit="c" * 40, stages=[stage], context_tokens=1) for i in sorted(placed)
    ]
    model = specs[0].model if specs else ModelId("m")
    leases = [lease_of(model, f"l{n}", f"holder {n}", i, n) for n, i in enumerate(leased)]
    users = [u for each in users_of(specs, leases, "a").values() for u in each]
    assert len(users) == len(leases) + len(placed - set(leased))
    assert {u.instance for u in users if u.instance} == placed
    assert all(
        u.is_ending == (bool(leased[n]) and leased[n] not in placed) for n, u in enumerate(users[: len(leased)])
    )
    assert users_of(specs, [], "b") == {}
    for user in users:
        assert user.description in join_names(users)
        assert not user.instance or f"`shoal stop {user.instance}`" in release_hint(users)
    assert release_hint(users)


def test_users_are_joined_into_a_sentence_with_release_hints() -> None:
    a, b, c = ModelUser("a (pid 1)"), ModelUser("instance x", "x"), ModelUser("stage 0 of y", is_ending=True)
    assert [join_names([a]), join_names([a, b]), join_names([a, b, c])] == [
        "a (pid 1)",
        "a (pid 1) and instance x",
        "a (pid 1), instance x and stage 0 of y",
    ]
    assert join_names([a] * 256).endswith("a (pid 1) and 246 more")
    assert release_hint([b]) == "stop it first with `shoal stop x`"
    assert release_hint([a, b]) == "stop it first with `shoal stop x`, and end that program first"
    assert release_hint([c]) == "it is ending; try again in a moment"


BLOBS = st.sets(st.sampled_from([f"{n}" * 64 for n in range(6)]))


@given(BLOBS, BLOBS, st.booleans(), st.integers(0, 10))
def test_I4_a_leased_blob_is_no_garbage_and_goes_with_no_model(
    leased: set[str], theirs: set[str], manifest_is_here: bool, need_bytes: int
) -> None:
    def manifest(repo: str, blobs: set[str]) -> Manifest:
        files = [ManifestFile(path=b, size_bytes=1, sha256=b) for b in sorted(blobs)]
        return Manifest(repo=repo, commit="c" * 40, files=files)

    own, other = manifest("org/mine", leased), manifest("org/other", theirs)
    ledger = build_ledger({f"{n}" * 64: 1 for n in range(6)}, manifests=[other, own] if manifest_is_here else [other])
    ledger.uses.add_lease(structs.replace(lease_of(own.model), files={b: b for b in leased}))
    assert not leased & set(find_garbage(ledger))
    assert not leased & {*blobs_freed_by(other.model, ledger), *blobs_freed_by(own.model, ledger)}
    users = users_of([], ledger.uses.leases.values(), "a")
    made = plan_eviction(need_bytes, ledger, {}, protected_models(ledger, users))
    assert own.model not in [v.model for v in made.victims] and not leased & set(made.garbage)
    assert made.evictable_bytes <= 6 - len(leased)


async def test_a_lease_check_reports_changes_and_survives_disk_errors(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage")) as parts, parts.context.section as held:
        holders, uses, now_s = parts.leases, parts.ledger.uses, time.monotonic()
        leases = uses.leases
        for name, grace_s in (("young", LOCK_DEADLINE_S), ("old", 0.0)):
            uses.add_lease(ModelLease(name, ModelId("org/m@c"), "me", "", time.time(), {}, now_s + grace_s))
            lease_files.create_lease(parts.disk, leases[name])

        def refuse(*_: object) -> bool:
            raise OSError(errno.EIO, "the disk refuses")

        with monkeypatch.context() as broken:
            broken.setattr(lease_files, "remove_unless_held", refuse)
            assert not await holders.refresh(held) and set(leases) == {"young", "old"}
        assert await holders.refresh(held) and set(leases) == {"young"}
        assert not await holders.refresh(held)
        with holder_of(str(parts.disk.layout.lease_lock("young"))) as holder:
            assert await holders.refresh(held) and leases["young"].pid == holder.pid
            assert not await holders.refresh(held)
        assert await holders.refresh(held) and not leases
        assert not await holders.refresh(held)


@pytest.mark.parametrize("holder", ["", "  ", "a\nb", "x" * 201, "\x1b[31mred"])
def test_I10_a_holder_that_is_not_one_line_is_refused(holder: str) -> None:
    with pytest.raises(BadName, match="who holds the lease"):
        check_holder(holder)
