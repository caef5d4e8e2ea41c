"""One blob from many nodes at once: asks what `decide.py` says, verifies each leaf, and knows who sent it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

import msgspec

from shoal_common.errors import Corrupt, NotFound, ShoalError, Unavailable
from shoal_common.logs import Log
from shoal_common.messages.swarm import Have
from shoal_common.runs import run, runs_of
from shoal_fetcher.http_range import was_silent
from shoal_fetcher.swarm.decide import EVERY_LEAF, Ask, Peer, Run, Situation, asks, wake_s
from shoal_fetcher.swarm.haves import SILENT_S, Haves
from shoal_fetcher.swarm.lists import Lists
from shoal_fetcher.swarm.origin import Origin
from shoal_fetcher.swarm.overlay import neighbours
from shoal_fetcher.swarm.receive import Crowded
from shoal_fetcher.swarm.shared import Fetch

log = Log("swarm")

NO_PROGRESS_S = 120.0
"""A download to which nothing was added for so long fails, naming what it waited for (I7)."""
_RUN_DEADLINE_S = 120.0
_WAITING_S = 1.0
"""Nothing has come for so long: it is said what is waited for."""
_WEIGHT = 0.3
"""Of the newest run in a peer's moving averages."""
_MISSED_S = 0.5
"""A node that did not have what it had said is not asked again before, unless it says something new."""


class _Peer(msgspec.Struct):
    """What a node was like so far."""

    rate_bytes_per_s: float = 0.0
    run_s: float = 0.0
    not_before_s: float = 0.0
    declined_at_s: float = float("-inf")


class _Run(msgspec.Struct):
    """A run that was asked for."""

    ask: Ask
    asked_at_s: float
    left: int
    """Leaves of it that have not come; none while a source has not chosen."""
    took: int = 0
    task: asyncio.Task[None] | None = None


class Swarm:
    """One blob on its way, in one attempt. `run` it; `held` keeps the lease of an origin and says what is here."""

    def __init__(self, fetch: Fetch, held: AsyncExitStack) -> None:
        self._fetch, self._held = fetch, held
        self._partial, self._shared, self._setbacks = fetch.partial, fetch.shared, fetch.setbacks
        self._draw = random.Random()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._within_reach: tuple[tuple[int, ...], dict[str, int]] | None = None
        self._known: dict[str, _Peer] = {}
        self._runs: list[_Run] = []
        self._leaves: set[asyncio.Task[None]] = set()
        self._failed: Exception | None = None
        self._moved_at_s = self._loop.time()
        self._durable_bytes = -1
        fetch.changed = fetch.partial.changed = self.wake
        shared = self._shared
        self._haves = Haves(
            shared.nats, shared.node, shared.uid, fetch.blob, fetch.partial, fetch.wanted, self.wake, self._told
        )
        self._lists = Lists(fetch, self._haves)
        self._origin = Origin(fetch, self._haves, self._lists, self._elsewhere)

    def wake(self) -> None:
        """Something changed: look again."""
        self._within_reach = None
        self._changed.set()

    async def run(self) -> str:
        """Bring in all that is wanted. Returns the root of its list, once that is sealed; "" for a part of a blob.

        Raises WrongWhole when it is not the blob; DiskFull, ReservationLost; what keeps the hub from giving it; or
        Unavailable when nothing was added for too long.
        """
        await self._held.enter_async_context(self._haves)
        await self._held.enter_async_context(self._origin.held)
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                self._look_at_failures()
                if not self._fetch.missing():
                    if self._fetch.wanted != self._partial.all:
                        return ""
                    if self._lists.proven:
                        return self._lists.proven
                now_s = self._loop.time()
                self._lists.look(self._reachable(), now_s)
                self._origin.look(now_s)
                self._changed.clear()
                wait_s = self._ask(now_s)
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
        finally:
            watching.cancel()
            for one in self._runs:
                if one.task is not None:
                    one.task.cancel()
            tasks = {r.task for r in self._runs if r.task is not None} | self._leaves | {watching}
            await asyncio.wait(tasks)
            await self._lists.close()
            await self._origin.close()
            self._said_durable()

    async def _watch(self) -> None:
        """Wake when the surroundings change."""
        around = self._shared.around
        while True:
            seen = around.seen()
            await around.changed(seen, SILENT_S)
            self.wake()

    def _told(self, have: Have) -> None:
        peer = self._known.get(have.node)
        if peer is not None and not have.leaving:
            peer.not_before_s = min(peer.not_before_s, self._loop.time() + _MISSED_S)
        self._lists.heard(have)
        self._origin.moved()

    def _look_at_failures(self) -> None:
        self._partial.raise_failure()
        for failed in (self._failed, self._origin.failed, self._lists.failed):
            if failed is not None:
                raise failed
        self._said_durable()
        progress, around, fetch = self._fetch.progress, self._shared.around, self._fetch
        origin = around.origin(fetch.blob)
        if origin not in (None, self._shared.node):
            # An origin that gets nowhere loses its lease after its own deadline: ours does not run meanwhile.
            progress.moved()
        if self._origin.asked_to_wait(self._loop.time()):
            progress.moved()
        if progress.still_s > NO_PROGRESS_S:
            last = self._setbacks.last
            why = last.message if last else progress.state.waiting_for
            raise Unavailable(
                f"nothing was added to {fetch.file.path} for {NO_PROGRESS_S:.0f} s ({why}); pull again to resume"
            )
        if self._loop.time() - self._moved_at_s > _WAITING_S and origin not in (None, self._shared.node):
            progress.note(f"origin {origin}")

    def _said_durable(self) -> None:
        durable_bytes = self._partial.durable_bytes
        if durable_bytes != self._durable_bytes:
            self._durable_bytes = durable_bytes
            self._fetch.progress.durable(self._fetch.blob, durable_bytes)

    # Who has what

    def _reachable(self) -> dict[str, int]:
        """Nodes that can be asked, and the leaves that they have. Worked out anew after each `wake`, or new word."""
        seen = self._shared.around.seen()
        if self._within_reach is None or seen != self._within_reach[0]:
            self._within_reach = seen, self._look_who_is_there()
        return self._within_reach[1]

    def _look_who_is_there(self) -> dict[str, int]:
        fetch = self._fetch
        live = self._shared.around.addresses()
        near = neighbours(self._shared.node, self._haves.heard, fetch.blob)
        found = {n: self._haves.heard[n].leaves for n in near if n in live and self._setbacks.may_ask(n)}
        if self._lists.root():
            found |= {h.node: self._partial.all for h in fetch.holders() if h.node in live}
        return found

    def _elsewhere(self) -> int:
        """Leaves that some living node has, which the hub need not give (I9)."""
        leaves = 0
        for node, has in self._reachable().items():
            if node in self._haves.heard or self._lists.proven:
                leaves |= has
        if self._fetch.returning():
            return self._partial.all
        for node in self._shared.around.starting() & self._haves.heard.keys():
            leaves |= self._haves.heard[node].leaves if self._setbacks.may_ask(node) else 0
        return leaves

    def _situation(self, now_s: float) -> Situation:
        fetch = self._fetch
        origin = self._shared.around.origin(fetch.blob)
        peers = []
        for node, leaves in self._reachable().items():
            peer = self._known.setdefault(node, _Peer())
            heard = self._haves.heard.get(node)
            if peer.not_before_s > now_s:
                continue
            if node in self._setbacks.bad_leaves_of and any(r.ask.node == node for r in self._runs):
                continue  # who has sent a wrong leaf is asked for one run at a time
            peers.append(
                Peer(
                    node=node,
                    leaves=leaves,
                    source=leaves == self._partial.all or (node == origin and heard is not None and heard.origin),
                    fetching=heard is not None and now_s - heard.at_s < SILENT_S,
                    wanted=heard.wanted if heard else EVERY_LEAF,
                    rate_bytes_per_s=peer.rate_bytes_per_s,
                    run_s=peer.run_s,
                    grows_bytes_per_s=heard.grows_bytes_per_s if heard else 0.0,
                    declined_at_s=peer.declined_at_s,
                )
            )
        runs = [
            Run(
                node=r.ask.node,
                leaves=r.left & ~self._partial.here,
                any=r.ask.any,
                may=r.ask.leaves if r.ask.any else 0,
                asked_at_s=r.asked_at_s,
            )
            for r in self._runs
        ]
        return Situation(
            leaf_count=self._partial.leaf_count,
            have=self._partial.here,
            wanted=fetch.wanted,
            known=self._partial.known,
            peers=peers,
            runs=runs,
            now_s=now_s,
            moved_at_s=self._moved_at_s,
        )

    # Asking

    def _ask(self, now_s: float) -> float:
        """Send what is to be asked now. Returns in how many seconds to look again."""
        for one in self._runs:
            if one.left and not one.left & ~self._partial.here and one.task is not None and one.took == 0:
                one.task.cancel()  # others were faster
        situation = self._situation(now_s)
        for ask in asks(situation, self._draw):
            # What it hashes to is told with the next word of its origin: nothing is taken that cannot be verified.
            leaves = ask.leaves & self._partial.known
            if not ask.any and leaves:
                leaves = run(*next(runs_of(leaves)))
            if not leaves:
                continue
            one = _Run(msgspec.structs.replace(ask, leaves=leaves), now_s, left=0 if ask.any else leaves)
            one.task = asyncio.create_task(self._run(one))
            self._runs.append(one)
            one.task.add_done_callback(lambda task, one=one: self._run_ended(one, task))  # type: ignore[misc]  # a default binds it
        blocked = [p.not_before_s - now_s for p in self._known.values() if p.not_before_s > now_s]
        return max(min([wake_s(situation), *blocked]), 0.01)

    def _run_ended(self, one: _Run, task: asyncio.Task[None]) -> None:
        self._runs.remove(one)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)
        self.wake()

    async def _run(self, one: _Run) -> None:
        ask, fetch, node = one.ask, self._fetch, one.ask.node
        peer = self._known[node]
        pending: set[asyncio.Task[None]] = set()
        received_bytes = 0

        def took(leaf: int, data: memoryview, done: Callable[[], None]) -> None:
            nonlocal received_bytes
            received_bytes += len(data)
            one.took += 1
            task = asyncio.create_task(self._take(one, leaf, data, done))
            pending.add(task)
            self._leaves.add(task)
            task.add_done_callback(self._leaves.discard)

        def chosen(first: int, end: int) -> None:
            one.left = run(first, end)
            self.wake()

        peers, size_bytes = self._shared.peers, fetch.file.size_bytes
        try:
            async with asyncio.timeout(_RUN_DEADLINE_S):
                if ask.any:
                    reply = await peers.any(node, fetch.blob, size_bytes, ask.leaves, ask.max_leaves, took, chosen)
                else:
                    first, end = next(runs_of(ask.leaves))
                    reply = await peers.leaves(node, fetch.blob, size_bytes, first, end, took)
            if reply.status == 204:
                peer.declined_at_s = self._loop.time()
                return
            took_s = max(self._loop.time() - one.asked_at_s, 1e-6)
            peer.rate_bytes_per_s = _average(peer.rate_bytes_per_s, received_bytes / took_s)
            peer.run_s = _average(peer.run_s, took_s)
            if pending:
                await asyncio.wait(pending)
        except Crowded as e:
            peer.not_before_s = self._loop.time() + e.retry_after_s
        except Corrupt as e:
            self._bad(node, e.message)
        except NotFound as e:
            if (heard := self._haves.heard.get(node)) is not None:
                heard.leaves = 0  # until it says again what it has
            self._missed(node, peer, e)
            peer.not_before_s = max(peer.not_before_s, self._loop.time() + _MISSED_S)
        except TimeoutError:
            self._missed(node, peer, Unavailable(f"node {node} took more than {_RUN_DEADLINE_S:.0f} s for a run"))
        except ShoalError as e:
            self._missed(node, peer, e)

    def _missed(self, node: str, peer: _Peer, error: ShoalError) -> None:
        delay_s = self._setbacks.after(error, node)
        if was_silent(error):
            self._fetch.progress.left(node)
        peer.not_before_s = self._loop.time() + delay_s
        self.wake()
        log.warning("a source failed", path=self._fetch.file.path, source=node, why=error.message, wait_s=delay_s)
        self._fetch.progress.note(error.message)

    async def _take(self, one: _Run, leaf: int, data: memoryview, done: Callable[[], None]) -> None:
        """A leaf has come whole: verify and write it. Whoever sent it is known."""
        node, bit = one.ask.node, 1 << leaf
        try:
            self._fetch.progress.received(node, len(data))
            if not self._partial.here & bit and self._setbacks.may_ask(node):
                if await self._partial.write(leaf, data):
                    self._moved_at_s = self._loop.time()
                    self._setbacks.failures_of.pop(node, None)
                    self._fetch.progress.note("")
                    self._haves.say_soon()
                    self._origin.moved()
                elif self._setbacks.may_ask(node):
                    self._bad(node, f"node {node}: leaf {leaf} of {self._fetch.file.path} is not what it should be")
            await self._fetch.progress.paced(self._shared.limits.peer(node), len(data))
        except (ShoalError, OSError) as e:
            self._fail(e)
        finally:
            one.left &= ~bit
            done()
            if not self._fetch.missing():
                self.wake()

    def _bad(self, node: str, why: str) -> None:
        """It sent what it should not have."""
        self.wake()
        log.warning("wrong bytes", peer=node, why=why)
        self._setbacks.last = Corrupt(why)
        self._fetch.progress.note(why)
        if self._setbacks.bad_leaf(node):
            log.warning("banned for this blob", peer=node, blob=self._fetch.blob)
            self._fetch.progress.note(f"{why}; it is not asked again")
            for one in self._runs:
                if one.ask.node == node and one.task is not None and one.task is not asyncio.current_task():
                    one.task.cancel()

    def _fail(self, error: Exception) -> None:
        self._failed = self._failed or error
        self.wake()


def _average(before: float, now: float) -> float:
    return before + _WEIGHT * (now - before) if before else now
