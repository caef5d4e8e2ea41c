"""Resolve a directory that a person named."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def real_root(root: str) -> Path:
    """Return the real path of a library or volume, which need not exist."""
    path = Path(root)
    with suppress(RuntimeError):  # `~name` of an unknown user: there is no such directory
        path = path.expanduser()
    return Path(os.path.realpath(path))
