"""The leader: takes the lease, and carries out place, unplace, drain, rebalance, forget."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic
from typing import Literal

from shoal_common.bus import cluster_clock
from shoal_common.bus.cluster_lease import ClusterLease, LeaseValue, acquire, hold
from shoal_common.bus.keys import instance_key, leader_key, node_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.streams import LEASE_TTL_S
from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_common.errors import NotFound, Unavailable
from shoal_common.liveness.compatibility import CompatibleLiveMirror
from shoal_common.logs import StructuredLogger
from shoal_common.messages import WireStruct
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.instances import InstanceSpec, StageSpec, StageState
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.messages.model_shape import GetModelShape, ModelSize
from shoal_common.messages.placement import (
    Drain,
    FittingModels,
    Forget,
    LinksState,
    ListFits,
    ListRebalances,
    NodeSpec,
    PlaceCommand,
    Previews,
    Rebalance,
    Rebalances,
    Unplace,
)
from shoal_common.messages.storage import ModelState, ShardState
from shoal_common.names import ModelRef, check_id, check_node
from shoal_common.rpc.command_worker import CommandHandler
from shoal_common.service import ServiceContext
from shoal_placement.catch_up import catch_up
from shoal_placement.leader.failure_detector import FailureDetector
from shoal_placement.leader.fenced_writes import LeaderWrites
from shoal_placement.leader.instance_status_publisher import InstanceStatusPublisher
from shoal_placement.leader.membership_publisher import MembershipPublisher
from shoal_placement.leader.migration import Migrator
from shoal_placement.leader.node_gc import NodeGarbageCollector
from shoal_placement.network.model import NetworkModel
from shoal_placement.network.survey import LinkSurvey
from shoal_placement.planning.cluster_facts import ClusterFacts, instance_id
from shoal_placement.planning.plan import layout_name, to_instance_spec
from shoal_placement.planning.planner import candidate_nodes, plan_layout, plan_previews
from shoal_placement.planning.previews import list_fitting_models, to_previews
from shoal_placement.planning.rebalance import best_rebalance, rebalances, replan
from shoal_placement.planning.requests import is_held, requests_in_flight, with_remote_model

log = StructuredLogger("placement")
_PLACE_DEADLINE_S = 60.0
_UNPLACE_DEADLINE_S = 60.0
_FORGET_DEADLINE_S = 60.0
_DRAIN_DEADLINE_S = 60.0
_STAGES_GONE_TIMEOUT_S = 20.0
_SIZE_DEADLINE_S = 25.0
_LEASE_CHECK_INTERVAL_S = LEASE_TTL_S / 2
_ACQUIRE_INTERVAL_S = 30.0
"""The mirror of the lease shows who leads; NATS is asked this often all the same."""


class PlaceResult(WireStruct):
    """The result of `place`, and the reply to `preview` (without an instance)."""

    instance: str
    model: str
    stages: list[StageSpec]
    context_tokens: int
    tier: Literal["fits", "tight", "force"] = "fits"
    is_low_memory: bool = False
    """Whether other programs may have to free memory."""


class PlacementService:
    """The placement commands and questions, and the election of the leader."""

    def __init__(
        self,
        context: ServiceContext,
        live: CompatibleLiveMirror,
        spec: KvMirror,
        state: KvMirror,
        collector: NodeGarbageCollector,
        survey: LinkSurvey,
        replace_after_s: float,
    ) -> None:
        self._context, self._node_gc, self.survey = context, collector, survey
        self._live, self._spec, self._state = live, spec, state
        self._section = asyncio.Lock()
        self._failure_detector = FailureDetector(context, live)
        self._migrator = Migrator(
            context, (live, spec, state), self._inference_nodes, self._cluster_facts, self._section, replace_after_s
        )
        self._instances = InstanceStatusPublisher(
            context, (live, spec, state), self._failure_detector, self._migrator
        )
        self._membership = MembershipPublisher(context, live, state, self._failure_detector.unresponsive)
        self._writes: LeaderWrites
        """Set while it leads."""

    def _answering_services(self) -> dict[str, dict[str, LivenessRecord]]:
        """Return the services that are live and answer, by service and node."""
        services: dict[str, dict[str, LivenessRecord]] = {}
        for key, record in self._live.items("", LivenessRecord):
            if key not in self._failure_detector.unresponsive:
                node, _, service = key.partition(".")
                services.setdefault(service, {})[node] = record
        return services

    def _inference_nodes(self) -> set[str]:
        """Return the nodes that can run stages."""
        return set(self._answering_services().get("inference", {}))

    def _cluster_facts(self) -> ClusterFacts:
        services = self._answering_services()
        measured = (s for _, s in self._state.items("links.", LinksState))
        fileservers = {node: record.facts for node, record in services.get("fileserver", {}).items()}
        return ClusterFacts(
            live_nodes={node for nodes in services.values() for node in nodes},
            inference_facts={node: record.facts for node, record in services.get("inference", {}).items()},
            models=[m for _, m in self._state.items("model.", ModelState)],
            shards=[p for _, p in self._state.items("shard.", ShardState)],
            downloads=[d for _, d in self._state.items("download.", DownloadState)],
            instances=[s for _, s in self._spec.items("instance.", InstanceSpec)],
            drained_nodes={s.node for _, s in self._spec.items("node.", NodeSpec)},
            links=NetworkModel(measured, fileservers, cluster_clock.now_s()),
        )

    async def _catch_up(self) -> None:
        # What another leader placed or a fetcher finished a moment ago is in NATS, but may not be in the mirrors yet.
        await catch_up(self._context.nats, self._live, self._spec, self._state)

    # Commands and questions

    async def place(self, command: PlaceCommand, identity: str) -> PlaceResult:
        """Choose a layout and publish the instance. The same command delivered again returns that instance (I5)."""
        async with self._section:
            await self._catch_up()
            name = instance_id(ModelRef.parse(command.model).repo, identity)
            existing = self._spec.get(instance_key(name), InstanceSpec)
            if existing is not None:
                return _placed(existing)
            chosen = await asyncio.to_thread(plan_layout, command, self._cluster_facts())
            spec = to_instance_spec(chosen, name, round(cluster_clock.now_s(), 3))
            await self._spec.wait_revision(await self._writes.spec.put(instance_key(name), spec))
        self.survey.request_measurements(candidate_nodes([chosen]))
        log.info("instance placed", instance=name, model=spec.model, nodes=",".join(s.node for s in spec.stages))
        await self._context.events.emit("placed", instance=name, model=spec.model)
        return _placed(spec)

    async def unplace(self, command: Unplace, _: str) -> dict[str, object]:
        """Stop an instance and wait until its stages are gone. An unknown instance is no error (I5)."""
        name = check_id(command.instance)
        async with self._section:  # a replan under way would publish it again
            stopped = await self._writes.spec.delete(instance_key(name))

        def stages_gone(state: KvMirror) -> bool | None:
            return None if any(True for _ in state.items(f"stage.{name}.", StageState)) else True

        if stopped:
            log.info("instance stopped", instance=name)
            await self._context.events.emit("unplaced", instance=name)
            await self._state.wait_for(stages_gone, _STAGES_GONE_TIMEOUT_S)
        return {"instance": name, "stopped": stopped}

    async def _rebalance(self, command: Rebalance, _: str) -> dict[str, object]:
        """Move an instance to a layout, or to the best one. It is no error if it has that layout already (I5)."""
        name = check_id(command.instance)
        async with self._section:
            await self._catch_up()
            spec, layout = self._spec.get(instance_key(name), InstanceSpec), command.layout
            if spec is None:
                raise NotFound(f"there is no instance {name}: `shoal ps` lists the instances")
            cluster = self._cluster_facts()
            has_lost_node = not {stage.node for stage in spec.stages} <= cluster.inference_facts.keys()
            if not layout and not has_lost_node:
                proposal = await asyncio.to_thread(best_rebalance, spec, cluster)
                layout = "" if proposal is None else proposal.proposed.layout
            if layout == layout_name(spec.stages) or not (layout or has_lost_node):
                return {"instance": name, "moved": False, "epoch": spec.epoch}
            replanned = await asyncio.to_thread(replan, spec, cluster, layout)
            await self._migrator.publish_layout(replanned, "requested by a person", self._writes)
        return {"instance": name, "moved": True, "epoch": replanned.epoch}

    async def _drain(self, command: Drain, _: str) -> dict[str, object]:
        """Drain a node, or undo that. Idempotent (I5). Raises NotFound for a node that is not live."""
        async with self._section:
            await self._catch_up()
            node, spec = check_node(command.node), self._writes.spec
            if not command.drained:
                was_drained = await spec.delete(node_key(node))
            elif was_drained := node_key(node) in self._spec:
                pass
            elif node in self._cluster_facts().live_nodes:
                await self._spec.wait_revision(
                    await spec.put(
                        node_key(node), NodeSpec(node=node, requested_at_s=round(cluster_clock.now_s(), 3))
                    )
                )
            else:
                raise NotFound(f"node {node} is not live: to remove a node for good, run `shoal node forget {node}`")
        log.info("node drained" if command.drained else "node no longer drained", name=node)
        affected = [
            s.id for _, s in self._spec.items("instance.", InstanceSpec) if node in {g.node for g in s.stages}
        ]
        return {
            "node": node,
            "drained": command.drained,
            "was_drained": was_drained,
            "instances": sorted(affected),
        }

    async def preview(self, request: PlaceCommand) -> PlaceResult:
        """Return the layout that `place` would choose now. Writes nothing."""
        await self._catch_up()
        chosen = await asyncio.to_thread(plan_layout, request, self._cluster_facts())
        self.survey.request_measurements(candidate_nodes([chosen]))
        return _placed(to_instance_spec(chosen, "preview", 0.0))

    async def previews(self, request: PlaceCommand) -> Previews:
        """Return the best layout for each number of nodes, in any memory tier. Writes nothing."""
        await self._catch_up()
        cluster = self._cluster_facts()
        if not is_held(request.model, cluster):
            cluster = with_remote_model(cluster, request.model, await self._size_of(request.model))
        plans = await asyncio.to_thread(plan_previews, request, cluster)
        self.survey.request_measurements(candidate_nodes(plans))
        return to_previews(plans, cluster.inference_facts, requests_in_flight(request))

    async def list_fits(self, request: ListFits) -> FittingModels:
        """Return which of the models on live nodes could be placed now. Writes nothing."""
        await self._catch_up()
        return await asyncio.to_thread(list_fitting_models, request, self._cluster_facts())

    async def list_rebalances(self, _: ListRebalances) -> Rebalances:
        """Return which instances would run better on another layout. Writes nothing."""
        await self._catch_up()
        return await asyncio.to_thread(rebalances, self._cluster_facts())

    async def _size_of(self, model: str) -> ModelSize:
        """Have a fetcher read the size of a model that no node has from the hub. Raises NotFound and others."""
        fetchers = sorted(
            key.partition(".")[0] for key, _ in self._live.items("", LivenessRecord) if key.endswith(".fetcher")
        )
        if not fetchers:
            raise NotFound(
                f"no live node holds {model}, and no fetcher is live to ask the hub: start a node with `shoal up`"
            )
        node = self._context.node if self._context.node in fetchers else fetchers[0]
        return await self._context.rpc(
            "fetcher", node, "shape", GetModelShape(model=model), ModelSize, _SIZE_DEADLINE_S
        )

    # Leading

    async def lead_forever(self, lease_mirror: KvMirror) -> None:
        """Acquire the lease whenever it is free, and lead while it is held. Never returns."""
        key, next_try_s = leader_key("placement"), 0.0
        while True:
            seen, holder = lease_mirror.changes, lease_mirror.get(key, LeaseValue)
            if holder is None or holder.node == self._context.node or monotonic() >= next_try_s:
                next_try_s = monotonic() + _ACQUIRE_INTERVAL_S
                if (lease := await self._acquire(key)) is not None:
                    async with hold(lease):
                        await self._lead(lease)
                    log.info("no longer leading")
                    continue
            with suppress(TimeoutError):
                async with asyncio.timeout(_LEASE_CHECK_INTERVAL_S):
                    await lease_mirror.wait_changed(seen)

    async def _acquire(self, key: str) -> ClusterLease | None:
        context = self._context
        try:
            return await acquire(context.buckets.lease, key, context.node, context.liveness.uid)
        except Unavailable as e:
            log.warning("cannot acquire the leader's lease", reason=e.message)
            return None

    async def _lead(self, lease: ClusterLease) -> None:
        self._writes = LeaderWrites(self._context.buckets.spec, self._context.buckets.state, lease)
        if not await self._writes.begin():
            return
        log.info("leading")
        lost = asyncio.Event()
        verbs = {
            "place": CommandHandler(PlaceCommand, self.place, _PLACE_DEADLINE_S),
            "unplace": CommandHandler(Unplace, self.unplace, _UNPLACE_DEADLINE_S),
            "forget": CommandHandler(Forget, self._node_gc.forget, _FORGET_DEADLINE_S),
            "rebalance": CommandHandler(Rebalance, self._rebalance, _PLACE_DEADLINE_S),
            "drain": CommandHandler(Drain, self._drain, _DRAIN_DEADLINE_S),
        }
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._context.run_commands(verbs, address="any", until=lost))
            instances = tasks.create_task(self._instances.run(lease, self._writes))
            collector = tasks.create_task(self._node_gc.run(lease, self._writes))
            detector = tasks.create_task(self._failure_detector.run())
            membership = tasks.create_task(self._membership.run(self._writes))
            await lease.wait_lost()
            lost.set()
            await cancel_and_wait(instances, collector, detector, membership)


def _placed(spec: InstanceSpec) -> PlaceResult:
    return PlaceResult(
        instance=spec.id,
        model=spec.model,
        stages=spec.stages,
        context_tokens=spec.context_tokens,
        tier=spec.tier,
        is_low_memory=spec.tier != "fits",
    )
