"""A model of three layers, and its shards: reserve, fetch, seal, lease."""

from __future__ import annotations

from shoal_common.bus.keys import shard_key
from shoal_common.messages.leases import AcquireLease, LeaseGrant
from shoal_common.messages.storage import Reserve, ReserveResult, SealShard, ShardState
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap
from shoal_common.store.leaf_hash import hash_leaf_list, leaf_hash
from tests.storage.running_storage import Node
from tests.storage.store_fixtures import Model, sha256

LEAVES = 8


LAST_BYTES = 70_000
"""The size of the last leaf."""


WEIGHTS = b"".join(bytes([65 + n]) * LEAF_BYTES for n in range(LEAVES - 1)) + b"e" * LAST_BYTES


MODEL = Model("org/large", {"config.json": b"{}", "model.safetensors": WEIGHTS, "unneeded.bin": b"u" * 5000})


TWIN = Model("org/twin", {"model.safetensors": WEIGHTS})
"""Another model with the same weights."""


BLOB, CONFIG, UNNEEDED = sha256(WEIGHTS), sha256(b"{}"), sha256(b"u" * 5000)


FIRST, SECOND = [[0, 3]], [[2, 3], [6, 8]]
"""The leaves of layers 0 to 1, and of layer 2."""


FIRST_BYTES = 3 * LEAF_BYTES + 2


async def reserve(node: Node, leaves: list[list[int]]) -> ReserveResult:
    """Reserve leaves of the weights, the small files, and nothing of the file that no stage needs."""
    asked = {BLOB: leaves, UNNEEDED: []}
    return await node.ask("reserve", Reserve(manifest=MODEL.manifest, leaf_ranges=asked), ReserveResult)


def arrive(node: Node, leaves: list[list[int]], data: bytes = WEIGHTS) -> None:
    """Write leaves to their places, the bitmap, and the list beside them, as the fetcher does."""
    directory = node.layout.partial(BLOB)
    bitmap = Bitmap(len(data), (directory / "have").read_bytes() if (directory / "have").exists() else b"")
    with (directory / "data").open("r+b") as f:
        for first, last in leaves:
            f.seek(first * LEAF_BYTES)
            f.write(data[first * LEAF_BYTES : last * LEAF_BYTES])
            for leaf in range(first, last):
                bitmap.add(leaf)
    (directory / "have").write_bytes(bitmap.to_bytes())
    (directory / "leaves").write_bytes(leaf_list())


def leaf_list() -> bytes:
    return b"".join(leaf_hash(WEIGHTS[n * LEAF_BYTES : (n + 1) * LEAF_BYTES]) for n in range(LEAVES))


async def seal(node: Node, layers: list[int], leaves: list[list[int]], root: str = "") -> ShardState:
    asked = {BLOB: leaves, UNNEEDED: []}
    digests = {BLOB: root or hash_leaf_list(leaf_list())}
    question = SealShard(manifest=MODEL.sealed, layers=[layers], leaf_ranges=asked, leaf_list_digests=digests)
    return await node.ask("seal_shard", question, ShardState)


async def bring_in(node: Node, layers: list[int], leaves: list[list[int]]) -> ShardState:
    """Download and seal a shard."""
    for blob in (await reserve(node, leaves)).missing:
        if blob == BLOB:
            arrive(node, leaves)
        else:
            (node.layout.partial(blob) / "data").write_bytes(MODEL.blobs[blob])
            await node.commit(blob)
    return await seal(node, layers, leaves)


async def complete(node: Node) -> None:
    """Download the complete model after a shard: what is present stays, the rest is downloaded."""
    assert set((await node.reserve(MODEL.manifest)).missing) == {BLOB, UNNEEDED}
    arrive(node, [[3, LEAVES]])
    (node.layout.partial(UNNEEDED) / "data").write_bytes(MODEL.blobs[UNNEEDED])
    for blob in (BLOB, UNNEEDED):
        await node.commit(blob)
    await node.seal(MODEL.sealed)


async def published_shard(node: Node) -> ShardState | None:
    return await node.here.buckets.state.get_as(shard_key(node.node, MODEL.name), ShardState)


async def lease(node: Node, layers: list[int]) -> LeaseGrant:
    return await node.ask("lease", AcquireLease(model=MODEL.name, holder="a test", layers=layers), LeaseGrant)
