"""Repositories for the test hub, created by the test that pulls them."""

from __future__ import annotations

import random
from pathlib import Path


def make_model(root: Path, repo: str, files: dict[str, bytes]) -> int:
    """Create a repository for a hub over `root`. Returns its size in bytes."""
    for path, content in files.items():
        target = root / repo / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return sum(len(c) for c in files.values())


def noise(size_bytes: int, seed: object) -> bytes:
    """Return bytes that differ for every seed."""
    piece = 64 << 20  # more at once is more than Python's generator can
    source = random.Random(str(seed))
    return b"".join(source.randbytes(min(piece, size_bytes - at)) for at in range(0, size_bytes, piece))
