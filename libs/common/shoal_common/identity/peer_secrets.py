"""The secret that two nodes share: each computes it from its own key and the other's certificate.

ECDH on P-256 (NIST SP 800-56A), then HKDF-SHA256 (RFC 5869) over both names. Nothing is exchanged, no third node
knows it, and it ends with the membership of one of them: the certificates of members are keys of `spec`.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shoal_common.errors import Denied
from shoal_common.identity.certificates import public_key_of
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.names import check_node
from shoal_common.redaction import remember_secret


class PeerSecrets:
    """What a node shares with each other member, itself included."""

    def __init__(self, identity: NodeIdentity | None, certificate_of: Callable[[str], str | None]) -> None:
        self._identity, self._certificate_of = identity, certificate_of
        self._known: dict[str, tuple[str, str]] = {}

    @property
    def has_identity(self) -> bool:
        """Whether this node belongs to a cluster, and so shares secrets at all."""
        return self._identity is not None

    def shared_with(self, node: str) -> str:
        """Return the secret shared with a node; "" where this node has no cluster.

        Raises Denied for a stranger, BadName for what is no node's name.
        """
        if self._identity is None:
            return ""
        certificate = self._certificate_of(node)
        if certificate is None:
            self._known.pop(node, None)
            raise Denied(f"node {check_node(node)} is not a member of this cluster")
        known = self._known.get(node)
        if known is None or known[0] != certificate:
            known = self._known[node] = (certificate, _agree(self._identity, node, certificate))
        return known[1]


def _agree(identity: NodeIdentity, node: str, certificate: str) -> str:
    agreed = identity.private_key.exchange(ec.ECDH(), public_key_of(certificate, identity.authority, node))
    names = "/".join(sorted((identity.node, node)))
    secret = HKDF(hashes.SHA256(), 32, None, f"shoal/v1/peers/{names}".encode()).derive(agreed).hex()
    remember_secret(secret)
    return secret
