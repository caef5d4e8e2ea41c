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
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.errors import Denied, ShoalError
from shoal_common.host.addresses import reachable_addresses
from shoal_common.host.process_identity import network_id
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.identity.peer_tokens import PROBE_NAME, PeerTokens
from shoal_common.logs import StructuredLogger
from shoal_common.messages.liveness import LivenessRecord, NodeFacts
from shoal_common.messages.placement import LinksState, MeasuredLink, MeasureLinks
from shoal_common.service import ServiceContext
from shoal_placement.network.model import MAX_CANDIDATES, link_digest, peers_to_measure, with_measurements
from shoal_placement.network.probe import connect, measure_link

log = StructuredLogger("links")

_MAX_CONCURRENT_CONNECTS = 4
"""Peers that are connected to at the same time; they are measured one at a time."""
_START_DEADLINE_S = 20.0
"""After this long no further peer is started."""
_DEADLINE_S = 40.0


class LinkSurvey:
    """Measures this node's links, and asks other nodes to measure theirs."""

    def __init__(
        self,
        context: ServiceContext,
        live: KvMirror,
        state: KvMirror,
        tokens: PeerTokens,
        peer_links: PeerLinks,
    ) -> None:
        self._context, self._live, self._state = context, live, state
        self._tokens, self._peer_links = tokens, peer_links
        self._answering, self._measuring = asyncio.Lock(), asyncio.Lock()
        self._network = network_id()
        self._candidates: tuple[str, ...] = ()
        self._requested = asyncio.Event()

    def request_measurements(self, candidates: Sequence[str]) -> None:
        """Have the first MOST_CANDIDATES of these nodes measure their missing links to each other soon."""
        self._candidates = tuple(candidates[:MAX_CANDIDATES])
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
        live = {key for key, _ in self._live.items("", LivenessRecord)}
        missing = peers_to_measure(node, peers, self._known(node), self._fileservers(), cluster_clock.now_s())
        if not missing or f"{node}.placement" not in live:
            return
        try:
            await self._context.rpc("placement", node, "links", MeasureLinks(peers=missing), LinksState, _DEADLINE_S)
        except (ShoalError, NatsError) as e:
            log.info("node did not measure its links", name=node, reason=str(e) or type(e).__name__)

    def _known(self, node: str) -> LinksState | None:
        return self._state.get(links_key(node), LinksState)

    def _fileservers(self) -> dict[str, NodeFacts]:
        return fileserver_facts(dict(self._live.items("", LivenessRecord)))

    # This node's own links

    async def measure_links(self, request: MeasureLinks) -> LinksState:
        """Measure the links to these peers that were not measured lately, and return all measurements."""
        node, peers = self._context.node, request.peers[:MAX_CANDIDATES]
        async with self._answering:
            missing = peers_to_measure(node, peers, self._known(node), self._fileservers(), cluster_clock.now_s())
            if not missing:
                return self._known(node) or LinksState(node=node)
            measured = await self._measure_all(missing)
            updated = with_measurements(node, self._known(node), measured)
            await self._state.wait_revision(await self._context.buckets.state.put(links_key(node), updated))
            return updated

    async def _measure_all(self, peers: Sequence[str]) -> list[MeasuredLink]:
        await asyncio.to_thread(self._context.interfaces.refresh)
        semaphore, start_until_s = asyncio.Semaphore(_MAX_CONCURRENT_CONNECTS), monotonic() + _START_DEADLINE_S
        measured: list[MeasuredLink] = []

        async def measure_peer(peer: str) -> None:
            async with semaphore:
                record = self._live.get(f"{peer}.fileserver", LivenessRecord)
                if record is not None and monotonic() < start_until_s and not self._context.stopping.is_set():
                    measured.append(await self._measure(peer, record))

        async with asyncio.TaskGroup() as tasks:
            for peer in peers:
                tasks.create_task(measure_peer(peer))
        return measured

    async def _measure(self, peer: str, record: LivenessRecord) -> MeasuredLink:
        context = self._context
        own = self._fileservers().get(context.node, NodeFacts())
        result = MeasuredLink(
            peer=peer,
            measured_at_s=round(cluster_clock.now_s(), 3),
            addresses_fingerprint=link_digest(own, record.facts),
        )
        links = self._peer_links.usable(reachable_addresses(record, self._network, context.interfaces.current))
        try:
            token = self._tokens.token(peer, PROBE_NAME, cluster_clock.now_s())
            link, connection = await asyncio.to_thread(connect, peer, links, self._peer_links)
            async with self._measuring:
                measurement = await asyncio.to_thread(measure_link, connection, token)
        except (OSError, Denied) as e:
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


def fileserver_facts(live: dict[str, LivenessRecord]) -> dict[str, NodeFacts]:
    """Return the facts of the live fileservers, by node."""
    records = ((key.partition("."), record) for key, record in live.items())
    return {node: record.facts for (node, _, service), record in records if service == "fileserver"}
