"""Which source a blob is fetched from: a peer, the hub, or wait for the origin."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import msgspec
from msgspec import structs

from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.storage import ModelState
from shoal_common.names import ModelRef
from shoal_common.store.bitmap import leaf_count
from shoal_fetcher.sources.failure_policy import BlobHolder, SourceHealth

MIN_RELAYED_LEAVES = 2
_MAY_READ_HUB = ("queued", "reserving", "fetching", "verifying")


class FetchFromPeer(msgspec.Struct, frozen=True):
    """Fetch it from this node, which has the complete blob."""

    node: str
    sha256: str


class FetchFromHub(msgspec.Struct, frozen=True):
    """No node has it or is fetching it: become its origin."""


class WaitForOrigin(msgspec.Struct, frozen=True):
    """Another node is reading it from the hub: fetch it from there."""

    node: str


Choice = FetchFromPeer | FetchFromHub | WaitForOrigin


def holders(
    blob: str,
    manifest: Manifest,
    models: Iterable[ModelState],
    downloads: Iterable[DownloadState],
    reachable: Iterable[str],
    own_node: str,
    sha256_by_git_name: Mapping[str, str],
) -> list[BlobHolder]:
    """Return the live peers that have a blob of this model, by what they publish.

    `sha256_by_git_name` are hints of what the small files of models are called.
    """
    live = set(reachable) - {own_node}
    sha256_by_node: dict[str, str] = {}
    for model in models:
        # A node that has the model has its blobs by sha256; those known only by git's sha1 are in its download state.
        sha256 = sha256_by_git_name.get(blob, blob)
        if model.node in live and model.model == manifest.model and not sha256.startswith("git-"):
            sha256_by_node[model.node] = sha256
    for download in downloads:
        if download.node not in live:
            continue
        sha256 = download.sha256_by_git_name.get(blob, blob)
        if sha256 in download.blobs:
            sha256_by_node[download.node] = sha256
    return [BlobHolder(node, sha256_by_node[node]) for node in sorted(sha256_by_node)]


def allowed_by_hub(
    repo: str, commit: str, downloads: Iterable[DownloadState], reachable: Iterable[str], own_node: str
) -> dict[str, int]:
    """Return the live peers that are fetching this model and that the hub has not refused it, with what they have.

    One of them may hold a token that we lack, and read from the hub what we need. `commit`: "" for any.
    """
    live = set(reachable) - {own_node}
    return {
        d.node: d.done_bytes
        for d in downloads
        if d.node in live
        and d.phase in _MAY_READ_HUB
        and not d.denied_by_hub
        and ModelRef.parse(d.model).repo == repo
        and (not commit or d.commit in ("", commit))
    }


def choose_source(
    blob: str,
    holders: list[BlobHolder],
    origin: str | None,
    own_node: str,
    health: SourceHealth,
    busy: Mapping[str, int],
) -> Choice:
    """Return where to fetch a blob from.

    From a peer that has it: the one with the fewest failures, then the least busy, ties broken differently on each
    node to spread the load. Else from whoever holds its origin lease; else from the hub, under that lease (I9).
    """
    usable = health.askable(holders)
    if usable:

        def rank(h: BlobHolder) -> tuple[int, int, bytes]:
            draw = hashlib.sha256(f"{own_node}/{h.node}/{blob}".encode()).digest()
            return (health.failure_counts.get(h.node, 0), busy.get(h.node, 0), draw)

        best = min(usable, key=rank)
        return FetchFromPeer(best.node, best.sha256)
    if origin is not None and origin != own_node:
        return WaitForOrigin(origin)
    return FetchFromHub()


def agreed_digest(published: Iterable[str]) -> str:
    """Return the leaf-list digest that all who publish one agree on; "" if they differ: then sha256 decides."""
    digests = set(published) - {""}
    return digests.pop() if len(digests) == 1 else ""


def is_relayed(blob: str, size_bytes: int) -> bool:
    """Return whether nodes relay a blob while it arrives. Small blobs are fetched whole from a node that has them."""
    return not blob.startswith("git-") and leaf_count(size_bytes) >= MIN_RELAYED_LEAVES


def with_known_sha256(manifest: Manifest, known: Mapping[str, str]) -> Manifest:
    """Return the manifest with every sha256 that has been learned."""
    files = [
        ManifestFile(path=f.path, size_bytes=f.size_bytes, sha256=known.get(f.blob, f.sha256), git_sha1=f.git_sha1)
        for f in manifest.files  # leaf-list digests are set by storage
    ]
    return structs.replace(manifest, files=files)
