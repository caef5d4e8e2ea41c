"""Who may talk to a node's data ports (I12).

The cluster has one secret. What crosses the wire is derived from it per purpose, so that a peer that sees one
derived key cannot use it for another. Without a secret (everything on loopback) nothing is asked.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping


def derive(secret: str, purpose: str) -> str:
    """The key for one purpose (`blobs`, `activations`, `api`): HMAC-SHA256 of the purpose, as hex."""
    return hmac.new(secret.encode(), f"shoal/v1/{purpose}".encode(), hashlib.sha256).hexdigest()


def bearer(secret: str, purpose: str) -> dict[str, str]:
    """Headers that show the key; none when there is no secret."""
    return {"Authorization": f"Bearer {derive(secret, purpose)}"} if secret else {}


def allowed(secret: str, purpose: str, headers: Mapping[str, str]) -> bool:
    """Whether a request shows the key for this purpose. `headers` must look names up in any case."""
    if not secret:
        return True
    given = headers.get("authorization") or ""
    return hmac.compare_digest(given.encode(errors="replace"), f"Bearer {derive(secret, purpose)}".encode())
