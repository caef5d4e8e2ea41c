"""Repositories for the tiny hub, made by the test that pulls them."""

from __future__ import annotations

import random
from pathlib import Path


def make_model(root: Path, repo: str, files: dict[str, bytes]) -> int:
    """Put a repository where a hub over `root` finds it. Returns its bytes."""
    for path, content in files.items():
        target = root / repo / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return sum(len(c) for c in files.values())


def noise(size_bytes: int, seed: object) -> bytes:
    """Bytes that no other seed gives."""
    piece = 64 << 20  # more at once is more than Python's generator can
    source = random.Random(str(seed))
    return b"".join(source.randbytes(min(piece, size_bytes - at)) for at in range(0, size_bytes, piece))
