"""How fast this node may receive bytes: from the hub in all, and from each peer, as its settings say."""

from __future__ import annotations

from collections import OrderedDict

from shoal_common.bus.keys import storage_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.messages.storage import StorageState
from shoal_common.settings.node import TransferSettings

MAX_PEERS = 256


class RateLimits:
    """The rate limiters that all transfers of this node share. Without a setting there is no limit."""

    def __init__(self) -> None:
        self.hub = RateLimiter()
        self._peer_bytes_per_s: int | None = None
        self._peers: OrderedDict[str, RateLimiter] = OrderedDict()

    def for_peer(self, node: str) -> RateLimiter:
        """Return the rate limiter of a node. Beyond MAX_PEERS the least recently used one is dropped."""
        if node not in self._peers:
            self._peers[node] = RateLimiter(self._peer_bytes_per_s)
            if len(self._peers) > MAX_PEERS:
                # Its waiters keep it; the next request gets a fresh one.
                self._peers.popitem(last=False)
        self._peers.move_to_end(node)
        return self._peers[node]

    def apply(self, settings: TransferSettings) -> None:
        """Apply these limits now, also to running transfers."""
        self.hub.set_rate(settings.max_hub_bytes_per_s)
        self._peer_bytes_per_s = settings.max_peer_bytes_per_s
        for limiter in self._peers.values():
            limiter.set_rate(self._peer_bytes_per_s)

    async def follow_settings(self, state: KvMirror, node: str) -> None:
        """Follow the settings that this node's storage publishes. The last ones hold while storage is down."""
        while True:
            version = state.changes
            settings = state.get(storage_key(node), StorageState)
            if settings is not None:
                self.apply(settings)
            await state.wait_changed(version)
