"""Credentials for a node's data ports (I12).

The cluster has one secret. What crosses the wire is derived from it per purpose, so that a peer that sees one
derived key cannot use it for another. Without a secret (everything on loopback) no credential is required.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from shoal_common.redaction import remember_secret

_UNTIL_DIGITS = 12


def derive(secret: str, purpose: str) -> str:
    """Return the key for a purpose (`blobs`, `hub`, `activations`, `api`): HMAC-SHA256 of the purpose, as hex."""
    key = hmac.new(secret.encode(), f"shoal/v1/{purpose}".encode(), hashlib.sha256).hexdigest()
    if "/" not in purpose:
        remember_secret(key)  # the others expire, and are many
    return key


def bearer(secret: str, purpose: str) -> dict[str, str]:
    """Return headers that carry the key; empty without a secret."""
    return {"Authorization": f"Bearer {derive(secret, purpose)}"} if secret else {}


def is_authorized(secret: str, purpose: str, headers: Mapping[str, str]) -> bool:
    """Return whether a request carries the key for a purpose. `headers` must ignore the case of names."""
    if not secret:
        return True
    authorization = headers.get("authorization") or ""
    return hmac.compare_digest(authorization.encode(errors="replace"), f"Bearer {derive(secret, purpose)}".encode())


TOKEN_LIFETIME_S = 600
"""Lifetime of a blob's token by the cluster's clock (`cluster_clock.py`); two processes' clocks may differ by as much
again."""


PROBE_NAME = "probe"
"""Takes the place of a blob's name in the token for a node's `/v1/probe`."""


def blob_token(secret: str, node: str, blob: str, now_s: float) -> dict[str, str]:
    """Return headers that allow reading one blob of one node for some minutes; empty without a secret."""
    if not secret:
        return {}
    until_s = int(now_s) + TOKEN_LIFETIME_S
    return {"Authorization": f"Shoal {until_s}.{derive(secret, f'blob/{node}/{blob}/{until_s}')}"}


def blob_token_allows(secret: str, node: str, blob: str, headers: Mapping[str, str], now_s: float) -> bool:
    """Return whether a request may read this blob of this node now. `headers` must ignore the case of names."""
    if not secret:
        return True
    scheme, _, token = (headers.get("authorization") or "").partition(" ")
    until, _, key = token.partition(".")
    if scheme != "Shoal" or not (until.isascii() and until.isdigit() and len(until) <= _UNTIL_DIGITS):
        return False
    if not now_s - TOKEN_LIFETIME_S <= int(until) <= now_s + 2 * TOKEN_LIFETIME_S:
        return False
    expected = derive(secret, f"blob/{node}/{blob}/{int(until)}")
    return hmac.compare_digest(key.encode(errors="replace"), expected.encode())


def signed_query(secret: str, blob: str, until_s: int) -> dict[str, str]:
    """Return query fields that allow anyone with the URL to read one blob until a time (seconds since 1970).

    For clients that send no credential to the target of a redirect. Empty without a secret.
    """
    return {"until": str(until_s), "key": derive(secret, f"blob/{blob}/{until_s}")} if secret else {}


def signed_query_allows(secret: str, blob: str, query: Mapping[str, str], now_s: float) -> bool:
    """Return whether a URL's query allows reading this blob now."""
    until, key = query.get("until", ""), query.get("key", "")
    if not (secret and until.isascii() and until.isdigit() and len(until) <= _UNTIL_DIGITS and now_s <= int(until)):
        return False
    return hmac.compare_digest(key.encode(errors="replace"), derive(secret, f"blob/{blob}/{int(until)}").encode())
