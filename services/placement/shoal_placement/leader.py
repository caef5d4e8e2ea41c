"""The shell: one placement service leads, carries out `any` commands, and keeps `state.instance` true.

Every node runs placement; who holds `lease.leader.placement` leads. A leader that loses its lease stops at once, and
its unfinished commands go back to the queue for the next one.
"""

from __future__ import annotations

import asyncio
import time

from shoal_common.buckets import LEASE_TTL_S, instance_key, leader_key
from shoal_common.cancelling import ended
from shoal_common.commands import Verb
from shoal_common.errors import Unavailable
from shoal_common.leases import Lease, acquire, holding
from shoal_common.logs import Log
from shoal_common.messages import Message
from shoal_common.messages.commands import Forget, Place, Unplace
from shoal_common.messages.facts import Live
from shoal_common.messages.records import InstanceSpec, InstanceState, ModelState, StageSpec, StageState
from shoal_common.names import ModelRef, check_id
from shoal_common.questions import Question
from shoal_common.service import Context
from shoal_common.watch import View, any_changed
from shoal_placement.collector import SETTLED_S, Collector
from shoal_placement.current import catch_up
from shoal_placement.decide import World, instance_id, instance_state, plan, spec_of
from shoal_placement.fenced import Writes
from shoal_placement.retire import read_retire_after
from shoal_placement.suspect import present
from shoal_placement.suspicion import Suspicion

log = Log("placement")

_PLACE_DEADLINE_S = 60.0
_UNPLACE_DEADLINE_S = 60.0
_FORGET_DEADLINE_S = 60.0
_STAGES_GONE_S = 20.0
_LOOK_FOR_LEADER_S = LEASE_TTL_S / 2


class Placed(Message):
    """The outcome of `place`, and the answer to `preview` (without an instance)."""

    instance: str
    model: str
    stages: list[StageSpec]
    context_tokens: int


class Placement:
    """Views of the cluster, and what a leader does with them."""

    def __init__(self, context: Context, live: View, spec: View, state: View, collector: Collector) -> None:
        self._context, self._collector = context, collector
        self._live, self._spec, self._state = live, spec, state
        self._section = asyncio.Lock()
        self._suspicion = Suspicion(context, live)
        self._writes: Writes
        """While it leads."""

    def _world(self) -> World:
        here = {k: v for k, v in self._live.items("", Live) if k not in self._suspicion.silent}
        facts = {}
        for key, live in here.items():
            node, _, service = key.partition(".")
            if service == "inference":
                facts[node] = live.facts
        return World(
            alive={key.partition(".")[0] for key in here},
            facts=facts,
            models=[m for _, m in self._state.items("model.", ModelState)],
            instances=[s for _, s in self._spec.items("instance.", InstanceSpec)],
        )

    async def _catch_up(self) -> None:
        # What another leader placed, or a fetcher finished, a moment ago is in NATS, if not yet in our views.
        await catch_up(self._context.nats, self._live, self._spec, self._state)

    # Commands and questions

    async def place(self, command: Place, identity: str) -> Placed:
        """Lay a model out and have the nodes start it. The same command again finds its own instance."""
        async with self._section:
            await self._catch_up()
            name = instance_id(ModelRef.parse(command.model).repo, identity)
            placed = self._spec.get(instance_key(name), InstanceSpec)
            if placed is not None:
                return _placed(placed)
            found = await asyncio.to_thread(plan, command, self._world())
            spec = spec_of(found, name, round(time.time(), 3))
            await self._spec.reached(await self._writes.spec.put(instance_key(name), spec))
        log.info("placed", instance=name, model=spec.model, nodes=",".join(s.node for s in spec.stages))
        await self._context.events.tell("placed", instance=name, model=spec.model)
        return _placed(spec)

    async def unplace(self, command: Unplace, _: str) -> dict[str, object]:
        """Stop an instance and wait for its stages to be gone. One that is not there is no error (I5)."""
        name = check_id(command.instance)
        stopped = await self._writes.spec.delete(instance_key(name))

        def gone(view: View) -> bool | None:
            return None if any(True for _ in view.items(f"stage.{name}.", StageState)) else True

        if stopped:
            log.info("unplaced", instance=name)
            await self._context.events.tell("unplaced", instance=name)
            await self._state.until(gone, _STAGES_GONE_S)
        return {"instance": name, "stopped": stopped}

    async def preview(self, question: Place) -> Placed:
        """The layout that `place` would choose now. Writes nothing."""
        await self._catch_up()
        found = await asyncio.to_thread(plan, question, self._world())
        return _placed(spec_of(found, "preview", 0.0))

    # Leading

    async def lead_forever(self, lease_view: View) -> None:
        """Become the leader whenever nobody is."""
        context = self._context
        while True:
            seen = lease_view.changes
            lease = None
            try:
                lease = await acquire(
                    context.buckets.lease, leader_key("placement"), context.node, context.liveness.uid
                )
            except Unavailable as e:
                log.warning("cannot ask for the leadership", why=e.message)
            if lease is not None:
                async with holding(lease):
                    await self._lead(lease)
                log.info("no longer leading")
                continue
            try:
                async with asyncio.timeout(_LOOK_FOR_LEADER_S):
                    await lease_view.changed_after(seen)
            except TimeoutError:
                continue

    async def _lead(self, lease: Lease) -> None:
        self._writes = Writes(self._context.buckets.spec, self._context.buckets.state, lease)
        if not await self._writes.begin():
            return
        log.info("leading")
        over = asyncio.Event()
        verbs = {
            "place": Verb(Place, self.place, _PLACE_DEADLINE_S),
            "unplace": Verb(Unplace, self.unplace, _UNPLACE_DEADLINE_S),
            "forget": Verb(Forget, self._collector.forget, _FORGET_DEADLINE_S),
        }
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(self._context.work(verbs, address="any", until=over))
            keeping = tasks.create_task(self._keep_instance_states())
            collecting = tasks.create_task(self._collector.run(lease, self._writes))
            suspecting = tasks.create_task(self._suspicion.run())
            await lease.wait_lost()
            over.set()
            await ended(keeping, collecting, suspecting)
            await asyncio.wait({working})

    async def _keep_instance_states(self) -> None:
        """Write `state.instance` at every change that changes it, and when an outage of NATS has been settled."""
        views = (self._live, self._spec, self._state, self._suspicion.silent)
        loop, reconnects = asyncio.get_running_loop(), self._context.nats.reconnects
        # It may be an outage that made us the leader.
        connection, settled_at_s = 0, loop.time()
        while True:
            seen = tuple(view.changes for view in views)
            if reconnects.count != connection:
                connection, settled_at_s = reconnects.count, loop.time() + SETTLED_S
            unsettled_s = settled_at_s - loop.time()
            await self._write_instance_states(settled=unsettled_s <= 0)
            await any_changed(views, seen, unsettled_s if unsettled_s > 0 else None)

    async def _write_instance_states(self, settled: bool) -> None:
        bucket = self._writes.state
        specs = {s.id: s for _, s in self._spec.items("instance.", InstanceSpec)}
        told = {s.id: s for _, s in self._state.items("instance.", InstanceState)}
        stages = [s for _, s in self._state.items("stage.", StageState)]
        live = {key.partition(".")[0] for key, _ in self._live.items("", Live) if key.endswith(".inference")}
        silent = self._suspicion.nodes("inference")
        for name, spec in specs.items():
            here = present(live, silent, told.get(name), settled)
            now = instance_state(spec, stages, here, told.get(name))
            if now != told.get(name):
                await self._state.reached(await bucket.put(instance_key(name), now))
        for name in told.keys() - specs.keys():
            await bucket.delete(instance_key(name))


def _placed(spec: InstanceSpec) -> Placed:
    return Placed(instance=spec.id, model=spec.model, stages=spec.stages, context_tokens=spec.context_tokens)


async def run(context: Context) -> None:
    """The placement service."""
    async with asyncio.TaskGroup() as tasks:
        live = await context.view(tasks, "live")
        spec = await context.view(tasks, "spec")
        state = await context.view(tasks, "state")
        lease = await context.view(tasks, "lease", "leader.>")
        retire_after_s = read_retire_after(context.config.settings.get("placement", {}), context.environ)
        collector = Collector(context, live, spec, state, retire_after_s)
        placement = Placement(context, live, spec, state, collector)
        context.background(tasks, placement.lead_forever(lease))
        tasks.create_task(context.serve({"preview": Question(Place, placement.preview)}))
        context.ready()
