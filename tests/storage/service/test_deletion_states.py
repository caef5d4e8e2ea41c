"""Deletes with whole services, whatever state a model is in: final, idempotent, and without a request to the hub.

The matrix: a row makes a state; then a delete is sent twice, and the services restart. Deletes that the disk refuses
and kills in the middle follow. What `storage` answers in detail is in `test_storage_deletes`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable

import pytest

from shoal_common.bus.keys import instance_key
from shoal_common.messages.instances import InstanceSpec, StageSpec
from shoal_common.messages.placement import Forget
from shoal_common.rpc.command_client import CommandClient, new_command_id
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.stats import RequestCounts
from tests.fetcher.pull_site import Site
from tests.harness.fresh import Fresh
from tests.storage.deletion_fixtures import DEADLINE_S, NODE, SLOWLY, DeletionCase, case_of, present

# The states


async def absent(_: DeletionCase) -> None:
    """Never downloaded."""


async def arriving(case: DeletionCase) -> None:
    """Half downloaded, and downloading."""
    case.site.hub.set_faults(SLOWLY)
    await case.here.begin(NODE)
    await case.here.durable(NODE, LEAF_BYTES)


async def paused(case: DeletionCase) -> None:
    """Paused."""
    await arriving(case)
    assert (await case.ask("pause")).ok


async def cancelled(case: DeletionCase) -> None:
    """Cancelled."""
    await arriving(case)
    assert (await case.ask("cancel")).ok


async def rejected(case: DeletionCase) -> None:
    """Refused for lack of space."""

    async def quota(quota_bytes: int | None) -> None:
        body = json.dumps({"max_storage_bytes": quota_bytes}).encode()
        assert (await case.here.ask(NODE, "configure", body, service="storage")).ok

    await quota(LEAF_BYTES)
    assert (await case.here.pull_fails(NODE))[0] == "quota_exceeded"
    await quota(None)


async def failed(case: DeletionCase) -> None:
    """The hub had no such revision."""
    case.repo += "@no-such-branch"
    assert (await case.here.pull_fails(NODE, case.repo))[0] == "not_found"


async def flipped(case: DeletionCase) -> None:
    """One byte is corrupt, and nobody has noticed."""
    await present(case)
    path = await case.blob()
    times = path.stat()
    with path.open("r+b") as f:
        f.write(b"\xff" if path.read_bytes()[:1] == b"\x00" else b"\x00")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


async def found_corrupt(case: DeletionCase) -> None:
    """The same, noticed: the blob is in quarantine."""
    await flipped(case)
    assert (await case.ask("verify", "storage")).ok
    assert list(case.node.layout.quarantine.iterdir())


async def truncated(case: DeletionCase) -> None:
    """A blob is truncated."""
    await present(case)
    os.truncate(await case.blob(), LEAF_BYTES + 1)


async def missing_blob(case: DeletionCase) -> None:
    """A blob is missing."""
    await present(case)
    (await case.blob()).unlink()


async def with_strangers(case: DeletionCase) -> None:
    """A person's own files are in its view."""
    await present(case)
    view = await case.view()
    for path in (view / "notes.txt", view / "sub" / "more" / "notes.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        case.stays.add(str(path.relative_to(case.node.layout.root)))


State = Callable[[DeletionCase], Awaitable[None]]


WAS_HERE: list[State] = [present, flipped, found_corrupt, truncated, missing_blob, with_strangers]


WAS_NOT: list[State] = [absent, arriving, paused, cancelled, rejected, failed]


@pytest.mark.parametrize("state", [*WAS_HERE, *WAS_NOT], ids=lambda state: state.__name__)
async def test_I5_a_delete_ends_with_no_files_from_any_state(site: Site, state: State) -> None:
    async with case_of(site) as case:
        await state(case)
        manifest = await case.manifest() if state in WAS_HERE else None
        site.hub.reset_faults()
        site.hub.reset_stats()
        outcome = await case.ask("delete", "storage")
        assert outcome.ok, outcome.error
        assert outcome.result["deleted"] == (state in WAS_HERE)
        assert outcome.result["models"] == ([manifest.model] if manifest else [])
        await case.nothing_is_left()
        # Again: nothing to do, nothing to publish.
        sequences = [await case.here.here.last_sequence(stream) for stream in ("EVT", "KV_spec")]
        again = await case.ask("delete", "storage")
        assert again.ok and not again.result["deleted"]
        assert sequences == [await case.here.here.last_sequence(stream) for stream in ("EVT", "KV_spec")]
        # Nothing starts again, whichever service starts and whatever comes back.
        await case.restart_service()
        await case.nothing_is_left()
        assert site.hub.stats().requests == RequestCounts(), "the hub was asked"


async def test_a_model_named_by_a_retired_node_is_deleted_after_forget(site: Site, fresh: Fresh) -> None:
    async with case_of(site) as case:
        await present(case)
        manifest = await case.manifest()
        stages = [
            StageSpec(rank=r, node=n, first_layer=r, last_layer=r + 1) for r, n in enumerate((NODE, "given-away"))
        ]
        name = fresh("instance")
        spec = InstanceSpec(id=name, repo=manifest.repo, commit=manifest.commit, stages=stages, context_tokens=1)
        await case.here.buckets.spec.put(instance_key(name), spec)
        refused = await case.ask("delete", "storage")
        assert refused.error is not None and refused.error.code == "in_use"
        assert await case.is_published(manifest)
        sender = CommandClient(case.here.here.nats, case.here.buckets)
        forget = Forget(node="given-away")
        forgotten = await sender.send("placement", "any", "forget", forget, new_command_id(), DEADLINE_S)
        assert forgotten.ok, forgotten.error
        assert (await case.ask("delete", "storage")).ok
        await case.nothing_is_left()
