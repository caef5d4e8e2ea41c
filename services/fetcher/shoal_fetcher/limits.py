"""How fast this node may take bytes: from the hub in all, and from each peer, as its settings say."""

from __future__ import annotations

from collections import OrderedDict

from shoal_common.buckets import storage_key
from shoal_common.messages.records import StorageState
from shoal_common.pace import Pace
from shoal_common.watch import View

MOST_PEERS = 256


class Limits:
    """The paces that all transfers of this node share. Without a setting there is no limit."""

    def __init__(self) -> None:
        self.hub = Pace()
        self._peer_bytes_per_s: int | None = None
        self._peers: OrderedDict[str, Pace] = OrderedDict()

    def peer(self, node: str) -> Pace:
        """The pace of what comes from a node. Of more than MOST_PEERS the one asked least lately begins anew."""
        if node not in self._peers:
            self._peers[node] = Pace(self._peer_bytes_per_s)
            if len(self._peers) > MOST_PEERS:
                # Who waits in it still does; it is only forgotten that it was busy.
                self._peers.popitem(last=False)
        self._peers.move_to_end(node)
        return self._peers[node]

    def use(self, settings: StorageState) -> None:
        """From now on these limits hold, for what is under way as well."""
        self.hub.use(settings.max_hub_bytes_per_s)
        self._peer_bytes_per_s = settings.max_peer_bytes_per_s
        for pace in self._peers.values():
            pace.use(self._peer_bytes_per_s)

    async def follow(self, state: View, node: str) -> None:
        """Keep to what this node's storage says, for ever. What was said last holds while storage is away."""
        while True:
            seen = state.changes
            settings = state.get(storage_key(node), StorageState)
            if settings is not None:
                self.use(settings)
            await state.changed_after(seen)
