"""Client of this node's storage. Every request here is idempotent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TypeVar

from shoal_common import telemetry
from shoal_common.errors import Corrupt, NotFound
from shoal_common.messages.envelope import Empty
from shoal_common.messages.manifest import LeafListSeal, Manifest
from shoal_common.messages.storage import (
    CheckSpace,
    CommitBlob,
    CommittedBlob,
    ModelState,
    Release,
    Reserve,
    ReserveResult,
    SealModel,
    SealShard,
    ShardState,
    SpaceCheck,
)
from shoal_common.names import ModelId
from shoal_common.rpc.request_reply import RpcClient
from shoal_common.store import leaf_set
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.errors import BlobHashMismatch, LeafReadbackMismatch, ReservationLost

T = TypeVar("T")

_DEADLINE_S = 60.0
_COMMIT_DEADLINE_S = 600.0
"""A commit hashes the whole blob."""
_RESTART_WAIT_S = 30.0
"""How long a storage that is down may take to restart."""
_RELEASE_RESTART_WAIT_S = 10.0


class StorageClient:
    """The storage of this node, across its restarts."""

    def __init__(self, rpc: RpcClient, node: str, cluster_view: ClusterView) -> None:
        self._rpc, self._node, self._cluster_view = rpc, node, cluster_view

    async def reserve(self, manifest: Manifest, leaves: Mapping[str, int] | None = None) -> ReserveResult:
        """Reserve space for a model, of some blobs only `leaves`. Returns what is present. Raises QuotaExceeded."""
        request = Reserve(manifest=manifest, leaf_ranges=_as_ranges(leaves or {}))
        return await self._request("reserve", request, ReserveResult)

    async def commit(self, blob: str, leaf_list_digest: str = "", seal: LeafListSeal | None = None) -> CommittedBlob:
        """Verify a complete partial blob and commit it: by its leaf list if that has this digest and a seal that
        counts, else by sha256.

        Raises BlobHashMismatch, LeafReadbackMismatch, or ReservationLost if the partial is gone.
        """
        try:
            request = CommitBlob(blob=blob, leaf_list_digest=leaf_list_digest, seal=seal)
            committed = await self._request("commit", request, CommittedBlob, _COMMIT_DEADLINE_S)
        except NotFound as e:
            raise ReservationLost(e.message) from e
        except Corrupt as e:
            if e.details.get("bad_leaves"):
                raise LeafReadbackMismatch(e.message, **e.details) from e
            raise BlobHashMismatch(e.message, **e.details) from e
        telemetry.count_verified(committed.size_bytes)
        return committed

    async def seal(self, manifest: Manifest) -> ModelState:
        """Make a model present. Raises ReservationLost if one of its blobs is gone."""
        try:
            return await self._request("seal", SealModel(manifest=manifest), ModelState)
        except NotFound as e:
            raise ReservationLost(e.message) from e

    async def seal_shard(
        self,
        manifest: Manifest,
        layers: list[list[int]],
        leaves: Mapping[str, int],
        leaf_list_digests: dict[str, str],
        seals: dict[str, LeafListSeal],
    ) -> ShardState:
        """Have the leaves of some layers verified and kept. Raises ReservationLost if some are gone, BlobHashMismatch
        if some are corrupt.
        """
        request = SealShard(
            manifest=manifest,
            layers=layers,
            leaf_ranges=_as_ranges(leaves),
            leaf_list_digests=leaf_list_digests,
            seals=seals,
        )
        try:
            return await self._request("seal_shard", request, ShardState, _COMMIT_DEADLINE_S)
        except NotFound as e:
            raise ReservationLost(e.message) from e
        except Corrupt as e:
            raise BlobHashMismatch(e.message, **e.details) from e

    async def check_space(self, model: ModelId) -> SpaceCheck:
        """Return whether there is space again for the reservations, `model` (`org/name@commit`) among them."""
        return await self._request("check_space", CheckSpace(model=model), SpaceCheck)

    async def release(self, model: ModelId, blobs: Iterable[str]) -> None:
        """Release a reservation. Deletes what only it needed: its partial blobs, and these complete ones."""
        request = Release(model=model, blobs=sorted(blobs))
        await self._request("release", request, Empty, restart_wait_s=_RELEASE_RESTART_WAIT_S)

    async def _request(
        self,
        verb: str,
        request: object,
        reply_type: type[T],
        deadline_s: float = _DEADLINE_S,
        restart_wait_s: float = _RESTART_WAIT_S,
    ) -> T:
        # Without the race, a reply lost with a killed storage or a restarted NATS is awaited to the deadline.
        while True:
            call = asyncio.ensure_future(
                self._rpc(
                    "storage",
                    self._node,
                    verb,
                    request,
                    reply_type,
                    deadline_s=deadline_s,
                    restart_wait_s=restart_wait_s,
                )
            )
            lost = asyncio.ensure_future(self._cluster_view.wait_reply_lost("storage"))
            try:
                await asyncio.wait({call, lost}, return_when=asyncio.FIRST_COMPLETED)
                if call.done():
                    return call.result()
            finally:
                call.cancel()
                lost.cancel()


def _as_ranges(leaves: Mapping[str, int]) -> dict[str, leaf_set.LeafRanges]:
    return {blob: leaf_set.to_ranges(of_blob) for blob, of_blob in leaves.items()}
