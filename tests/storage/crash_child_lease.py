"""Create two leases and end one, in a process of its own that may be killed anywhere; print each step once done.

python -m tests.storage.crash_child_lease STORE, where org/stays is complete already
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.storage.crash_child_model import STAYS
from tests.storage.store_fixtures import StoreFixture


def report(what: str) -> None:
    """Print one line, unbuffered."""
    os.write(1, f"{what}\n".encode())


def main(root: Path) -> None:
    """Create, create, end."""
    store = StoreFixture(root)
    first = store.lease(STAYS, "first")
    report("made first")
    store.lease(STAYS, "second")
    report("made second")
    assert store.end(first)
    report("ended first")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
