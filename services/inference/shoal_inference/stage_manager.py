"""The stages of this node: started, watched and stopped as instances come and go."""

from __future__ import annotations

import asyncio

from msgspec import structs

from shoal_common.bus.keys import stage_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.reconcile import reconcile_forever
from shoal_common.errors import NotFound
from shoal_common.host.cgroup import AvailableMemory
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.identity.peer_secrets import PeerSecrets
from shoal_common.logs import StructuredLogger
from shoal_common.messages.envelope import Empty
from shoal_common.messages.generation import Accepted, CancelGenerate, Generate
from shoal_common.messages.instances import InstanceSpec, StageState
from shoal_common.messages.liveness import NodeFacts
from shoal_common.service import ServiceContext
from shoal_common.settings.node import InferenceSettings, PortSettings
from shoal_common.settings.ports import stage_ports
from shoal_common.settings.values import read_settings
from shoal_inference.assignments import Assignment, assignments, reconcile, stale_stages
from shoal_inference.host_facts.bandwidth_estimate import BandwidthEstimate
from shoal_inference.host_facts.device import (
    detect_device,
    has_to_be_measured,
    read_observed_bandwidth,
    save_observed_bandwidth,
)
from shoal_inference.host_facts.memory import debounce_facts, memory_facts, occupied_bytes
from shoal_inference.host_facts.oom_guard import CHECK_INTERVAL_S, oom_reason
from shoal_inference.host_facts.usage_reporter import UsageReporter
from shoal_inference.stage.compute.device import Device
from shoal_inference.stage_runner import StageRunner

log = StructuredLogger("inference")
_MEMORY_INTERVAL_S = 5.0


class StageManager:
    """Runs all stages of this node."""

    def __init__(
        self,
        context: ServiceContext,
        tasks: asyncio.TaskGroup,
        spec: KvMirror,
        state: KvMirror,
        secrets: PeerSecrets,
        peer_links: PeerLinks,
    ) -> None:
        self._context, self._tasks = context, tasks
        self._secrets, self._peer_links = secrets, peer_links
        self._spec, self._state = spec, state
        self._running: dict[tuple[str, int, int], tuple[StageRunner, asyncio.Task[None]]] = {}
        self._usage_reporter = UsageReporter(context.rpc, tasks)
        self._settings = read_settings(InferenceSettings, context.config.settings, context.environ)
        self._stage_ports = stage_ports(read_settings(PortSettings, context.config.settings, context.environ))
        self._device = Device(bytes_per_s=self._settings.memory_bytes_per_s or 0.0)
        self._speed = BandwidthEstimate(self._save_bandwidth)
        self._memory = AvailableMemory()

    def facts(self) -> NodeFacts:
        """Return the memory this node's stages occupy and what is available. Reads files: call it in a thread."""
        stages: dict[str, int] = {}
        for (instance, _, rank), (runner, _) in list(self._running.items()):
            if (pid := runner.pid) is not None:
                name = f"{instance}/{rank}"
                stages[name] = stages.get(name, 0) + occupied_bytes(pid)
        facts = memory_facts(self._memory.read(), self._settings.max_memory_bytes, stages, self._device)
        return structs.replace(
            facts,
            observed_bandwidth_bytes_per_s=self._speed.published_bytes_per_s,
            stage_port=self._stage_ports[0],
        )

    async def detect_device(self) -> None:
        """Detect the accelerator and memory bandwidth; published with the next memory sample."""
        home, configured = self._context.config.home, self._settings.memory_bytes_per_s
        if configured is not None:  # never corrected
            self._device = await detect_device(home, configured, idle_wait_s=0.0)
            return
        self._speed.start(0.0, await asyncio.to_thread(read_observed_bandwidth, home))
        # On a busy machine a rough figure comes first: until there is one, placement assumes a fast machine's.
        self._device = await detect_device(home, None, idle_wait_s=0.0)
        if await asyncio.to_thread(has_to_be_measured, home):
            self._device = await detect_device(home, None)
        self._speed.start(self._device.bytes_per_s, 0.0)

    def _save_bandwidth(self, bytes_per_s: float) -> None:
        log.debug("memory bandwidth estimate changed", bytes_per_s=bytes_per_s)
        self._tasks.create_task(asyncio.to_thread(save_observed_bandwidth, self._context.config.home, bytes_per_s))

    def _wanted(self) -> dict[tuple[str, int, int], Assignment]:
        return assignments((s for _, s in self._spec.items("instance.", InstanceSpec)), self._context.node)

    async def unpublish_stale_stages(self) -> None:
        """At start, unpublish stages of an earlier process that are no longer wanted."""
        published = [s for _, s in self._state.items("stage.", StageState)]
        for instance, rank in stale_stages(published, self._wanted().values(), self._context.node):
            await self._context.buckets.state.delete(stage_key(instance, rank))

    async def republish(self) -> None:
        """Publish the state of every stage again, which NATS has lost."""
        for runner, _ in list(self._running.values()):
            await runner.publish_again()

    async def reconcile_stages_forever(self) -> None:
        """Start and stop stages at every change of `spec`, for ever."""
        await reconcile_forever("starting and stopping stages", (self._spec,), self._start_and_stop)

    async def _start_and_stop(self) -> None:
        changes = reconcile(self._wanted(), self._running)
        for key in changes.stop:
            await self._stop(key)
        for assignment in changes.start:
            self._start(assignment)

    def _start(self, assignment: Assignment) -> None:
        stage = assignment.stage
        log.info("starting stage", instance=assignment.spec.id, rank=stage.rank, layers=_layers(assignment))
        context = self._context
        runner = StageRunner(
            assignment,
            context.config,
            context.nats,
            context.buckets,
            self._state,
            context.interfaces,
            self._secrets,
            self._peer_links,
            self._speed,
            self._stage_ports,
        )
        self._running[assignment.key] = (runner, self._tasks.create_task(runner.run()))

    async def _stop(self, key: tuple[str, int, int]) -> None:
        runner, task = self._running.pop(key)
        log.info("stopping stage", instance=key[0], rank=key[2])
        task.cancel()
        await asyncio.wait({task})
        if not any(k[0] == key[0] and k[2] == key[2] for k in self._running):
            await runner.unpublish()

    async def stop_all(self) -> None:
        """Stop every stage of this node and unpublish it."""
        async with asyncio.TaskGroup() as stopping:
            for key in list(self._running):
                stopping.create_task(self._stop(key))

    async def publish_memory_forever(self) -> None:
        """Keep the memory figures of the liveness record current, for ever."""
        for limit in await asyncio.to_thread(self._memory.read):
            if limit.group is not None:
                log.info("memory limited by a control group", group=str(limit.group), limit_bytes=limit.total_bytes)
        while True:
            liveness = self._context.liveness
            liveness.set_facts(debounce_facts(liveness.facts, await asyncio.to_thread(self.facts)))
            await asyncio.sleep(_MEMORY_INTERVAL_S)

    async def guard_memory_forever(self) -> None:
        """Kill stages that were forced onto this node before the machine runs out of memory (`oom_guard.py`)."""
        while True:
            version = self._spec.changes
            if all(wanted.spec.tier != "force" for wanted in self._wanted().values()):
                await self._spec.wait_changed(version)
                continue
            reason = oom_reason(await asyncio.to_thread(self.facts), self._settings.force_floor_bytes)
            if reason is not None:
                for runner, _ in self._running.values():
                    if runner.assignment.spec.tier == "force":
                        runner.kill_for_memory(reason)
            await asyncio.sleep(CHECK_INTERVAL_S)

    def _first_stage(self, instance: str) -> StageRunner:
        for (name, _, rank), (runner, _) in self._running.items():
            if name == instance and rank == 0:
                return runner
        raise NotFound(
            f"instance {instance} has no first stage on node {self._context.node}: it was stopped or "
            "moved; see `shoal ps`"
        )

    async def generate(self, request: Generate) -> Accepted:
        """Start an answer and record the use of its model. Raises what the stage answers."""
        runner = self._first_stage(request.instance)
        accepted = await runner.generate(request)
        self._usage_reporter.report(runner.assignment.spec, asyncio.get_running_loop().time())
        return accepted

    async def cancel(self, request: CancelGenerate) -> Empty:
        """Cancel an answer. One that has ended already is no error (I5)."""
        try:
            await self._first_stage(request.instance).cancel(request.request)
        except NotFound:
            log.debug("cancel for an unknown instance", instance=request.instance)
        return Empty()


def _layers(assignment: Assignment) -> str:
    return f"{assignment.stage.first_layer}-{assignment.stage.last_layer - 1}"
