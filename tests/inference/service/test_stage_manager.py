"""The stage manager: the stages that run on a node are those of `spec.instance`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shoal_common.bus.keys import instance_key, stage_key
from shoal_common.errors import NodeDown, NotFound, StageLost, Unavailable
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.messages.envelope import Empty
from shoal_common.messages.generation import Accepted, CancelGenerate, Generate
from shoal_common.messages.instances import InstanceSpec, StageSpec, StageState
from shoal_common.messages.liveness import NodeAddress
from shoal_common.rpc.request_reply import RpcClient
from shoal_inference.assignments import assignments, reconcile, stale_stages, successor_link
from tests.harness.identities import Authority
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.process import node_environment, started
from tests.harness.waiting import eventually

COMMIT = "0" * 40
NODES = ("a", "b", "c")


def instance(name: str, *nodes: str, epoch: int = 1) -> InstanceSpec:
    stages = [StageSpec(rank=r, node=n, first_layer=2 * r, last_layer=2 * r + 2) for r, n in enumerate(nodes)]
    return InstanceSpec(id=name, repo="org/name", commit=COMMIT, stages=stages, context_tokens=256, epoch=epoch)


specs = st.lists(
    st.builds(
        lambda name, nodes, epoch: instance(name, *nodes, epoch=epoch),
        st.sampled_from(["x", "y", "z"]),
        st.lists(st.sampled_from(NODES), min_size=1, max_size=3),
        st.integers(1, 3),
    ),
    max_size=4,
)


@given(specs, specs)
def test_after_reconciling_exactly_the_wanted_stages_run(
    before: list[InstanceSpec], after: list[InstanceSpec]
) -> None:
    running = set(assignments(before, "a"))
    wanted = assignments(after, "a")
    changes = reconcile(wanted, running)
    assert (running - set(changes.stop)) | {a.key for a in changes.start} == set(wanted)
    assert not reconcile(wanted, wanted).start
    assert not reconcile(wanted, wanted).stop


@given(specs)
def test_leftovers_are_this_nodes_stages_that_nobody_wants(wanted: list[InstanceSpec]) -> None:
    published = [
        StageState(instance=i, rank=r, node=n, epoch=1, phase="ready") for i in "xyz" for r in range(3) for n in NODES
    ]
    own = assignments(wanted, "a")
    left = set(stale_stages(published, own.values(), "a"))
    assert left == {(i, r) for i in "xyz" for r in range(3)} - {(k[0], k[2]) for k in own}


def test_the_last_rank_links_to_the_first_only_within_an_epoch() -> None:
    spec = instance("x", "a", "b", epoch=2)
    states = [
        StageState(instance="x", rank=0, node="a", epoch=2, phase="ready", address="h:1"),
        StageState(instance="x", rank=1, node="b", epoch=1, phase="ready", address="h:2"),
    ]
    assert successor_link(spec, 1, states, lambda _: True) == NodeAddress(address="h:1")
    assert successor_link(spec, 0, states, lambda _: True) is None


def test_I12_a_stage_that_does_not_encrypt_is_not_linked_to(tmp_path: Path) -> None:
    spec, is_usable = instance("x", "a", "b"), PeerLinks(Authority(tmp_path).node("a")).is_usable
    plain, encrypted = NodeAddress(address="10.0.0.1:1"), NodeAddress(address="10.0.0.2:1", tls=True)

    def linked(*links: NodeAddress) -> NodeAddress | None:
        state = StageState(instance="x", rank=1, node="b", epoch=1, phase="ready", address=links[0].address)
        return successor_link(spec, 0, [structs.replace(state, links=list(links))], is_usable)

    assert linked(plain, encrypted) == encrypted
    with pytest.raises(Unavailable, match=r"no address of stage 1 on node b can be used \(10\.0\.0\.1:1\)"):
        linked(plain)


class Service:
    """The inference service of node `a` as a process, and the test's view of the cluster."""

    def __init__(self, cluster: Joined) -> None:
        self.cluster, self.ask = cluster, RpcClient(cluster.nats)

    async def stage(self, name: str, rank: int) -> StageState | None:
        return await self.cluster.buckets.state.get_as(stage_key(name, rank), StageState)


async def test_a_stage_without_its_model_asks_the_fetcher_and_fails(own_nats: NatsServer, tmp_path: Path) -> None:
    home = tmp_path / "a"
    home.mkdir()
    (home / "node.toml").write_text('id = "a"\n')
    environment = node_environment(home, own_nats.url)
    async with joined(own_nats) as cluster, started("-m", "shoal_inference", environment=environment) as process:
        service = Service(cluster)
        await process.wait_ready()
        asked: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()

        async def fetcher(message: object) -> None:
            # The wire format of a command: the outcome goes to its reply subject.
            body = json.loads(message.data)  # type: ignore[attr-defined]  # nats-py's Msg
            if not asked.done():
                asked.set_result(body)
            error = {"code": "not_found", "message": "org/name is not on the hub: check the name"}
            outcome = {"id": message.headers["Nats-Msg-Id"], "ok": False, "error": error}  # type: ignore[attr-defined]  # the same
            await message.respond(json.dumps(outcome).encode())  # type: ignore[attr-defined]  # the same

        await cluster.nats.client.subscribe("shoal.v1.cmd.fetcher.a.download", cb=fetcher)
        await cluster.buckets.spec.put(instance_key("x"), instance("x", "a"))
        async with asyncio.timeout(45):
            assert (await asked)["model"] == f"org/name@{COMMIT}"

        async def failed() -> bool:
            state = await service.stage("x", 0)
            return state is not None and state.phase == "failed" and state.error is not None

        await eventually(failed, "the stage says that it failed")
        state = await service.stage("x", 0)
        assert state is not None
        assert state.error is not None
        assert state.error.code == "not_found"

        generate = Generate(instance="x", request="r1", prompt_tokens=[1])
        with pytest.raises(StageLost, match="not ready"):
            await service.ask("inference", "a", "generate", generate, Accepted)
        with pytest.raises(NotFound, match="shoal ps"):
            await service.ask("inference", "a", "generate", Generate(instance="y", request="r2"), Accepted)
        await service.ask("inference", "a", "cancel", CancelGenerate(instance="y", request="r2"), Empty)

        await cluster.buckets.spec.delete(instance_key("x"))

        async def gone() -> bool:
            return await service.stage("x", 0) is None

        await eventually(gone, "the stage's state goes with its assignment (I8)")
    with pytest.raises(NodeDown):
        async with joined(own_nats) as cluster:
            await RpcClient(cluster.nats)("inference", "a", "generate", generate, Accepted)


async def test_I8_stage_states_of_an_earlier_process_are_unpublished(own_nats: NatsServer, tmp_path: Path) -> None:
    home = tmp_path / "a"
    home.mkdir()
    (home / "node.toml").write_text('id = "a"\n')
    async with joined(own_nats) as cluster:
        for node, rank in (("a", 0), ("b", 1)):
            left = StageState(instance="old", rank=rank, node=node, epoch=1, phase="ready", address="h:1")
            await cluster.buckets.state.put(stage_key("old", rank), left)
        async with started("-m", "shoal_inference", environment=node_environment(home, own_nats.url)) as process:
            await process.wait_ready()
            assert await cluster.buckets.state.get(stage_key("old", 0)) is None
            assert await cluster.buckets.state.get(stage_key("old", 1)) is not None
