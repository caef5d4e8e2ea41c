"""Resolve a directory that a person named."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def resolve_path(path: str) -> Path:
    """Return the real path of a library or volume, which need not exist."""
    expanded = Path(path)
    with suppress(RuntimeError):  # `~name` of an unknown user: there is no such directory
        expanded = expanded.expanduser()
    return Path(os.path.realpath(expanded))
