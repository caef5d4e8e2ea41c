"""Tokens with which a node asks another for one blob, for some minutes, under the secret that the two share (I12).

    Authorization: Shoal <asking node>.<until>.<mac>

A signed URL allows the same to clients that send no credential to the target of a redirect. Outside a cluster, and so
on loopback only, no token is required.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from shoal_common.errors import BadName, Denied
from shoal_common.identity.peer_secrets import PeerSecrets

LIFETIME_S = 600
"""Lifetime of a token by the cluster's clock (`cluster_clock.py`); two processes' clocks may differ by as much
again."""
PROBE_NAME = "probe"
"""Takes the place of a blob's name in the token for a node's `/v1/probe`."""
HEALTH_NAME = "health"
"""The same for `/health`."""
_UNTIL_DIGITS = 12


class PeerTokens:
    """The tokens that a node sends to others, and those that it accepts.

    `serves_peers`: whether other members may read blobs here. Outside a cluster nobody can tell who asks.
    """

    def __init__(self, node: str, secrets: PeerSecrets, serves_peers: bool = True) -> None:
        self._node, self._secrets, self._serves_peers = node, secrets, serves_peers

    @property
    def are_required(self) -> bool:
        """Whether requests need a token."""
        return self._secrets.has_identity

    def token(self, serving: str, blob: str, now_s: float) -> dict[str, str]:
        """Return headers that allow this node to read one blob of a node. Raises Denied if that is no member."""
        secret, until_s = self._secrets.shared_with(serving), int(now_s) + LIFETIME_S
        if not secret:
            return {}
        return {"Authorization": f"Shoal {self._node}.{until_s}.{mac_of(secret, f'blob/{serving}/{blob}/{until_s}')}"}

    def allows(self, blob: str, headers: Mapping[str, str], now_s: float) -> bool:
        """Return whether a request may read this blob here. `headers` must look names up case-insensitively."""
        if not self.are_required:
            return True
        scheme, _, token = (headers.get("authorization") or "").partition(" ")
        asking, _, rest = token.partition(".")
        until, _, mac = rest.partition(".")
        until_s = _seconds(until)
        if scheme != "Shoal" or until_s is None or not now_s - LIFETIME_S <= until_s <= now_s + 2 * LIFETIME_S:
            return False
        is_open = self._serves_peers or asking == self._node or blob == HEALTH_NAME
        return is_open and self._is_signed(asking, f"blob/{self._node}/{blob}/{until_s}", mac)

    def signed_query(self, serving: str, blob: str, until_s: int) -> dict[str, str]:
        """Return query fields with which a URL of a node allows anyone to read one blob until a time.

        Raises Denied if that node is no member.
        """
        secret = self._secrets.shared_with(serving)
        if not secret:
            return {}
        return {"node": self._node, "until": str(until_s), "key": mac_of(secret, f"url/{serving}/{blob}/{until_s}")}

    def query_allows(self, blob: str, query: Mapping[str, str], now_s: float) -> bool:
        """Return whether a URL's query allows reading this blob here."""
        asking, until_s = query.get("node", ""), _seconds(query.get("until", ""))
        if until_s is None or now_s > until_s or not (self._serves_peers or asking == self._node):
            return False
        return self._is_signed(asking, f"url/{self._node}/{blob}/{until_s}", query.get("key", ""))

    def _is_signed(self, asking: str, text: str, mac: str) -> bool:
        try:
            secret = self._secrets.shared_with(asking)
        except (BadName, Denied):
            return False
        return bool(secret) and mac.isascii() and hmac.compare_digest(mac, mac_of(secret, text))


def mac_of(secret: str, text: str) -> str:
    """Return what proves knowledge of a secret to who shares it: HMAC-SHA256 of a text that says for what, as hex."""
    return hmac.digest(secret.encode(), f"shoal/v1/{text}".encode(errors="replace"), "sha256").hex()


def _seconds(until: str) -> int | None:
    return int(until) if until.isascii() and until.isdigit() and len(until) <= _UNTIL_DIGITS else None
