"""A cluster for placement: real placement processes, and nodes that are only keys written to NATS."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shoal_common import VERSION
from shoal_common.bus import subjects
from shoal_common.bus.cluster_lease import LeaseValue
from shoal_common.bus.keys import MEMBERS_KEY, instance_key, leader_key, liveness_key, model_key, stage_key
from shoal_common.messages import decode, encode
from shoal_common.messages.envelope import Command, Outcome
from shoal_common.messages.instances import InstancePhase, InstanceSpec, InstanceState, StagePhase, StageState
from shoal_common.messages.liveness import LivenessRecord, NodeFacts, ProcessIdentity
from shoal_common.messages.model_shape import ModelShape
from shoal_common.messages.placement import MembersState, PlaceCommand
from shoal_common.messages.storage import ModelState
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.process import Process, node_environment, started
from tests.harness.waiting import eventually

MIB = 1 << 20
COMMIT = "a" * 40
MODEL = "org/tiny-fish"
SHAPE = ModelShape(
    architecture="qwen3",
    layer_bytes=[100 * MIB] * 4,
    embed_bytes=50 * MIB,
    head_bytes=60 * MIB,
    kv_bytes_per_token_layer=1024,
    context_tokens=32768,
    hidden_bytes=2048,
)
INSTANCE_MIB = 4 * 104 + 110 + 96
"""Memory of one instance on one node: layers with their cache, embedding and head, a stage's overhead."""
ASK_DEADLINE_S = 45.0
FOLLOW_DEADLINE_S = 45.0
"""For a change to reach the placement processes, a takeover by the next leader included."""


class Cluster:
    """Nodes that are only keys, and the placement processes that read them."""

    def __init__(self, server: NatsServer, here: Joined, directory: Path) -> None:
        self.server, self.here, self.directory = server, here, directory
        self._numbers = itertools.count(1)

    @asynccontextmanager
    async def placement(self, node: str, **more: str) -> AsyncIterator[Process]:
        """Run the placement service of a node, ready before the body starts."""
        home = self.directory / node
        await asyncio.to_thread(home.mkdir, exist_ok=True)
        await asyncio.to_thread((home / "node.toml").write_text, f'id = "{node}"\n')
        environment = node_environment(home, self.server.url, **more)
        async with started("-m", "shoal_placement", environment=environment) as process:
            await process.wait_ready()
            yield process

    async def beat(self, node: str, memory_mib: int, service: str = "inference", version: str = VERSION) -> None:
        """Publish that a node's service is live, with this much memory. The key expires after 20 s like any other."""
        live = LivenessRecord(
            holder=ProcessIdentity(uid=f"{node}-{service}", host="elsewhere", pid=1),
            version=version,
            facts=NodeFacts(memory_available_bytes=memory_mib * MIB, memory_total_bytes=2 * memory_mib * MIB),
        )
        await self.here.buckets.live.put(liveness_key(node, service), live)

    async def die(self, node: str) -> None:
        """Remove the liveness key of a node's inference."""
        await self.here.buckets.live.delete(liveness_key(node, "inference"))

    async def hold(self, node: str, shape: ModelShape | None = SHAPE, shape_error: str = "") -> None:
        """Publish that a node holds the model."""
        state = ModelState(
            node=node,
            repo=MODEL,
            commit=COMMIT,
            size_bytes=1,
            file_count=1,
            revisions=["main"],
            shape=shape,
            shape_error=shape_error,
        )
        await self.here.buckets.state.put(model_key(node, state.model), state)

    async def has_joined(self, node: str) -> None:
        """Return once the leader has published that the node is a member."""

        async def recorded() -> bool:
            record = await self.here.buckets.state.get_as(MEMBERS_KEY, MembersState)
            return record is not None and node in record.lost_since_s

        await eventually(recorded, f"{node} has joined", FOLLOW_DEADLINE_S)

    async def stage(self, spec: InstanceSpec, rank: int, phase: StagePhase) -> None:
        """Publish the state of a stage, as its node's inference does."""
        state = StageState(
            instance=spec.id, rank=rank, node=spec.stages[rank].node, epoch=spec.epoch, phase=phase, uid="u"
        )
        await self.here.buckets.state.put(stage_key(spec.id, rank), state)

    async def unstage(self, spec: InstanceSpec, rank: int) -> None:
        """Remove the state of a stage, as its node's inference does."""
        await self.here.buckets.state.delete(stage_key(spec.id, rank))

    async def send(self, verb: str, command: Command) -> None:
        """Send a command without waiting."""
        await self.here.client.publish(subjects.command("placement", "any", verb), encode(command))

    async def ask(self, verb: str, command: Command) -> Outcome:
        """Send a command and return its outcome, whichever leader carries it out."""
        identity = command.id or f"command-{next(self._numbers)}"
        subject = subjects.command("placement", "any", verb)
        await self.here.client.publish(subject, encode(command), headers={"Nats-Msg-Id": identity})
        return await self.outcome(identity)

    async def outcome(self, identity: str) -> Outcome:
        """Wait for the outcome of a command."""
        return await eventually(
            lambda: self.here.buckets.done.get_as(identity, Outcome), f"{identity} is done", ASK_DEADLINE_S
        )

    async def placed(self, command: PlaceCommand | None = None) -> InstanceSpec:
        """Place the model and return the spec of the instance."""
        outcome = await self.ask("place", command or PlaceCommand(model=MODEL))
        assert outcome.ok, outcome.error
        spec = await self.spec(str(outcome.result["instance"]))
        assert spec is not None
        return spec

    async def placed_nothing(self) -> None:
        """Place a model that nobody holds: the leader refuses, having seen all that was published before."""
        outcome = await self.ask("place", PlaceCommand(model="org/nothing"))
        assert outcome.error is not None and outcome.error.code == "not_found", outcome

    async def spec(self, instance: str) -> InstanceSpec | None:
        """Return the spec of an instance."""
        return await self.here.buckets.spec.get_as(instance_key(instance), InstanceSpec)

    async def specs(self) -> list[InstanceSpec]:
        """Return the specs of all instances."""
        keys = (await self.here.js.stream_info("KV_spec", subjects_filter="$KV.spec.instance.>")).state.subjects or {}
        found = [await self.here.buckets.spec.get(subject.removeprefix("$KV.spec.")) for subject in keys]
        return [decode(entry.value, InstanceSpec) for entry in found if entry is not None]

    async def state(self, instance: str) -> InstanceState | None:
        """Return the state of an instance."""
        return await self.here.buckets.state.get_as(instance_key(instance), InstanceState)

    async def wait_phase(self, instance: str, phase: InstancePhase) -> InstanceState:
        """Return once an instance is in this phase."""

        async def reached() -> InstanceState | None:
            state = await self.state(instance)
            return state if state is not None and state.phase == phase else None

        return await eventually(reached, f"{instance} is {phase}", FOLLOW_DEADLINE_S)

    async def leader(self) -> str:
        """Wait until a placement service leads, and return its node."""

        async def held() -> str | None:
            lease = await self.here.buckets.lease.get_as(leader_key("placement"), LeaseValue)
            return lease.node if lease is not None else None

        return await eventually(held, "somebody leads", FOLLOW_DEADLINE_S)


@asynccontextmanager
async def cluster_of(server: NatsServer, directory: Path) -> AsyncIterator[Cluster]:
    """Yield an empty cluster on this NATS server."""
    async with joined(server) as here:
        yield Cluster(server, here, directory)
