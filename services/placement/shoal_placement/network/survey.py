"""Measures the links between nodes: this node's own links when asked, and those of other nodes by asking them.

Nothing is measured while nobody asks for a placement. An answer uses what is known at that time. Afterwards the nodes
that it could have chosen are asked to measure their missing links to each other: one node after another, so that no
two transfers share a link.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic

from msgspec import structs
from nats.errors import Error as NatsError

from shoal_common.bus import cluster_clock
from shoal_common.bus.keys import links_key
from shoal_common.bus.kv_mirror import View
from shoal_common.errors import ShoalError
from shoal_common.host.addresses import ways
from shoal_common.host.credentials import PROBE, blob_token
from shoal_common.host.process_identity import this_network
from shoal_common.logs import Log
from shoal_common.messages.liveness import Facts, Live
from shoal_common.messages.placement import AskLinks, LinksState, MeasuredLink
from shoal_common.service import Context
from shoal_placement.network.model import MOST_CANDIDATES, ends, to_measure, with_found
from shoal_placement.network.probe import connect, measure

log = Log("links")

_MAX_CONCURRENT_CONNECTS = 4
"""Peers that are connected to at the same time; they are measured one at a time."""
_START_DEADLINE_S = 20.0
"""After this long no further peer is started."""
_DEADLINE_S = 40.0


class Survey:
    """Measures this node's links, and asks other nodes to measure theirs."""

    def __init__(self, context: Context, live: View, state: View) -> None:
        self._context, self._live, self._state = context, live, state
        self._answering, self._measuring = asyncio.Lock(), asyncio.Lock()
        self._network = this_network()
        self._candidates: tuple[str, ...] = ()
        self._requested = asyncio.Event()

    def want(self, candidates: Sequence[str]) -> None:
        """Have the first MOST_CANDIDATES of these nodes measure their missing links to each other soon."""
        self._candidates = tuple(candidates[:MOST_CANDIDATES])
        if len(self._candidates) > 1:
            self._requested.set()

    async def run(self) -> None:
        """Run one round at a time, over the nodes that were requested last. Never returns."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            for node in self._candidates:
                await self._ask_to_measure(node, self._candidates)

    async def _ask_to_measure(self, node: str, peers: Sequence[str]) -> None:
        live = {key for key, _ in self._live.items("", Live)}
        missing = to_measure(node, peers, self._known(node), self._fileservers(), cluster_clock.now_s())
        if not missing or f"{node}.placement" not in live:
            return
        try:
            await self._context.ask("placement", node, "links", AskLinks(peers=missing), LinksState, _DEADLINE_S)
        except (ShoalError, NatsError) as e:
            log.info("node did not measure its links", name=node, reason=str(e) or type(e).__name__)

    def _known(self, node: str) -> LinksState | None:
        return self._state.get(links_key(node), LinksState)

    def _fileservers(self) -> dict[str, Facts]:
        return fileservers(dict(self._live.items("", Live)))

    # This node's own links

    async def links(self, question: AskLinks) -> LinksState:
        """Measure the links to these peers that were not measured lately, and return all measurements."""
        node, peers = self._context.node, question.peers[:MOST_CANDIDATES]
        async with self._answering:
            missing = to_measure(node, peers, self._known(node), self._fileservers(), cluster_clock.now_s())
            if not missing:
                return self._known(node) or LinksState(node=node)
            measured = await self._measure_all(missing)
            updated = with_found(node, self._known(node), measured)
            await self._state.reached(await self._context.buckets.state.put(links_key(node), updated))
            return updated

    async def _measure_all(self, peers: Sequence[str]) -> list[MeasuredLink]:
        await asyncio.to_thread(self._context.interfaces.look)
        semaphore, start_until_s = asyncio.Semaphore(_MAX_CONCURRENT_CONNECTS), monotonic() + _START_DEADLINE_S
        measured: list[MeasuredLink] = []

        async def measure_peer(peer: str) -> None:
            async with semaphore:
                record = self._live.get(f"{peer}.fileserver", Live)
                if record is not None and monotonic() < start_until_s and not self._context.stopping.is_set():
                    measured.append(await self._measure(peer, record))

        async with asyncio.TaskGroup() as tasks:
            for peer in peers:
                tasks.create_task(measure_peer(peer))
        return measured

    async def _measure(self, peer: str, record: Live) -> MeasuredLink:
        context = self._context
        own = self._fileservers().get(context.node, Facts())
        result = MeasuredLink(peer=peer, at_s=round(cluster_clock.now_s(), 3), ends=ends(own, record.facts))
        try:
            link, connection = await asyncio.to_thread(connect, ways(record, self._network, context.interfaces.now))
            token = blob_token(context.config.secret, peer, PROBE, cluster_clock.now_s())
            async with self._measuring:
                measurement = await asyncio.to_thread(measure, connection, token)
        except OSError as e:
            log.info("peer could not be reached", peer=peer, reason=str(e) or type(e).__name__)
            return structs.replace(result, error=(str(e) or type(e).__name__)[:200])
        log.debug(
            "link measured",
            peer=peer,
            round_trip_s=measurement.round_trip_s,
            bytes_per_s=measurement.bytes_per_s,
        )
        return structs.replace(
            result,
            address=link.address,
            kind=link.kind,
            round_trip_s=round(measurement.round_trip_s, 6),
            bytes_per_s=round(measurement.bytes_per_s),
        )


def fileservers(live: dict[str, Live]) -> dict[str, Facts]:
    """Return the facts of the live fileservers, by node."""
    records = ((key.partition("."), record) for key, record in live.items())
    return {node: record.facts for (node, _, service), record in records if service == "fileserver"}
