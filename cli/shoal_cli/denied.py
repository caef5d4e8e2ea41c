"""What the system does not let this user do, in words."""

from __future__ import annotations

import getpass
from pathlib import Path


def not_allowed(error: PermissionError) -> str:
    """What a person reads who may not use a file: most often it is another user's node."""
    path = Path(error.filename or "/")
    owner = next((own for p in (path, *path.parents) if (own := _owner(p))), "")
    whose = f", which belongs to {owner}" if owner else ""
    remedy = f"run this as {owner}, or " if owner and owner != getpass.getuser() else ""
    return f"{path}{whose}: {error.strerror}; {remedy}give this user the right to it, or name another --home"


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return ""
