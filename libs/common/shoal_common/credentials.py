"""Who may talk to a node's data ports (I12).

The cluster has one secret. What crosses the wire is derived from it per purpose, so that a peer that sees one
derived key cannot use it for another. Without a secret (everything on loopback) nothing is asked.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

_UNTIL_DIGITS = 12


def derive(secret: str, purpose: str) -> str:
    """The key for one purpose (`blobs`, `hub`, `activations`, `api`): HMAC-SHA256 of the purpose, as hex."""
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


TOKEN_S = 600
"""How long a token for a blob is good for, by the cluster's clock (`clock.py`); what two processes take for it may
differ by as much again."""


PROBE = "probe"
"""Stands where a blob's name does in the token for a node's `/v1/probe`."""


def blob_token(secret: str, node: str, blob: str, now_s: float) -> dict[str, str]:
    """Headers that let their bearer read one blob of one node for some minutes; none when there is no secret."""
    if not secret:
        return {}
    until_s = int(now_s) + TOKEN_S
    return {"Authorization": f"Shoal {until_s}.{derive(secret, f'blob/{node}/{blob}/{until_s}')}"}


def blob_token_shows(secret: str, node: str, blob: str, headers: Mapping[str, str], now_s: float) -> bool:
    """Whether a request may read this blob of this node now. `headers` must look names up in any case."""
    if not secret:
        return True
    scheme, _, token = (headers.get("authorization") or "").partition(" ")
    until, _, key = token.partition(".")
    if scheme != "Shoal" or not (until.isascii() and until.isdigit() and len(until) <= _UNTIL_DIGITS):
        return False
    if not now_s - TOKEN_S <= int(until) <= now_s + 2 * TOKEN_S:
        return False
    good = derive(secret, f"blob/{node}/{blob}/{int(until)}")
    return hmac.compare_digest(key.encode(errors="replace"), good.encode())


def capability(secret: str, blob: str, until_s: int) -> dict[str, str]:
    """Query fields that show one blob to whoever has the address, up to a time (seconds since 1970).

    For clients that send no credential where a redirection leads them. Empty when there is no secret.
    """
    return {"until": str(until_s), "key": derive(secret, f"blob/{blob}/{until_s}")} if secret else {}


def capable(secret: str, blob: str, query: Mapping[str, str], now_s: float) -> bool:
    """Whether an address shows this blob now."""
    until, key = query.get("until", ""), query.get("key", "")
    if not (secret and until.isascii() and until.isdigit() and len(until) <= _UNTIL_DIGITS and now_s <= int(until)):
        return False
    return hmac.compare_digest(key.encode(errors="replace"), derive(secret, f"blob/{blob}/{int(until)}").encode())
