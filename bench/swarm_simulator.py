"""A swarm of any size in one process: the fetcher's own decisions over simulated links and messages.

Discrete events. Each node has an uplink that its transfers share in turns, chunk by chunk, and a downlink that chunks
pass one after the other; a transfer has at most a window of chunks in flight, like TCP. Have messages are sent every
100 ms and can be lost; nodes can die, get stuck and join late. `shoal_fetcher.swarm` and `shoal_common` decide what
is requested from whom, who listens to whom and what a source sends, as in the services.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Collection, Sequence

from shoal_common.concurrency.backoff import Backoff
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_set import leaf_range, least_sent_range, record_sent
from shoal_fetcher.swarm.overlay import neighbours
from shoal_fetcher.swarm.scheduler import (
    OutstandingRequest,
    PeerState,
    SwarmState,
    next_requests,
    next_wakeup_s,
)
from simulated_nodes import CHUNK_BYTES, LEAF_CHUNKS, WINDOW_CHUNKS, Link, Node, Outcome, Transfer, View, averaged

GOSSIP_INTERVAL_S = 0.1


SILENT_S = 3.0


GIVE_UP_S = 10.0
"""A request that brings nothing for this long is ended by the caller."""


SET_ASIDE = Backoff(1.0, 8.0)
"""A failed peer is not asked for this long, twice as long after the next failure, 8 s at most."""


KEPT_BACK_S = 1.0
"""A source keeps a leaf out of `any` for this long after sending it: its receiver is about to publish it."""


BLOB = "b" * 64


class Simulation:
    """`sources` have the blob, `fetchers` want it; `run` simulates."""

    def __init__(
        self,
        sources: Sequence[Link],
        fetchers: Sequence[Link],
        leaf_count: int = 256,
        latency_s: float = 0.0005,
        lost: float = 0.0,
        seed: int = 0,
        keeps_back: bool = True,
    ) -> None:
        self.leaf_count, self.latency_s, self.lost, self.keeps_back = leaf_count, latency_s, lost, keeps_back
        self.draw = random.Random(seed)
        self.everything = leaf_range(0, leaf_count)
        self.now_s = 0.0
        self.asked_count = self.leaves_sent_count = 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._number = 0
        self.nodes = {f"s{n}": Node(f"s{n}", link, leaf_count, True) for n, link in enumerate(sources)}
        self.nodes |= {f"n{n}": Node(f"n{n}", link, leaf_count, False) for n, link in enumerate(fetchers)}
        self._unfinished = len(fetchers)
        self._link(self.nodes)
        for node in self.nodes.values():
            self._at(node.link.joins_s, self._join, node)
            if node.link.dies_s is not None:
                self._at(node.link.dies_s, self._die, node)
            if node.link.sticks_s is not None:
                self._at(node.link.sticks_s, self._stick, node)

    def run(self, deadline_s: float = 3600.0) -> Outcome:
        """Run until every living fetcher has everything, or this many simulated seconds have passed."""
        while self._events and self._unfinished:
            self.now_s, _, act, arguments = heapq.heappop(self._events)
            if self.now_s > deadline_s:
                break
            act(*arguments)
        fetchers = [n for n in self.nodes.values() if not n.source and n.there]
        return Outcome(
            finished_s={n.name: n.finished_s for n in fetchers if n.finished_s is not None},
            unfinished=[n.name for n in fetchers if n.finished_s is None],
            sent_bytes={n.name: n.sent_bytes for n in self.nodes.values()},
            asked_count=self.asked_count,
            leaves_sent_count=self.leaves_sent_count,
        )

    def _at(self, when_s: float, act: Callable[..., None], *arguments: object) -> None:
        self._number += 1
        heapq.heappush(self._events, (when_s, self._number, act, arguments))

    def _soon(self, act: Callable[..., None], *arguments: object) -> None:
        self._at(self.now_s + self.latency_s, act, *arguments)

    # Joining, leaving, publishing.

    def _join(self, node: Node) -> None:
        node.there = True
        for other in node.neighbours:
            if other.there:
                self._hear(node, other.name, other.have, other.source)
                self._soon(self._hear, other, node.name, node.have, node.source)
        if not node.source:
            self._at(self.now_s + GOSSIP_INTERVAL_S * self.draw.random(), self._gossip, node)
            self._decide_soon(node)

    def _link(self, names: Collection[str]) -> None:
        """Let each of these nodes gossip with those that the swarm's overlay gives it."""
        for name in names:
            self.nodes[name].neighbours = [self.nodes[other] for other in sorted(neighbours(name, names, BLOB))]

    def _die(self, node: Node) -> None:
        node.there = False
        if not node.source and node.finished_s is None:
            self._unfinished -= 1
        before = {n.name: set(n.neighbours) for n in self.nodes.values()}
        self._link([n.name for n in self.nodes.values() if n.there or n.link.joins_s > self.now_s])
        for one in self.nodes.values():
            for other in one.neighbours:
                if other not in before[one.name] and one.there and other.there:
                    self._soon(self._hear, one, other.name, other.have, other.source)
        for transfer in list(node.giving):
            self._soon(self._break, transfer)
        for transfer in list(node.runs):
            self._end(transfer)

    def _stick(self, node: Node) -> None:
        node.stuck = True

    def _gossip(self, node: Node) -> None:
        if not node.there or node.source:
            return
        if node.have != node.published or self.now_s % 1.0 < GOSSIP_INTERVAL_S:
            node.published = node.have
            for other in node.neighbours:
                if other.there and (not self.lost or self.draw.random() >= self.lost):
                    self._soon(self._hear, other, node.name, node.have, False)
        self._at(self.now_s + GOSSIP_INTERVAL_S, self._gossip, node)

    def _hear(self, node: Node, name: str, leaves: int, source: bool) -> None:
        view = node.views.setdefault(name, View())
        if not source and view.fetching and self.now_s > view.received_s:
            grown = (leaves & ~view.leaves).bit_count() * LEAF_BYTES / (self.now_s - view.received_s)
            view.grows_bytes_per_s = averaged(view.grows_bytes_per_s, grown)
        new = leaves & ~view.leaves & ~node.have
        # A node with everything can be asked for any leaf, wherever it got them.
        view.source = source or leaves == self.everything
        view.leaves, view.fetching, view.received_s = leaves, not source, self.now_s
        if new and not node.source and node.finished_s is None:
            self._decide_soon(node)

    # Requesting.

    def _decide_soon(self, node: Node) -> None:
        if not node.deciding:
            node.deciding = True
            self._soon(self._decide, node)

    def _wake(self, node: Node, when_s: float) -> None:
        if node.wakes_s == when_s:
            node.wakes_s = float("inf")
            self._decide_soon(node)

    def _decide(self, node: Node) -> None:
        node.deciding = False
        if not node.there or node.finished_s is not None:
            return
        for transfer in [t for t in node.runs if self.now_s - t.moved_s > GIVE_UP_S]:
            self._fail(transfer)
        situation = self._situation(node)
        for ask in next_requests(situation, self.draw):
            transfer = Transfer(node, self.nodes[ask.node], ask, self.now_s)
            node.runs.append(transfer)
            self.asked_count += 1
            self._soon(self._asked, transfer)
        when_s = self.now_s + next_wakeup_s(situation)
        if when_s < node.wakes_s:
            node.wakes_s = when_s
            self._at(when_s, self._wake, node, when_s)

    def _situation(self, node: Node) -> SwarmState:
        return SwarmState(
            leaf_count=self.leaf_count,
            have=node.have,
            wanted=self.everything,
            known=self.everything,
            peers=[
                PeerState(
                    node=name,
                    leaves=v.leaves,
                    source=v.source,
                    fetching=v.fetching and self.now_s - v.received_s < SILENT_S,
                    rate_bytes_per_s=v.rate_bytes_per_s,
                    run_s=v.run_s,
                    growth_bytes_per_s=v.grows_bytes_per_s,
                    declined_at_s=v.declined_at_s,
                )
                for name, v in node.views.items()
                if v.aside_until_s <= self.now_s
            ],
            runs=[
                OutstandingRequest(
                    node=t.giver.name,
                    leaves=t.leaves,
                    any=bool(t.may),
                    possible_leaves=t.may,
                    asked_at_s=t.asked_at_s,
                )
                for t in node.runs
            ],
            now_s=self.now_s,
            last_leaf_at_s=node.moved_s,
        )

    def _asked(self, transfer: Transfer) -> None:
        giver = transfer.giver
        if transfer.over:
            return
        if not giver.there:
            self._soon(self._break, transfer)
            return
        if transfer.may:
            ready = giver.have
            if self.keeps_back:
                ready &= ~sum(1 << leaf for leaf in giver.kept_back)
            chosen = least_sent_range(giver.sent, transfer.may, ready, transfer.max_leaves, self.draw)
            if chosen is None:
                self._soon(self._declined, transfer)
                return
            self._soon(self._range_chosen, transfer, chosen)
            first, end = chosen
        else:
            first, end = transfer.first, transfer.end
        record_sent(giver.sent, leaf_range(first, end))
        giver.kept_back.update(range(first, end))
        self.leaves_sent_count += end - first
        transfer.unsent_chunks = (end - first) * LEAF_CHUNKS
        giver.giving.add(transfer)
        giver.queue.append(transfer)
        self._send(giver)

    def _range_chosen(self, transfer: Transfer, chosen: tuple[int, int]) -> None:
        transfer.first, transfer.end = chosen
        if not transfer.over:
            self._decide_soon(transfer.asker)

    def _declined(self, transfer: Transfer) -> None:
        if not transfer.over:
            transfer.asker.views[transfer.giver.name].declined_at_s = self.now_s
            self._end(transfer)

    # Sending, chunk by chunk.

    def _send(self, node: Node) -> None:
        if node.sending or node.stuck or not node.there:
            return
        while node.queue and node.queue[0].over:
            node.queue.popleft()
        if node.queue:
            node.sending = True
            self._at(self.now_s + CHUNK_BYTES / node.link.up, self._sent, node, node.queue.popleft())

    def _sent(self, node: Node, transfer: Transfer) -> None:
        node.sending = False
        if not transfer.over and node.there:
            node.sent_bytes += CHUNK_BYTES
            transfer.unsent_chunks -= 1
            transfer.flying_chunks += 1
            self._soon(self._passes, transfer)
            if transfer.unsent_chunks and transfer.flying_chunks < WINDOW_CHUNKS:
                node.queue.append(transfer)
        self._send(node)

    def _passes(self, transfer: Transfer) -> None:
        asker = transfer.asker
        asker.down_free_s = max(asker.down_free_s, self.now_s) + CHUNK_BYTES / asker.link.down
        self._at(asker.down_free_s, self._arrived, transfer)

    def _arrived(self, transfer: Transfer) -> None:
        if transfer.over:
            return
        asker, giver = transfer.asker, transfer.giver
        transfer.flying_chunks -= 1
        if transfer.unsent_chunks and transfer.flying_chunks == WINDOW_CHUNKS - 1:
            giver.queue.append(transfer)
            self._soon(self._send, giver)
        transfer.arrived_chunks += 1
        transfer.moved_s = self.now_s
        if transfer.arrived_chunks % LEAF_CHUNKS:
            return
        leaf = 1 << (transfer.first + transfer.arrived_chunks // LEAF_CHUNKS - 1)
        if not asker.have & leaf:
            asker.have |= leaf
            asker.moved_s = self.now_s
        for other in [t for t in asker.runs if t is not transfer and t.end and not t.leaves & ~asker.have]:
            self._end(other)  # another source was faster
        if transfer.leaves & ~asker.have == 0:
            view = asker.views[giver.name]
            took_s = self.now_s - transfer.asked_at_s
            view.run_s = averaged(view.run_s, took_s)
            view.rate_bytes_per_s = averaged(view.rate_bytes_per_s, transfer.arrived_chunks * CHUNK_BYTES / took_s)
            view.failures = 0
            self._end(transfer)
        if asker.have == self.everything and asker.finished_s is None:
            asker.finished_s = self.now_s
            self._unfinished -= 1

    def _break(self, transfer: Transfer) -> None:
        if not transfer.over:
            self._fail(transfer)

    def _fail(self, transfer: Transfer) -> None:
        view = transfer.asker.views[transfer.giver.name]
        view.aside_until_s = self.now_s + SET_ASIDE.delay_s(view.failures + 1)
        view.failures += 1
        self._end(transfer)

    def _end(self, transfer: Transfer) -> None:
        transfer.over = True
        transfer.asker.runs.remove(transfer)
        if transfer in transfer.giver.giving:
            transfer.giver.giving.remove(transfer)
            self._at(self.now_s + KEPT_BACK_S, self._give_free, transfer)
        self._decide_soon(transfer.asker)

    def _give_free(self, transfer: Transfer) -> None:
        kept = transfer.giver.kept_back
        for leaf in range(transfer.first, transfer.end):
            kept[leaf] -= 1
            if not kept[leaf]:
                del kept[leaf]
