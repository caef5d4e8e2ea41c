"""A cluster of real processes to which things happen, and what must hold of it afterwards, seen from outside.

What happens is drawn from a seed, which a failing run prints with all that it did: the same seed draws the same
things again (how they meet the processes is the machine's affair).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec
from nats.errors import Error as NatsError

from shoal_common import subjects
from shoal_common.buckets import download_key, storage_key
from shoal_common.errors import Unavailable
from shoal_common.messages import decode
from shoal_common.messages.commands import Outcome
from shoal_common.messages.records import DownloadSpec, ModelState, StorageState
from tests.fetcher.pulling import Pulls, Site, blobs, manifests, partials, stray_blobs
from tests.harness.node import Node
from tests.harness.waiting import eventually

SERVICES = ("storage", "fetcher", "fileserver", "placement")
SETTLED_DEADLINE_S = 120.0
"""For all that was asked for to end, once nothing happens any more."""
_SENT_AGAIN_S = 15.0
_OUTAGE_S = (0.2, 3.0)
_STOPPED_S = (0.5, 8.0)
"""How long a process is stopped (SIGSTOP): below and above what others wait for."""
_QUOTAS = (None, 1 << 30, 2 << 30)


class Sent(msgspec.Struct):
    """A command that was sent: it has to end in an outcome."""

    identity: str
    what: str
    answer: asyncio.Task[Outcome | None]


class Chaos:
    """One run: `round` as often as wanted, then `settle`, then `check`."""

    def __init__(self, site: Site, here: Pulls, models: list[str], seed: str) -> None:
        self.site, self.here, self.models = site, here, models
        self.draw = random.Random(seed)
        self.did: list[str] = []
        """What was done, in order."""
        self._sent: list[Sent] = []
        self._quota: dict[str, int | None] = {}
        self._removed: set[str] = set()
        """Blobs that were removed by hand somewhere: their models are not announced until they are pulled again."""

    # What happens

    async def round(self, number: int) -> None:
        """Some commands, and one thing that goes wrong in their midst."""
        for _ in range(self.draw.randrange(1, 4)):
            self._command(number)
        wrong = self.draw.choices(
            [self._kill, self._kill_node, self._stop, self._restart_nats, self._kill_nats, self._remove_by_hand],
            weights=[6, 2, 3, 1, 1, 2],
        )[0]
        await wrong(number)

    def _command(self, number: int) -> None:
        node, model = self.draw.choice(sorted(self.site.nodes)), self.draw.choice(self.models)
        verb = self.draw.choices(
            ["download", "cancel", "pause", "resume", "delete", "configure"], weights=[8, 1, 1, 2, 2, 2]
        )[0]
        service = "fetcher"
        body: dict[str, object] = {"model": model}
        if verb == "delete":
            service = "storage"
        elif verb == "configure":
            quota = self.draw.choice(_QUOTAS)
            service, body = "storage", {"max_storage_bytes": quota}
            self._quota.pop(node, None)  # until we know how it ended
        identity = f"chaos-{number}-{len(self._sent)}"
        self.did.append(f"{number}: {verb} {model} on {node} ({identity})")
        answer = asyncio.create_task(self._ask(service, node, verb, body, identity))
        self._sent.append(Sent(identity, f"{verb} {model} on {node}", answer))

    async def _ask(
        self, service: str, node: str, verb: str, body: dict[str, object], identity: str
    ) -> Outcome | None:
        data = json.dumps({**body, "id": identity}).encode()
        sent_s = float("-inf")

        async def done() -> Outcome | None:
            nonlocal sent_s
            with suppress(Unavailable, NatsError):
                outcome = await self.here.buckets.done.get_as(identity, Outcome)
                if outcome is None and time.monotonic() - sent_s > _SENT_AGAIN_S:
                    # One that reached a NATS which died before keeping it is lost; the same id does the work once.
                    await self.here.here.client.publish(
                        subjects.command(service, node, verb), data, headers={"Nats-Msg-Id": identity}
                    )
                    sent_s = time.monotonic()
                return outcome
            return None

        outcome = await eventually(done, f"{verb} on {node} has an outcome", 3 * SETTLED_DEADLINE_S)
        if verb == "configure" and outcome.ok:
            self._quota[node] = outcome.result["max_storage_bytes"]
        return outcome

    def _somebody(self) -> tuple[Node, str]:
        node = self.site[self.draw.choice(sorted(self.site.nodes))]
        return node, self.draw.choice(SERVICES)

    async def _kill(self, number: int) -> None:
        node, service = self._somebody()
        after_s = self.draw.uniform(0, 2)
        self.did.append(f"{number}: kill {service} of {node.id} after {after_s:.2f} s")
        await asyncio.sleep(after_s)  # at a random moment
        await self._back(node, service)

    async def _kill_node(self, number: int) -> None:
        node, _ = self._somebody()
        away_s = self.draw.uniform(*_OUTAGE_S)
        self.did.append(f"{number}: kill all of {node.id} for {away_s:.2f} s")
        await asyncio.to_thread(node.kill)
        await asyncio.sleep(away_s)  # how long it is away
        await asyncio.to_thread(node.start)
        await node.ready(self.here.here)

    async def _back(self, node: Node, service: str) -> None:
        await asyncio.to_thread(node[service].kill)
        node.start(service)
        await node.ready(self.here.here, service)

    async def _stop(self, number: int) -> None:
        node, service = self._somebody()
        stopped_s = self.draw.uniform(*_STOPPED_S)
        self.did.append(f"{number}: stop {service} of {node.id} for {stopped_s:.2f} s")
        node[service].send(signal.SIGSTOP)
        try:
            await asyncio.sleep(stopped_s)  # how long it is stopped
        finally:
            node[service].send(signal.SIGCONT)

    async def _restart_nats(self, number: int) -> None:
        self.did.append(f"{number}: restart NATS")
        await asyncio.to_thread(self.site.server.restart)

    async def _kill_nats(self, number: int) -> None:
        away_s = self.draw.uniform(*_OUTAGE_S)
        self.did.append(f"{number}: kill NATS for {away_s:.2f} s")
        await asyncio.to_thread(self.site.server.kill)
        await asyncio.sleep(away_s)  # how long it is away
        await asyncio.to_thread(self.site.server.start)

    async def _remove_by_hand(self, number: int) -> None:
        node, _ = self._somebody()
        found = await asyncio.to_thread(lambda: sorted(node.layout.blobs.glob("*/*")))
        if found:
            victim = self.draw.choice(found)
            self.did.append(f"{number}: remove {victim.name[:12]} of {node.id} by hand")
            self._removed.add(victim.name)
            await asyncio.to_thread(victim.unlink, missing_ok=True)

    # Afterwards

    async def settle(self) -> None:
        """Everything is there again, what is paused goes on, and all that was asked for comes to its end."""
        for node in self.site.nodes.values():
            for name, service in node.services.items():
                if not service.running:
                    node.start(name)
            await node.ready(self.here.here)
        answers = asyncio.gather(*(s.answer for s in self._sent), return_exceptions=True)

        async def ended() -> bool:
            for node in self.site.nodes:
                await self._resume_all(node)
            return answers.done() and not await self._wishes()

        await eventually(ended, "every command has an outcome and every wish has ended", 3 * SETTLED_DEADLINE_S)
        stuck = [s.what for s in self._sent if isinstance(s.answer.exception(), BaseException)]
        assert not stuck, f"I7: without an outcome: {stuck}"

    async def _resume_all(self, node: str) -> None:
        for model in self.models:
            wish = await self.here.buckets.spec.get_as(download_key(node, model), DownloadSpec)
            if wish is not None and wish.paused:
                await self.here.ask(node, "resume", json.dumps({"model": model}).encode())

    async def _wishes(self) -> list[str]:
        return [
            f"{model} on {node}"
            for node in self.site.nodes
            for model in self.models
            if await self.here.buckets.spec.get(download_key(node, model)) is not None
        ]

    async def check(self, consumers_before: int) -> None:
        """The invariants, from outside."""
        for node in self.site.nodes.values():
            await eventually(self._is_as_said(node), f"{node.id}'s disk is as it is said", SETTLED_DEADLINE_S)
            await asyncio.to_thread(self._check_store, node)
            said = await self._disk_of(node)
            quota = self._quota.get(node.id, said.quota_bytes)
            assert said.quota_bytes == quota, f"a setting of {node.id} is lost"
            if quota is not None:
                assert said.used_bytes + said.reserved_bytes <= quota, "I3"
            assert not stray_blobs(node), f"I8: blobs of {node.id} that nothing needs"
        await eventually(self._no_command_waits, "no command waits", SETTLED_DEADLINE_S)

        async def as_many_consumers() -> bool:
            return (await self.here.here.js.stream_info("CMD")).state.consumer_count == consumers_before

        await eventually(as_many_consumers, "I8: consumers are back to what they were", SETTLED_DEADLINE_S)
        assert await self._ghosts() == [], "I8"

    def _check_store(self, node: Node) -> None:
        """I1: a blob hashes to its name. I2: of a manifest nothing is missing but what was removed by hand."""
        here = blobs(node)
        for sha256, path in here.items():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, f"I1: {path}"
        for manifest in manifests(node):
            missing = {f.sha256 for f in manifest.files} - here.keys()
            assert missing <= self._removed, f"I2: {manifest.model} on {node.id}: {missing}"

    async def _disk_of(self, node: Node) -> StorageState:
        state = await self.here.buckets.state.get_as(storage_key(node.id), StorageState)
        assert state is not None
        return state

    def _is_as_said(self, node: Node) -> Callable[[], Awaitable[bool]]:
        async def as_said() -> bool:
            prefix = f"$KV.state.model.{node.id}."
            info = await self.here.here.js.stream_info("KV_state", subjects_filter=f"{prefix}>")
            said = set()
            for subject in info.state.subjects or {}:
                entry = await self.here.buckets.state.get(subject.removeprefix("$KV.state."))
                if entry is not None:
                    said.add(decode(entry.value, ModelState).model)
            here = await asyncio.to_thread(
                lambda: {m.model for m in manifests(node) if all(_is_here(node, f.sha256) for f in m.files)}
            )
            disk = await self._disk_of(node)
            return said == here and not disk.reserved_bytes and not await asyncio.to_thread(partials, node)

        return as_said

    async def _no_command_waits(self) -> bool:
        return (await self.here.here.js.stream_info("CMD")).state.messages == 0

    async def _ghosts(self) -> list[str]:
        """Keys that name nodes there never were."""
        known, found = set(self.site.nodes), []
        for bucket in ("state", "spec"):
            info = await self.here.here.js.stream_info(f"KV_{bucket}", subjects_filter=">")
            for subject in info.state.subjects or {}:
                kind, _, rest = subject.removeprefix(f"$KV.{bucket}.").partition(".")
                if kind in ("storage", "model", "download", "part", "node") and rest.partition(".")[0] not in known:
                    found.append(subject)
        return found


def _is_here(node: Node, sha256: str) -> bool:
    return node.layout.blob(sha256).exists()
