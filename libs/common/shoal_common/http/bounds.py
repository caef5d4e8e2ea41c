"""How much of a process the clients of one HTTP server may take. Pure."""

from __future__ import annotations

import msgspec
from msgspec import structs

MAX_REFUSED_CONNECTIONS = 64
"""Further connections that get a 503; beyond them, new ones are closed without a response."""
MAX_BACKLOG = 128
"""Connections that the event loop accepts at once, before any bound is applied."""
_OWN_FILES = 64
"""Files that the process has open whoever connects."""
_SHARE = 8


class HttpBounds(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on all connections of a server together."""

    max_connections: int
    max_per_address: int
    max_body_bytes: int
    """Of one request's body."""
    max_bodies_bytes: int
    """Of all bodies that are received or in use; the first 64 KiB of each are not counted."""
    max_refused: int = MAX_REFUSED_CONNECTIONS
    backlog: int = MAX_BACKLOG
    files_per_connection: int = 1


def fit_to_files(bounds: HttpBounds, max_files: int) -> HttpBounds:
    """Return bounds within which a process that may open so many files never runs out of them."""
    backlog, refused = min(bounds.backlog, max_files // _SHARE), min(bounds.max_refused, max_files // _SHARE)
    connections = max((max_files - _OWN_FILES - backlog - refused) // bounds.files_per_connection, 1)
    return structs.replace(
        bounds,
        max_connections=min(bounds.max_connections, connections),
        max_per_address=min(bounds.max_per_address, connections),
        max_refused=refused,
        backlog=max(backlog, 1),
    )
