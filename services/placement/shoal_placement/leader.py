"""The shell: one placement service leads, carries out `any` commands, and keeps `state.instance` true.

Every node runs placement; who holds `lease.leader.placement` leads. A leader that loses its lease stops at once, and
its unfinished commands go back to the queue for the next one.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic
from typing import Literal

from shoal_common import clock
from shoal_common.buckets import LEASE_TTL_S, instance_key, leader_key, node_key
from shoal_common.cancelling import ended
from shoal_common.commands import Verb
from shoal_common.errors import NotFound, Unavailable
from shoal_common.leases import Lease, LeaseValue, acquire, holding
from shoal_common.logs import Log
from shoal_common.messages import Message
from shoal_common.messages.commands import Drain, Forget, Place, Rebalance, Unplace
from shoal_common.messages.facts import Live
from shoal_common.messages.questions import (
    AskFits,
    AskLinks,
    AskRebalances,
    AskShape,
    Fits,
    ModelSize,
    Previews,
    Rebalances,
)
from shoal_common.messages.records import (
    DownloadState,
    InstanceSpec,
    LinksState,
    ModelState,
    NodeSpec,
    PartState,
    StageSpec,
    StageState,
)
from shoal_common.names import ModelRef, check_id, check_node
from shoal_common.questions import Question
from shoal_common.service import Context
from shoal_common.watch import View
from shoal_placement.anew import better, placed_anew, rebalances
from shoal_placement.collector import Collector
from shoal_placement.current import catch_up
from shoal_placement.decide import World, instance_id
from shoal_placement.fenced import Writes
from shoal_placement.instances import Instances
from shoal_placement.links import Links
from shoal_placement.mover import Mover
from shoal_placement.planning import (
    as_previews,
    candidates,
    fitting,
    held,
    in_flight,
    layout_name,
    plan,
    previews,
    spec_of,
    with_unheld,
)
from shoal_placement.settings import read_settings
from shoal_placement.survey import Survey
from shoal_placement.suspicion import Suspicion

log = Log("placement")

_PLACE_DEADLINE_S = 60.0
_UNPLACE_DEADLINE_S = 60.0
_FORGET_DEADLINE_S = 60.0
_DRAIN_DEADLINE_S = 60.0
_STAGES_GONE_S = 20.0
_SIZE_DEADLINE_S = 25.0
_LOOK_FOR_LEADER_S = LEASE_TTL_S / 2
_ASK_ANYWAY_S = 30.0
"""Whether somebody leads is seen by the lease; so often NATS is asked all the same."""


class Placed(Message):
    """The outcome of `place`, and the answer to `preview` (without an instance)."""

    instance: str
    model: str
    stages: list[StageSpec]
    context_tokens: int
    tier: Literal["fits", "tight", "force"] = "fits"
    is_low_memory: bool = False
    """Whether other programs may have to give memory back."""


class Placement:
    """Views of the cluster, and what a leader does with them."""

    def __init__(
        self, context: Context, live: View, spec: View, state: View, collector: Collector, replace_after_s: float
    ) -> None:
        self._context, self._collector = context, collector
        self._live, self._spec, self._state = live, spec, state
        self._section = asyncio.Lock()
        self._suspicion, self.survey = Suspicion(context, live), Survey(context, live, state)
        self._mover = Mover(context, (live, spec, state), self._working, self._world, self._section, replace_after_s)
        self._instances = Instances(context, (live, spec, state), self._suspicion, self._mover)
        self._writes: Writes
        """While it leads."""

    def _heard(self) -> dict[str, dict[str, Live]]:
        """Services that are live and not silent, by service and node."""
        heard: dict[str, dict[str, Live]] = {}
        for key, live in self._live.items("", Live):
            if key not in self._suspicion.silent:
                node, _, service = key.partition(".")
                heard.setdefault(service, {})[node] = live
        return heard

    def _working(self) -> set[str]:
        """Nodes that run stages."""
        return set(self._heard().get("inference", {}))

    def _world(self) -> World:
        heard = self._heard()
        measured = (s for _, s in self._state.items("links.", LinksState))
        reached = {node: live.facts for node, live in heard.get("fileserver", {}).items()}
        return World(
            alive={node for nodes in heard.values() for node in nodes},
            facts={node: live.facts for node, live in heard.get("inference", {}).items()},
            models=[m for _, m in self._state.items("model.", ModelState)],
            parts=[p for _, p in self._state.items("part.", PartState)],
            downloads=[d for _, d in self._state.items("download.", DownloadState)],
            instances=[s for _, s in self._spec.items("instance.", InstanceSpec)],
            drained={s.node for _, s in self._spec.items("node.", NodeSpec)},
            links=Links(measured, reached, clock.now_s()),
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
            spec = spec_of(found, name, round(clock.now_s(), 3))
            await self._spec.reached(await self._writes.spec.put(instance_key(name), spec))
        self.survey.want(candidates([found]))
        log.info("placed", instance=name, model=spec.model, nodes=",".join(s.node for s in spec.stages))
        await self._context.events.tell("placed", instance=name, model=spec.model)
        return _placed(spec)

    async def unplace(self, command: Unplace, _: str) -> dict[str, object]:
        """Stop an instance and wait for its stages to be gone. One that is not there is no error (I5)."""
        name = check_id(command.instance)
        async with self._section:  # or what is being placed anew would come back
            stopped = await self._writes.spec.delete(instance_key(name))

        def gone(view: View) -> bool | None:
            return None if any(True for _ in view.items(f"stage.{name}.", StageState)) else True

        if stopped:
            log.info("unplaced", instance=name)
            await self._context.events.tell("unplaced", instance=name)
            await self._state.until(gone, _STAGES_GONE_S)
        return {"instance": name, "stopped": stopped}

    async def _rebalance(self, command: Rebalance, _: str) -> dict[str, object]:
        """Move an instance because a person says so. Once it stands so, saying it again is no error."""
        name = check_id(command.instance)
        async with self._section:
            await self._catch_up()
            spec, layout = self._spec.get(instance_key(name), InstanceSpec), command.layout
            if spec is None:
                raise NotFound(f"there is no instance {name}; `shoal ps` lists those there are")
            world = self._world()
            if not layout and (proposal := await asyncio.to_thread(better, spec, world)) is not None:
                layout = proposal.better.layout
            if layout in ("", layout_name(spec.stages)):
                return {"instance": name, "moved": False, "epoch": spec.epoch}
            fresh = await asyncio.to_thread(placed_anew, spec, world, layout)
            await self._mover.settle(fresh, "asked for", self._writes)
        return {"instance": name, "moved": True, "epoch": fresh.epoch}

    async def _drain(self, command: Drain, _: str) -> dict[str, object]:
        """Say that a node is to be empty, or is not any more. Idempotent; raises NotFound for one nobody knows."""
        async with self._section:
            await self._catch_up()
            node, spec = check_node(command.node), self._writes.spec
            if not command.drained:
                was = await spec.delete(node_key(node))
            elif was := node_key(node) in self._spec:
                pass
            elif node in self._world().alive:
                await self._spec.reached(
                    await spec.put(node_key(node), NodeSpec(node=node, asked_at_s=round(clock.now_s(), 3)))
                )
            else:
                raise NotFound(f"node {node} is not live: what is on one that is gone goes with `shoal node forget`")
        log.info("drained" if command.drained else "not drained any more", drained=node)
        staying = [s.id for _, s in self._spec.items("instance.", InstanceSpec) if node in {g.node for g in s.stages}]
        return {"node": node, "drained": command.drained, "was_drained": was, "instances": sorted(staying)}

    async def preview(self, question: Place) -> Placed:
        """The layout that `place` would choose now. Writes nothing."""
        await self._catch_up()
        found = await asyncio.to_thread(plan, question, self._world())
        self.survey.want(candidates([found]))
        return _placed(spec_of(found, "preview", 0.0))

    async def previews(self, question: Place) -> Previews:
        """What could be chosen, over each number of nodes and into whichever memory. Writes nothing."""
        await self._catch_up()
        world = self._world()
        if not held(question.model, world):
            world = with_unheld(world, question.model, await self._size_of(question.model))
        found = await asyncio.to_thread(previews, question, world)
        self.survey.want(candidates(found))
        return as_previews(found, world.facts, in_flight(question))

    async def fits(self, question: AskFits) -> Fits:
        """Which of the models that nodes hold could be placed now. Writes nothing."""
        await self._catch_up()
        return await asyncio.to_thread(fitting, question, self._world())

    async def rebalances(self, _: AskRebalances) -> Rebalances:
        """Which instances would stand better elsewhere. Writes nothing."""
        await self._catch_up()
        return await asyncio.to_thread(rebalances, self._world())

    async def _size_of(self, model: str) -> ModelSize:
        """What a model takes that no node has, by the headers of its files on the hub. Raises NotFound and others."""
        able = sorted(key.partition(".")[0] for key, _ in self._live.items("", Live) if key.endswith(".fetcher"))
        if not able:
            raise NotFound(f"no live node holds {model}, and none can look at the hub: start one with `shoal up`")
        node = self._context.node if self._context.node in able else able[0]
        return await self._context.ask("fetcher", node, "shape", AskShape(model=model), ModelSize, _SIZE_DEADLINE_S)

    # Leading

    async def lead_forever(self, lease_view: View) -> None:
        """Become the leader whenever nobody is."""
        key, asks_at_s = leader_key("placement"), 0.0
        while True:
            seen, holder = lease_view.changes, lease_view.get(key, LeaseValue)
            if holder is None or holder.node == self._context.node or monotonic() >= asks_at_s:
                asks_at_s = monotonic() + _ASK_ANYWAY_S
                if (lease := await self._acquire(key)) is not None:
                    async with holding(lease):
                        await self._lead(lease)
                    log.info("no longer leading")
                    continue
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_FOR_LEADER_S):
                    await lease_view.changed_after(seen)

    async def _acquire(self, key: str) -> Lease | None:
        context = self._context
        try:
            return await acquire(context.buckets.lease, key, context.node, context.liveness.uid)
        except Unavailable as e:
            log.warning("cannot ask for the leadership", why=e.message)
            return None

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
            "rebalance": Verb(Rebalance, self._rebalance, _PLACE_DEADLINE_S),
            "drain": Verb(Drain, self._drain, _DRAIN_DEADLINE_S),
        }
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(self._context.work(verbs, address="any", until=over))
            keeping = tasks.create_task(self._instances.run(lease, self._writes))
            collecting = tasks.create_task(self._collector.run(lease, self._writes))
            suspecting = tasks.create_task(self._suspicion.run())
            await lease.wait_lost()
            over.set()
            await ended(keeping, collecting, suspecting)
            await asyncio.wait({working})


def _placed(spec: InstanceSpec) -> Placed:
    return Placed(
        instance=spec.id,
        model=spec.model,
        stages=spec.stages,
        context_tokens=spec.context_tokens,
        tier=spec.tier,
        is_low_memory=spec.tier != "fits",
    )


async def run(context: Context) -> None:
    """The placement service."""
    async with asyncio.TaskGroup() as tasks:
        live = await context.view(tasks, "live")
        spec = await context.view(tasks, "spec")
        state = await context.view(tasks, "state")
        lease = await context.view(tasks, "lease", "leader.>")
        settings = read_settings(context.config.settings.get("placement", {}), context.environ)
        collector = Collector(context, live, spec, state, settings.retire_after_s)
        placement = Placement(context, live, spec, state, collector, settings.replace_after_s)
        context.background(tasks, placement.lead_forever(lease))
        context.background(tasks, placement.survey.run())
        questions = {
            "preview": Question(Place, placement.preview),
            "previews": Question(Place, placement.previews),
            "fits": Question(AskFits, placement.fits),
            "rebalances": Question(AskRebalances, placement.rebalances),
            "links": Question(AskLinks, placement.survey.links),
        }
        tasks.create_task(context.serve(questions))
        context.ready()
