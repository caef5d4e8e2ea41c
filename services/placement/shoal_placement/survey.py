"""Measures the ways between nodes: this node's own when it is asked to, and others' by asking them.

Nothing is measured while nobody asks for placements. An answer uses what is known at once; afterwards the nodes that
it could have chosen are asked, one after another so that no two transfers meet on a link, to measure what they have
not measured of each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic

from msgspec import structs
from nats.errors import Error as NatsError

from shoal_common import clock
from shoal_common.buckets import links_key
from shoal_common.credentials import PROBE, blob_token
from shoal_common.errors import ShoalError
from shoal_common.identity import this_network
from shoal_common.logs import Log
from shoal_common.messages.facts import Facts, Live
from shoal_common.messages.questions import AskLinks
from shoal_common.messages.records import LinksState, MeasuredLink
from shoal_common.reach import ways
from shoal_common.service import Context
from shoal_common.watch import View
from shoal_placement.links import MOST_CANDIDATES, ends, to_measure, with_found
from shoal_placement.measure import connect, measure

log = Log("links")

_AT_ONCE = 4
"""Peers to which connections are made at once; what is measured is measured one by one."""
_BEGIN_WITHIN_S = 20.0
"""After so long no further peer is begun with."""
_DEADLINE_S = 40.0


class Survey:
    """What this node measures, and what it asks others to."""

    def __init__(self, context: Context, live: View, state: View) -> None:
        self._context, self._live, self._state = context, live, state
        self._answering, self._wire = asyncio.Lock(), asyncio.Lock()
        self._network = this_network()
        self._candidates: tuple[str, ...] = ()
        self._wanted = asyncio.Event()

    def want(self, candidates: Sequence[str]) -> None:
        """Have the first MOST_CANDIDATES of these nodes measure soon what they have not of each other."""
        self._candidates = tuple(candidates[:MOST_CANDIDATES])
        if len(self._candidates) > 1:
            self._wanted.set()

    async def run(self) -> None:
        """For ever: one round at a time, over the nodes that were wanted last."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            for node in self._candidates:
                await self._have_measured(node, self._candidates)

    async def _have_measured(self, node: str, peers: Sequence[str]) -> None:
        able = {key for key, _ in self._live.items("", Live)}
        missing = to_measure(node, peers, self._known(node), self._fileservers(), clock.now_s())
        if not missing or f"{node}.placement" not in able:
            return
        try:
            await self._context.ask("placement", node, "links", AskLinks(peers=missing), LinksState, _DEADLINE_S)
        except (ShoalError, NatsError) as e:
            log.info("a node did not measure its links", of=node, why=str(e) or type(e).__name__)

    def _known(self, node: str) -> LinksState | None:
        return self._state.get(links_key(node), LinksState)

    def _fileservers(self) -> dict[str, Facts]:
        return fileservers(dict(self._live.items("", Live)))

    # This node's own

    async def links(self, question: AskLinks) -> LinksState:
        """Measure the ways to these peers that have not been lately, and say what is known of all."""
        me, peers = self._context.node, question.peers[:MOST_CANDIDATES]
        async with self._answering:
            missing = to_measure(me, peers, self._known(me), self._fileservers(), clock.now_s())
            if not missing:
                return self._known(me) or LinksState(node=me)
            found = await self._measured(missing)
            told = with_found(me, self._known(me), found)
            await self._state.reached(await self._context.buckets.state.put(links_key(me), told))
            return told

    async def _measured(self, peers: Sequence[str]) -> list[MeasuredLink]:
        await asyncio.to_thread(self._context.interfaces.look)
        gate, give_up_s = asyncio.Semaphore(_AT_ONCE), monotonic() + _BEGIN_WITHIN_S
        found: list[MeasuredLink] = []

        async def one(peer: str) -> None:
            async with gate:
                live = self._live.get(f"{peer}.fileserver", Live)
                if live is not None and monotonic() < give_up_s and not self._context.stopping.is_set():
                    found.append(await self._measure(peer, live))

        async with asyncio.TaskGroup() as tasks:
            for peer in peers:
                tasks.create_task(one(peer))
        return found

    async def _measure(self, peer: str, live: Live) -> MeasuredLink:
        context = self._context
        own = self._fileservers().get(context.node, Facts())
        result = MeasuredLink(peer=peer, at_s=round(clock.now_s(), 3), ends=ends(own, live.facts))
        try:
            link, connection = await asyncio.to_thread(connect, ways(live, self._network, context.interfaces.now))
            token = blob_token(context.config.secret, peer, PROBE, clock.now_s())
            async with self._wire:
                found = await asyncio.to_thread(measure, connection, token)
        except OSError as e:
            log.info("a peer could not be reached", peer=peer, why=str(e) or type(e).__name__)
            return structs.replace(result, error=(str(e) or type(e).__name__)[:200])
        log.debug("a link was measured", peer=peer, round_trip_s=found.round_trip_s, bytes_per_s=found.bytes_per_s)
        return structs.replace(
            result,
            address=link.address,
            kind=link.kind,
            round_trip_s=round(found.round_trip_s, 6),
            bytes_per_s=round(found.bytes_per_s),
        )


def fileservers(live: dict[str, Live]) -> dict[str, Facts]:
    """The facts of the fileservers that are live, by node."""
    parts = ((key.partition("."), value) for key, value in live.items())
    return {node: value.facts for (node, _, service), value in parts if service == "fileserver"}
