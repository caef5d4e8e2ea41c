"""What a download sees of the cluster: who is live, who has what, who is an origin; and when that changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress

from shoal_common.buckets import live_key, origin_key, storage_key
from shoal_common.connection import Nats
from shoal_common.identity import this_network
from shoal_common.interfaces import Interface, Interfaces
from shoal_common.leases import LeaseValue
from shoal_common.messages.facts import Live
from shoal_common.messages.records import DownloadSpec, DownloadState, Manifest, ModelState, StorageState
from shoal_common.names import ModelRef
from shoal_common.reach import ways
from shoal_common.watch import View, any_changed, caught_up
from shoal_fetcher.decide import Holding, holders

_CATCH_UP_S = 5.0
_SAID_AT_MOST = 1024
STARTING_S = 8.0
"""A fileserver that starts is waited for so long: what only it has need not come from the hub (I9)."""


class Surroundings:
    """Read-only views of the cluster."""

    def __init__(
        self,
        nats: Nats,
        me: str,
        live: View,
        state: View,
        lease: View,
        spec: View,
        interfaces: Interfaces,
    ) -> None:
        self._nats, self._me, self._interfaces = nats, me, interfaces
        self._live, self._state, self._lease, self._spec = live, state, lease, spec
        self._network = this_network()
        self._addresses: dict[str, list[str]] = {}
        self._addresses_as_of: tuple[int, tuple[Interface, ...]] = (-1, ())
        self._starting: dict[str, float] = {}
        self._starting_as_of = -1
        self._said: dict[tuple[str, str], list[Holding]] = {}
        self._said_as_of: tuple[object, ...] = ()

    def addresses(self) -> dict[str, list[str]]:
        """Live fileservers of other nodes that can be reached from here, and where, in the order to try.

        It is worked out anew only when a node has said something or an interface has changed: it is asked often.
        """
        mine, as_of = self._interfaces.now, (self._live.changes, self._interfaces.now)
        if as_of != self._addresses_as_of:
            self._addresses, self._addresses_as_of = self._work_out_addresses(mine), as_of
        return self._addresses

    def _work_out_addresses(self, mine: tuple[Interface, ...]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key, live in self._live.items("", Live):
            node, _, service = key.partition(".")
            if service == "fileserver" and node != self._me:
                found[node] = [link.address for link in ways(live, self._network, mine)]
        return {node: addresses for node, addresses in found.items() if addresses}

    def starting(self) -> set[str]:
        """Other nodes whose fileserver is there and does not say yet where it answers; not after STARTING_S."""
        now_s = time.monotonic()
        if self._live.changes != self._starting_as_of:
            found = {
                node
                for (node, _, service), live in ((k.partition("."), v) for k, v in self._live.items("", Live))
                if service == "fileserver" and node != self._me and not live.facts.addresses
            }
            self._starting = {node: self._starting.get(node, now_s) for node in found}
            self._starting_as_of = self._live.changes
        return {node for node, since_s in self._starting.items() if now_s - since_s < STARTING_S}

    def holders(self, blob: str, manifest: Manifest) -> list[Holding]:
        """Live peers that have a blob whole. Worked out anew only when somebody has said something."""
        addresses = self.addresses()
        as_of = (self._state.changes, self._addresses_as_of)
        if as_of != self._said_as_of or len(self._said) > _SAID_AT_MOST:
            self._said, self._said_as_of = {}, as_of
        key = (blob, manifest.model)
        if key not in self._said:
            self._said[key] = self._holders(blob, manifest, addresses)
        return self._said[key]

    def returning(self, blob: str, manifest: Manifest) -> list[Holding]:
        """Peers that have a blob whole, and can be asked for it in a moment."""
        starting = self.starting()
        return self._holders(blob, manifest, starting) if starting else []

    def _holders(self, blob: str, manifest: Manifest, nodes: Iterable[str]) -> list[Holding]:
        models = (m for _, m in self._state.items("model.", ModelState))
        downloads = (d for _, d in self._state.items("download.", DownloadState))
        return holders(blob, manifest, models, downloads, nodes, self._me)

    def roots(self, sha256: str) -> set[str]:
        """Roots of a blob's leaf list, as live nodes that have it whole and are still downloading its model say."""
        live = self.addresses()
        downloads = (d for _, d in self._state.items("download.", DownloadState))
        return {d.roots[sha256] for d in downloads if d.node in live and sha256 in d.roots}

    def nodes_with(self, ref: ModelRef) -> list[tuple[str, str]]:
        """`(node, org/name@commit)` of the nodes that hold what a person means by `ref`, this one first."""
        live = {key.partition(".")[0] for key, _ in self._live.items("", Live) if key.endswith(".storage")}
        found = [
            (m.node, m.model)
            for _, m in self._state.items("model.", ModelState)
            if m.repo == ref.repo and (m.commit == ref.revision or ref.revision in m.revisions) and m.node in live
        ]
        return sorted(found, key=lambda pair: pair[0] != self._me)

    def own_downloads(self) -> dict[str, DownloadState | None]:
        """Every model of which this node has a wish or a download's state; and that state."""
        prefix = f"download.{self._me}."
        found: dict[str, DownloadState | None] = {s.model: None for _, s in self._spec.items(prefix, DownloadSpec)}
        return found | {d.model: d for _, d in self._state.items(prefix, DownloadState)}

    def origin(self, blob: str) -> str | None:
        """Which node is reading a blob from the hub."""
        lease = self._lease.get(origin_key(blob), LeaseValue)
        return lease.node if lease else None

    async def catch_up(self) -> None:
        """See everything that was said in `state` before now."""
        with suppress(TimeoutError):
            await caught_up(self._nats, self._state, _CATCH_UP_S)

    def seen(self) -> tuple[int, ...]:
        """What has been seen so far: take it before looking, and give it to `changed`, so that nothing is missed."""
        return tuple(v.changes for v in (self._live, self._state, self._lease))

    async def changed(self, seen: tuple[int, ...], deadline_s: float) -> None:
        """Return once anything has changed after `seen`, or after the deadline."""
        await any_changed((self._live, self._state, self._lease), seen, deadline_s)

    def disk(self) -> tuple[object, ...]:
        """What is said of this node's disk: who waits for space looks at storage again when it differs."""
        live = self._live.get(live_key(self._me, "storage"), Live)
        return (live and live.facts.disk_free_bytes, self._state.get(storage_key(self._me), StorageState))

    async def disk_changed(self, before: tuple[object, ...], deadline_s: float) -> None:
        """Return once what is said of this node's disk differs from `before`, or after the deadline."""
        views = (self._live, self._state)
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while True:
                    seen = tuple(v.changes for v in views)
                    if self.disk() != before:
                        return
                    await any_changed(views, seen)

    async def answers_lost(self, service: str) -> None:
        """Return once a question asked now of a service of this node may have lost its answer:

        its process is another one than now, or NATS was away.
        """
        connection, process = self._nats.reconnects.count, self._uid(service)
        reconnected = asyncio.ensure_future(self._nats.reconnects.wait_after(connection))
        try:
            while self._uid(service) == process and not reconnected.done():
                changed = asyncio.ensure_future(self._live.changed_after(self._live.changes))
                try:
                    await asyncio.wait({changed, reconnected}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
        finally:
            reconnected.cancel()

    def _uid(self, service: str) -> str:
        live = self._live.get(live_key(self._me, service), Live)
        return live.holder.uid if live else ""
