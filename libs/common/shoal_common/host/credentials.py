"""Keys that are derived from the cluster's secret, one per purpose.

A peer that sees one derived key cannot use it for another purpose.
"""

from __future__ import annotations

import hashlib
import hmac

from shoal_common.redaction import remember_secret


def derive(secret: str, purpose: str) -> str:
    """Return the key for a purpose (`api`, `activations/<instance>`): HMAC-SHA256 of the purpose, as hex."""
    key = hmac.new(secret.encode(), f"shoal/v1/{purpose}".encode(), hashlib.sha256).hexdigest()
    if "/" not in purpose:
        remember_secret(key)  # the others expire, and are many
    return key


def bearer(secret: str, purpose: str) -> dict[str, str]:
    """Return headers that carry the key; empty without a secret."""
    return {"Authorization": f"Bearer {derive(secret, purpose)}"} if secret else {}
