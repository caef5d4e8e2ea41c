"""A stage's lease: its model stays while the stage reads and runs, whichever process is killed, and no longer."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from shoal_common.bus.keys import instance_key, stage_key
from shoal_common.errors import NotFound, Unavailable
from shoal_common.messages.envelope import Empty
from shoal_common.messages.instances import InstanceSpec, StageSpec, StageState
from shoal_common.messages.leases import AcquireLease, LeaseGrant, ReleaseLease
from shoal_common.rpc.request_reply import RpcClient, RpcEndpoint, serve
from shoal_inference.assignments import Assignment
from shoal_inference.host_facts.model_lease import lease_model
from shoal_inference.stage.errors import LoadFailed
from shoal_inference.stage.requests import lease_lock as holding
from tests.harness.nats import NatsServer, joined
from tests.harness.process import Process, node_environment, started
from tests.harness.waiting import eventually
from tests.inference.tiny_models import LAYERS
from tests.storage.running_storage import Node, on_node
from tests.storage.store_fixtures import Model, files_below

Models = Callable[..., Path]
READY_S = 60.0


def wanted(model: Model, node: str, name: str = "x") -> InstanceSpec:
    """An instance with all layers on one node."""
    stage = StageSpec(rank=0, node=node, first_layer=0, last_layer=LAYERS)
    ref = model.manifest
    return InstanceSpec(id=name, repo=ref.repo, commit=ref.commit, stages=[stage], context_tokens=64)


@pytest.fixture
def model(models: Models) -> Model:
    """Put a tiny model into a store."""
    directory = models("qwen3")
    files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return Model("org/tiny", files)


@asynccontextmanager
async def inference(node: Node, server: NatsServer) -> AsyncIterator[Process]:
    """The inference service of a node."""
    async with started("-m", "shoal_inference", environment=node_environment(node.home, server.url)) as process:
        await process.wait_ready()
        yield process


async def stage(node: Node, phase: str, name: str = "x", other_than: str = "") -> StageState:
    """Return the stage's state once a process other than `other_than` is in the phase."""

    async def matching_state() -> StageState | None:
        found = await node.here.buckets.state.get_as(stage_key(name, 0), StageState)
        return found if found is not None and found.phase == phase and found.uid != other_than else None

    return await eventually(matching_state, f"the stage is {phase}", READY_S)


async def held_by(node: Node, other_than: int = 0) -> int:
    """Return the pid that holds the stage's lease, once storage has published it."""

    async def matching_state() -> int | None:
        leases = (await node.storage_state()).leases
        assert all(x.holder == "stage 0 of instance x" for x in leases)
        return next((x.pid for x in leases if x.pid not in (0, other_than)), None)

    return await eventually(matching_state, "the lease is held")


def runs(pid: int) -> bool:
    """Return whether a process is alive; a zombie is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_I4_a_stage_holds_its_model_until_its_process_ends(
    own_nats: NatsServer, tmp_path: Path, model: Model
) -> None:
    async with on_node(own_nats, tmp_path, "a") as node, node.fetcher():
        spec = node.here.buckets.spec
        async with node.storage() as storage:
            await node.bring_in(model)
            await storage.kill()
        async with inference(node, own_nats) as host:
            await spec.put(instance_key("x"), wanted(model, "a"))
            await host.wait_line("waiting for a model lease")  # storage is down, and the stage waits for it
            assert (await stage(node, "loading")).error is None
            async with node.storage():
                first = await stage(node, "ready")
                child = await held_by(node)
                refused = await node.delete("org/tiny")
                assert refused.error is not None and refused.error.code == "in_use"
                assert f"is used by stage 0 of instance x (pid {child}): stop it first" in refused.error.message
                os.kill(child, signal.SIGKILL)
                await stage(node, "ready", other_than=first.uid)
                again = await held_by(node, other_than=child)
                await host.kill()
                await spec.delete(instance_key("x"))
                # The stage process ends because its service has gone; the deletion waits for that.
                outcome = await node.delete("org/tiny")
                assert outcome.ok, outcome.error

                async def ended() -> bool:
                    return not runs(again)

                await eventually(ended, "the stage's process has ended")
                assert files_below(node.layout.root) == set()


async def test_a_stage_without_a_lease_fails_by_name(own_nats: NatsServer) -> None:
    assignment = Assignment(wanted(Model("org/tiny", {"a": b"a"}), "a"), wanted(Model("org/tiny", {}), "a").stages[0])
    async with joined(own_nats) as here:
        with pytest.raises(Unavailable, match=r"stage 0 of x got no lease of org/tiny@.* storage of node a"):
            async with lease_model(RpcClient(here.nats), "a", assignment, timeout_s=0.1):
                pass
        asked: list[AcquireLease] = []
        given: list[str] = []

        async def lease(question: AcquireLease) -> LeaseGrant:
            asked.append(question)
            if len(asked) == 1:
                raise Unavailable("not now")
            if len(asked) == 2:
                return LeaseGrant(id="l1", commit="c", view="/v", lock="/l")
            raise NotFound("it was deleted")

        async def unlease(question: ReleaseLease) -> Empty:
            given.append(question.id)
            return Empty()

        stopping = asyncio.Event()
        questions = {"lease": RpcEndpoint(AcquireLease, lease), "release_lease": RpcEndpoint(ReleaseLease, unlease)}
        serving = asyncio.create_task(serve(here.nats, "storage", "a", questions, stopping))
        try:
            async with lease_model(RpcClient(here.nats), "a", assignment) as got:
                assert (got.view, got.lock, given) == ("/v", "/l", [])
            assert given == ["l1"]
            assert (asked[0].holder, asked[0].instance) == ("stage 0 of instance x", "x")
            with pytest.raises(NotFound, match="it was deleted"):
                async with lease_model(RpcClient(here.nats), "a", assignment):
                    pass
        finally:
            stopping.set()
            await serving


async def test_a_lease_lock_is_shared_not_inherited_and_awaits_checks(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    lock_fd = os.open(lock, os.O_RDONLY)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    taking = asyncio.create_task(holding.hold(str(lock)))
    other = asyncio.create_task(holding.hold(str(lock)))
    done, _ = await asyncio.wait({taking, other}, timeout=0.1)
    assert not done
    fcntl.flock(lock_fd, fcntl.LOCK_UN)
    held, too = await taking, await other
    assert not os.get_inheritable(held)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for fd in (held, too):
        os.close(fd)
    fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    late = asyncio.create_task(holding.hold(str(lock)))
    await asyncio.wait({late}, timeout=0.1)
    lock.unlink()
    os.close(lock_fd)
    with pytest.raises(LoadFailed, match="lease ended before the stage locked it"):
        await late
    with pytest.raises(LoadFailed, match="lease ended before the stage locked it"):
        await holding.hold(str(lock))


async def test_a_lock_that_is_taken_for_long_is_a_failure_with_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr(holding, "HOLD_WITHIN_S", 0.05)
    taken = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(taken, fcntl.LOCK_EX)
        with pytest.raises(LoadFailed, match="was held by another process"):
            await holding.hold(str(lock))
    finally:
        os.close(taken)
