"""Two leases are made and one ends, in a process of its own, to be killed anywhere. Says what it has done.

python -m tests.storage.lease_life STORE, where org/stays is whole already
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.storage.lifecycle import STAYS
from tests.storage.stores import Store


def say(what: str) -> None:
    """One line, written at once."""
    os.write(1, f"{what}\n".encode())


def main(root: Path) -> None:
    """Make, make, end."""
    store = Store(root)
    first = store.lease(STAYS, "first")
    say("made first")
    store.lease(STAYS, "second")
    say("made second")
    assert store.end(first)
    say("ended first")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
