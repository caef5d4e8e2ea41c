"""A model's whole life in a store, for a process that may be killed anywhere; prints what it acknowledges."""

from __future__ import annotations

import os
from pathlib import Path

from shoal_common.store.bitmap import LEAF_BYTES
from tests.storage.store_fixtures import Model, StoreFixture, put

STAYS = Model("org/stays", {"shared.bin": b"both have these" * 20, "own.bin": b"s" * LEAF_BYTES + b"o" * 500})
LEAVES = Model(
    "org/leaves",
    {"shared.bin": b"both have these" * 20, "sub/own.bin": b"l" * 700, "config.json": b"{}"},
    by_git=("config.json",),
)
COMES = Model("org/comes", {"late.bin": b"c" * 600})


def acknowledge(what: str, which: str) -> None:
    """Print one line, unbuffered."""
    os.write(1, f"{what} {which}\n".encode())


def bring_in(store: StoreFixture, model: Model) -> None:
    """Reserve, receive, commit and seal a model, printing each step."""
    for blob in store.reserve(model):
        acknowledge("reserved", blob)
        put(store.layout, blob, model.blobs[blob])
        acknowledge("committed", store.commit(blob))
    store.seal(model)
    acknowledge("sealed", model.name)


def main(root: Path, volume: Path | None = None) -> None:
    """Download two models that share a blob, delete one of them, reserve another one."""
    store = StoreFixture(root, volume)
    store.onto = next(iter(store.disk.volumes), "")
    bring_in(store, STAYS)
    bring_in(store, LEAVES)
    store.delete(LEAVES)
    acknowledge("deleted", LEAVES.name)
    for blob in store.reserve(COMES):
        acknowledge("reserved", blob)
