"""Create two leases and end one, for a process that may be killed anywhere; print each step once done."""

from __future__ import annotations

import os
from pathlib import Path

from tests.storage.crash_child_model import STAYS
from tests.storage.store_fixtures import StoreFixture


def report(what: str) -> None:
    """Print one line, unbuffered."""
    os.write(1, f"{what}\n".encode())


def main(root: Path) -> None:
    """Create, create, end, in a store where org/stays is complete already."""
    store = StoreFixture(root)
    first = store.lease(STAYS, "first")
    report("made first")
    store.lease(STAYS, "second")
    report("made second")
    assert store.end(first)
    report("ended first")
