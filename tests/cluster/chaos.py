"""Chaos for a cluster of real processes: users' commands, and faults in the middle of them.

All of it is drawn from a seed, which a failing run prints with all that it did: the same seed, rounds and kinds
draw the same faults again (their timing in the processes depends on the machine). The site is in `chaos_site`, what
must hold afterwards in `chaos_checks`.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress

import msgspec
from nats.errors import Error as NatsError

from shoal_common.bus import subjects
from shoal_common.bus.keys import download_key
from shoal_common.errors import ShoalError, Unavailable
from shoal_common.messages import decode
from shoal_common.messages.downloads import DownloadRequest
from shoal_common.messages.envelope import Outcome
from shoal_common.names import ModelRef
from shoal_storage.store.partials import PartialMeta
from tests.cluster.chaos_checks import SETTLED_DEADLINE_S
from tests.cluster.chaos_site import SERVICES, World
from tests.fetcher.pull_site import Pulls
from tests.harness.nats import joined
from tests.harness.node import Node
from tests.harness.tiny_filesystem import FILLER, fill_up
from tests.harness.waiting import eventually

_RESEND_INTERVAL_S = 15.0
_QUOTAS = (None, 1 << 30, 2 << 30)
_BESIDE_OTHERS = ("network", "full_disk", "clock")
"""Faults that may happen during another one."""
_DOUBLE_FAULT_SHARE = 0.3
_CLOCKS_S = (-7 * 3600.0, -1200.0, -45.0, 0.0, 90.0, 5 * 3600.0, 40 * 86400.0)


class SentCommand(msgspec.Struct):
    """A command that was sent: it must have an outcome."""

    identity: str
    what: str
    answer: asyncio.Task[Outcome | None]


class Chaos:
    """One run: `round` any number of times, then `settle`, then `chaos_checks.check`.

    `longest_s`: the longest outage of any kind; the other services' timeouts are between 5 and 20 s.
    """

    def __init__(
        self, world: World, here: Pulls, models: list[str], seed: str, harms: set[str], longest_s: float
    ) -> None:
        self.world, self.site, self.here, self.models = world, world.site, here, models
        self.draw = random.Random(seed)
        self.did: list[str] = []
        """What was done, in order."""
        self.quotas: dict[str, int | None] = {}
        self.removed: set[str] = set()
        """Blobs that were removed by hand on some node: their models are unpublished until they are pulled again."""
        self._longest_s = longest_s
        self._sent: list[SentCommand] = []
        can = {"network": world.switch is not None, "full_disk": bool(world.disks)}
        self._harms = [harm for harm in HARMS if harm in harms and can.get(harm, True)]

    async def round(self, number: int) -> None:
        """Send some commands, and inject a fault in the middle of them, or two at once."""
        for _ in range(self.draw.randrange(1, 4)):
            self._command(number)
        harms = self.draw.choices(self._harms, weights=[HARMS[h][0] for h in self._harms])
        beside = [harm for harm in _BESIDE_OTHERS if harm in self._harms and harm not in harms]
        if beside and self.draw.random() < _DOUBLE_FAULT_SHARE:
            harms.append(self.draw.choice(beside))
        async with asyncio.TaskGroup() as tasks:
            for harm in harms:
                tasks.create_task(HARMS[harm][1](self, number))

    # Commands

    def _command(self, number: int) -> None:
        node, model = self.draw.choice(sorted(self.site.nodes)), self.draw.choice(self.models)
        verb = self.draw.choices(
            ["download", "cancel", "pause", "resume", "delete", "configure"], weights=[8, 1, 1, 2, 2, 2]
        )[0]
        body: dict[str, object] = {"model": model}
        if verb == "configure":
            body = {"max_storage_bytes": self.draw.choice(_QUOTAS)}
            self.quotas.pop(node, None)  # until its outcome is known
        self._send(verb, node, body, f"chaos-{number}-{len(self._sent)}")

    def _send(self, verb: str, node: str, body: dict[str, object], identity: str) -> None:
        service = "storage" if verb in ("delete", "configure") else "fetcher"
        what = f"{verb} {body.get('model', '')} on {node} ({identity})"
        self.did.append(what)
        self._sent.append(
            SentCommand(identity, what, asyncio.create_task(self._ask(service, node, verb, body, identity)))
        )

    async def _ask(
        self, service: str, node: str, verb: str, body: dict[str, object], identity: str
    ) -> Outcome | None:
        data = json.dumps({**body, "id": identity}).encode()
        sent_s = float("-inf")

        async def done() -> Outcome | None:
            nonlocal sent_s
            with suppress(Unavailable, NatsError):
                outcome = await self.here.buckets.done.get_as(identity, Outcome)
                if outcome is None and time.monotonic() - sent_s > _RESEND_INTERVAL_S:
                    # A command is lost if NATS dies before storing it; the same id again does the work once.
                    await self.here.here.client.publish(
                        subjects.command(service, node, verb), data, headers={"Nats-Msg-Id": identity}
                    )
                    sent_s = time.monotonic()
                return outcome
            return None

        outcome = await eventually(done, f"{verb} on {node} has an outcome", 3 * SETTLED_DEADLINE_S)
        if verb == "configure" and outcome.ok:
            self.quotas[node] = outcome.result["max_storage_bytes"]
        return outcome

    # Faults

    def _somebody(self) -> tuple[Node, str]:
        node = self.site[self.draw.choice(sorted(self.site.nodes))]
        return node, self.draw.choice(SERVICES)

    def _outage_s(self) -> float:
        return self.draw.uniform(0.2, self._longest_s)

    async def kill(self, number: int) -> None:
        """Kill a service with kill -9, at a random moment."""
        node, service = self._somebody()
        after_s = self.draw.uniform(0, 2)
        self.did.append(f"{number}: kill {service} of {node.id} after {after_s:.2f} s")
        await asyncio.sleep(after_s)  # at a random moment
        await asyncio.to_thread(node[service].kill)
        node.start(service)
        await node.ready(self.here.here, service)

    async def kill_node(self, number: int) -> None:
        """Kill all processes of a node, as a power cut does."""
        node, _ = self._somebody()
        outage_s = self._outage_s()
        self.did.append(f"{number}: kill all of {node.id} for {outage_s:.2f} s")
        await asyncio.to_thread(node.kill)
        await asyncio.sleep(outage_s)  # how long it is down
        await asyncio.to_thread(node.start)
        await node.ready(self.here.here)

    async def stop(self, number: int) -> None:
        """Stop a process (SIGSTOP), for less or more than the others' timeouts."""
        node, service = self._somebody()
        stopped_s = self._outage_s()
        self.did.append(f"{number}: stop {service} of {node.id} for {stopped_s:.2f} s")
        node[service].send(signal.SIGSTOP)
        try:
            await asyncio.sleep(stopped_s)  # how long it is stopped
        finally:
            node[service].send(signal.SIGCONT)

    async def kill_nats(self, number: int) -> None:
        """Kill NATS, and start it again with its store."""
        outage_s = self.draw.choice([0.0, self._outage_s()])
        self.did.append(f"{number}: kill NATS for {outage_s:.2f} s")
        await asyncio.to_thread(self.site.server.kill)
        await asyncio.sleep(outage_s)  # how long it is down
        await asyncio.to_thread(self.site.server.start)

    async def wipe_nats(self, number: int) -> None:
        """Start NATS again with an empty store."""
        self.did.append(f"{number}: wipe NATS")
        await asyncio.to_thread(self.site.server.wipe)
        async with joined(self.site.server) as here:
            await self.world.authority.publish(here.buckets)

    async def remove(self, number: int) -> None:
        """Remove a blob by hand."""
        node, _ = self._somebody()
        which = self.draw.random()
        found = await asyncio.to_thread(lambda: sorted(node.layout.blobs.glob("*/*")))
        if found:
            victim = found[int(which * len(found))]
            self.did.append(f"{number}: remove {victim.name[:12]} of {node.id} by hand")
            self.removed.add(victim.name)
            await asyncio.to_thread(victim.unlink, missing_ok=True)

    async def network(self, number: int) -> None:
        """Unplug a machine, or drop the packets between two machines, in one direction or in both."""
        switch = self.world.switch
        assert switch is not None
        one, other = self.draw.sample(sorted(switch.addresses), 2)
        how, outage_s = self.draw.choice(["unplug", "one way", "both ways"]), self._outage_s()
        self.did.append(f"{number}: network, {how}, {one} to {other} for {outage_s:.2f} s")
        lost = {"unplug": [], "one way": [(one, other)], "both ways": [(one, other), (other, one)]}[how]
        if how == "unplug":
            switch.unplug(one)
        for sender, receiver in lost:
            switch.drop(sender, receiver)
        try:
            await asyncio.sleep(outage_s)  # how long they are disconnected
        finally:
            for sender, receiver in lost:
                switch.deliver(sender, receiver)
            if how == "unplug":
                switch.plug_in(one)

    async def full_disk(self, number: int) -> None:
        """Fill a disk to the last byte with a foreign file, and remove it later."""
        node, _ = self._somebody()
        full_s = self._outage_s()
        self.did.append(f"{number}: fill the disk of {node.id} for {full_s:.2f} s")
        ballast = self.world.disks[node.id] / FILLER
        try:
            await asyncio.to_thread(fill_up, ballast)
            await asyncio.sleep(full_s)  # how long it is full
        finally:
            await asyncio.to_thread(ballast.unlink, missing_ok=True)

    async def clock(self, number: int) -> None:
        """Set the clock of a running node wrong, or right again."""
        node, _ = self._somebody()
        ahead_s = self.draw.choice(_CLOCKS_S)
        self.did.append(f"{number}: the clock of {node.id} is {ahead_s:+.0f} s off")
        self.world.clocks[node.id].set(ahead_s)

    # Afterwards

    async def settle(self) -> None:
        """Start everything again, resume paused downloads, and wait until every command and download has ended.

        Clocks stay as they are.
        """
        for node in self.site.nodes.values():
            for name, service in node.services.items():
                if not service.running:
                    node.start(name)
            await node.ready(self.here.here)
        await self._assert_all_finished()
        if any("wipe NATS" in did for did in self.did):
            # Download requests are lost with NATS's store: incomplete downloads wait until somebody pulls again.
            for name, model in sorted(await asyncio.to_thread(self._partly_fetched)):
                self._send("download", name, {"model": model}, f"again-{len(self._sent)}")
            await self._assert_all_finished()

    async def _assert_all_finished(self) -> None:
        answers = asyncio.gather(*(s.answer for s in self._sent), return_exceptions=True)

        async def ended() -> bool:
            with suppress(ShoalError, NatsError):
                for node in self.site.nodes:
                    await self._resume_all(node)
                return answers.done() and not await self._requests()
            return False

        try:
            await eventually(ended, "every command has an outcome, every request has ended", 3 * SETTLED_DEADLINE_S)
        except AssertionError as e:
            waiting = [s.what for s in self._sent if not s.answer.done()]
            raise AssertionError(f"I7: {e}; without an outcome: {waiting}; requests: {await self._requests()}") from e
        stuck = [s.what for s in self._sent if isinstance(s.answer.exception(), BaseException)]
        assert not stuck, f"I7: without an outcome: {stuck}"

    def _partly_fetched(self) -> set[tuple[str, str]]:
        """Return nodes and models of which some bytes have arrived, but not all."""
        found = set()
        for node in self.site.nodes.values():
            for meta in node.layout.partials.glob("*/meta.json"):
                models = decode(meta.read_bytes(), PartialMeta).models
                found |= {(node.id, ModelRef.parse(model).repo) for model in models}
        return found

    async def _resume_all(self, node: str) -> None:
        for model in self.models:
            request = await self.here.buckets.spec.get_as(download_key(node, model), DownloadRequest)
            if request is not None and request.paused:
                await self.here.ask(node, "resume", json.dumps({"model": model}).encode())

    async def _requests(self) -> list[str]:
        return [
            f"{model} on {node}"
            for node in self.site.nodes
            for model in self.models
            if await self.here.buckets.spec.get(download_key(node, model)) is not None
        ]


HARMS: dict[str, tuple[int, Callable[[Chaos, int], Coroutine[None, None, None]]]] = {
    "kill": (6, Chaos.kill),
    "kill_node": (2, Chaos.kill_node),
    "stop": (3, Chaos.stop),
    "kill_nats": (2, Chaos.kill_nats),
    "wipe_nats": (1, Chaos.wipe_nats),
    "remove": (2, Chaos.remove),
    "network": (4, Chaos.network),
    "full_disk": (2, Chaos.full_disk),
    "clock": (2, Chaos.clock),
}
"""The faults, each with its relative frequency."""
