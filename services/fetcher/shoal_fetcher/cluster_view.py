"""What a download knows of the cluster: live nodes, who holds what, who is an origin; and when that changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

from shoal_common.bus.cluster_lease import LeaseValue
from shoal_common.bus.connection import Nats
from shoal_common.bus.keys import liveness_key, origin_key, storage_key
from shoal_common.bus.kv_mirror import KvMirror, any_changed, wait_caught_up
from shoal_common.host.addresses import reachable_addresses
from shoal_common.host.interfaces import Interface, InterfaceMonitor
from shoal_common.host.process_identity import network_id
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.logs import StructuredLogger
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.liveness import LivenessRecord, NodeAddress
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import ModelState, StorageState
from shoal_common.names import ModelId, ModelRef
from shoal_fetcher.sources.failure_policy import BlobHolder
from shoal_fetcher.sources.source_selection import allowed_by_hub, holders

log = StructuredLogger("cluster_view")

_CATCH_UP_S = 5.0
_MAX_CACHED_HOLDERS = 1024
_MAX_HINTS = 20_000
STARTING_TIMEOUT_S = 8.0
"""A starting fileserver is waited for this long: what only it has is not read from the hub (I9)."""


class ClusterView:
    """Read-only mirrors of the cluster's buckets."""

    def __init__(
        self,
        nats: Nats,
        own_node: str,
        live: KvMirror,
        state: KvMirror,
        lease: KvMirror,
        spec: KvMirror,
        interfaces: InterfaceMonitor,
        peer_links: PeerLinks,
    ) -> None:
        self._nats, self._own_node, self._interfaces, self._peer_links = nats, own_node, interfaces, peer_links
        self._live, self._state, self._lease, self._spec = live, state, lease, spec
        self._network = network_id()
        self._addresses: dict[str, list[NodeAddress]] = {}
        self._addresses_as_of: tuple[int, tuple[Interface, ...]] = (-1, ())
        self._plain_only: set[str] = set()
        self._starting: dict[str, float] = {}
        self._starting_as_of = -1
        self._cached_holders: dict[tuple[str, str], list[BlobHolder]] = {}
        self._holders_as_of: tuple[object, ...] = ()
        self._sha256_by_git_name: dict[str, str] = {}

    def addresses(self) -> dict[str, list[NodeAddress]]:
        """Return the addresses of fileservers of other nodes that may be used, in the order to try.

        Recomputed only after a node has published or an interface has changed: it is called often.
        """
        own, as_of = self._interfaces.current, (self._live.changes, self._interfaces.current)
        if as_of != self._addresses_as_of:
            self._addresses, self._addresses_as_of = self._compute_addresses(own), as_of
        return self._addresses

    def _compute_addresses(self, own: tuple[Interface, ...]) -> dict[str, list[NodeAddress]]:
        addresses: dict[str, list[NodeAddress]] = {}
        plain_only: set[str] = set()
        for node, live in self._fileservers():
            reachable = reachable_addresses(live, self._network, own)
            if usable := self._peer_links.usable(reachable):
                addresses[node] = usable
            elif reachable:
                plain_only.add(node)
        for node in sorted(plain_only - self._plain_only):
            log.warning("node sends weights unencrypted: not a source, unless encrypt_weights is false", name=node)
        self._plain_only = plain_only
        return addresses

    def _fileservers(self) -> Iterator[tuple[str, LivenessRecord]]:
        """Yield the live fileservers of other nodes that serve them."""
        for key, live in self._live.items("", LivenessRecord):
            node, _, service = key.partition(".")
            if service == "fileserver" and node != self._own_node and live.facts.serves_peers:
                yield node, live

    def nodes_starting(self) -> set[str]:
        """Return nodes whose fileserver is live but has no address yet; for at most STARTING_TIMEOUT_S."""
        now_s = time.monotonic()
        if self._live.changes != self._starting_as_of:
            starting = {node for node, live in self._fileservers() if not live.facts.addresses}
            self._starting = {node: self._starting.get(node, now_s) for node in starting}
            self._starting_as_of = self._live.changes
        return {node for node, since_s in self._starting.items() if now_s - since_s < STARTING_TIMEOUT_S}

    def holders(self, blob: str, manifest: Manifest) -> list[BlobHolder]:
        """Return the live peers that have the complete blob. Recomputed only after somebody has published."""
        addresses = self.addresses()
        as_of = (self._state.changes, self._addresses_as_of)
        if as_of != self._holders_as_of or len(self._cached_holders) > _MAX_CACHED_HOLDERS:
            self._cached_holders, self._holders_as_of = {}, as_of
        key = (blob, manifest.model)
        if key not in self._cached_holders:
            self._cached_holders[key] = self._holders(blob, manifest, addresses)
        return self._cached_holders[key]

    def holders_restarting(self, blob: str, manifest: Manifest) -> list[BlobHolder]:
        """Return the peers that have the complete blob and whose fileserver is starting."""
        starting = self.nodes_starting()
        return self._holders(blob, manifest, starting) if starting else []

    def _holders(self, blob: str, manifest: Manifest, nodes: Iterable[str]) -> list[BlobHolder]:
        models = (m for _, m in self._state.items("model.", ModelState))
        downloads = (d for _, d in self._state.items("download.", DownloadState))
        return holders(blob, manifest, models, downloads, nodes, self._own_node, self._sha256_by_git_name)

    def learn_sha256(self, by_git_name: Mapping[str, str]) -> None:
        """Learn under which sha256 nodes that have a model may have its small files: hints, which may be wrong."""
        if len(self._sha256_by_git_name) > _MAX_HINTS:
            self._sha256_by_git_name.clear()
        self._sha256_by_git_name |= by_git_name
        self._holders_as_of = ()

    def allowed_by_hub(self, repo: str, commit: str) -> dict[str, int]:
        """Return the live peers that fetch a model and to which the hub has not refused it, with what they have."""
        downloads = (d for _, d in self._state.items("download.", DownloadState))
        return allowed_by_hub(repo, commit, downloads, self.addresses(), self._own_node)

    def leaf_list_digests(self, sha256: str) -> set[str]:
        """Return the leaf-list digests of a blob, as published by live nodes that have it but not yet its model."""
        live = self.addresses()
        downloads = (d for _, d in self._state.items("download.", DownloadState))
        return {d.leaf_list_digests[sha256] for d in downloads if d.node in live and sha256 in d.leaf_list_digests}

    def nodes_holding(self, ref: ModelRef) -> list[tuple[str, ModelId]]:
        """Return `(node, org/name@commit)` of the nodes that hold what `ref` names, this one first."""
        live = {key.partition(".")[0] for key, _ in self._live.items("", LivenessRecord) if key.endswith(".storage")}
        holder = [
            (m.node, m.model)
            for _, m in self._state.items("model.", ModelState)
            if m.repo == ref.repo and (m.commit == ref.revision or ref.revision in m.revisions) and m.node in live
        ]
        return sorted(holder, key=lambda pair: pair[0] != self._own_node)

    def own_downloads(self) -> dict[str, DownloadState | None]:
        """Return every model of which this node has a download request or state, with that state."""
        prefix = f"download.{self._own_node}."
        requested: dict[str, DownloadState | None] = {
            s.model: None for _, s in self._spec.items(prefix, DownloadRequest)
        }
        return requested | {d.model: d for _, d in self._state.items(prefix, DownloadState)}

    def origin_of(self, blob: str) -> str | None:
        """Return the node that is reading a blob from the hub."""
        lease = self._lease.get(origin_key(blob), LeaseValue)
        return lease.node if lease else None

    async def wait_caught_up(self) -> None:
        """Wait until everything published in `state` before now is seen."""
        with suppress(TimeoutError):
            await wait_caught_up(self._nats, self._state, _CATCH_UP_S)

    def version(self) -> tuple[int, ...]:
        """Return the versions of the mirrors; read them before a decision and pass them to `changed`."""
        return tuple(v.changes for v in (self._live, self._state, self._lease))

    async def wait_changed(self, version: tuple[int, ...], deadline_s: float) -> None:
        """Return once anything has changed since `seen`, or after the deadline."""
        await any_changed((self._live, self._state, self._lease), version, deadline_s)

    def disk_status(self) -> tuple[object, ...]:
        """Return what is published of this node's disk; when it changes, waiting downloads ask storage again."""
        live = self._live.get(liveness_key(self._own_node, "storage"), LivenessRecord)
        return (live and live.facts.disk_free_bytes, self._state.get(storage_key(self._own_node), StorageState))

    async def wait_disk_changed(self, before: tuple[object, ...], deadline_s: float) -> None:
        """Return once this node's disk differs from `before`, or after the deadline."""
        mirrors = (self._live, self._state)
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while True:
                    seen = tuple(v.changes for v in mirrors)
                    if self.disk_status() != before:
                        return
                    await any_changed(mirrors, seen)

    async def wait_reply_lost(self, service: str) -> None:
        """Return once a reply to a request sent now to a service of this node may be lost:

        its process was replaced, or NATS was down.
        """
        connection, process = self._nats.reconnects.count, self._uid(service)
        reconnected = asyncio.ensure_future(self._nats.reconnects.wait_after(connection))
        try:
            while self._uid(service) == process and not reconnected.done():
                changed = asyncio.ensure_future(self._live.wait_changed(self._live.changes))
                try:
                    await asyncio.wait({changed, reconnected}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
        finally:
            reconnected.cancel()

    def _uid(self, service: str) -> str:
        live = self._live.get(liveness_key(self._own_node, service), LivenessRecord)
        return live.holder.uid if live else ""
