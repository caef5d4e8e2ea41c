"""Seals of leaf lists: who hashed a whole blob signs its sha256, size and leaf list digest (docs/transfer.md).

A seal is the word of its node and no more: whether that word counts is `trust_sealers`, a setting of each node. Nodes
that belong to no cluster have no keys and make no seals.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Container
from typing import Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey

from shoal_common.errors import BadMessage, BadName, Denied
from shoal_common.identity.certificates import public_key_of
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.messages import decode, encode
from shoal_common.messages.manifest import LeafListSeal
from shoal_common.names import check_blob, check_node

CLUSTER: Literal["cluster"] = "cluster"
NONE: Literal["none"] = "none"
SEAL_HEADER = "Shoal-Seal"
"""Header of a leaf list's response."""
MAX_SEAL_BYTES = 1024
_DOMAIN = "shoal/v1/leaf-list-seal"
_ALGORITHM = ECDSA(hashes.SHA256())


class SealedList(msgspec.Struct, frozen=True):
    """What a seal is about: a blob, and the list of its leaves."""

    sha256: str
    size_bytes: int
    leaf_list_digest: str

    def statement(self, node: str, signed_at_s: int) -> bytes:
        """Return the bytes that a node signs. No field has a line break, so no two statements are alike."""
        fields = (check_blob(self.sha256), self.size_bytes, self.leaf_list_digest, check_node(node), signed_at_s)
        return "\n".join((_DOMAIN, *map(str, fields))).encode()


def sign(key: EllipticCurvePrivateKey, node: str, sealed: SealedList, now_s: float) -> LeafListSeal:
    """Return a node's seal."""
    at_s = int(now_s)
    return LeafListSeal(node=node, signed_at_s=at_s, signature=key.sign(sealed.statement(node, at_s), _ALGORITHM))


def is_signed(seal: LeafListSeal, sealed: SealedList, key: EllipticCurvePublicKey) -> bool:
    """Return whether a seal is about this list and by the holder of this key. Raises BadName for an invalid node."""
    try:
        key.verify(seal.signature, sealed.statement(seal.node, seal.signed_at_s), _ALGORITHM)
    except InvalidSignature:
        return False
    return True


def to_text(seal: LeafListSeal) -> str:
    """Return a seal as one line of ASCII, as an HTTP header carries it."""
    return base64.b64encode(encode(seal)).decode()


def from_text(text: str) -> LeafListSeal | None:
    """Return the seal in a line; None if there is none."""
    if not 0 < len(text) <= MAX_SEAL_BYTES:
        return None
    try:
        return decode(base64.b64decode(text, validate=True), LeafListSeal)
    except (BadMessage, ValueError, binascii.Error):
        return None


def trusted_names(setting: str) -> frozenset[str]:
    """Return the nodes that `trust_sealers` names; empty for `cluster` and `none`."""
    names = {part.strip() for part in setting.split(",")}
    return frozenset() if setting in (CLUSTER, NONE) else frozenset(names - {""})


class SealKeeper:
    """Makes this node's seals, and decides whose seals count here.

    `certificate_of(node)`: a member's certificate, None for a stranger. `trust_sealers` and `distrusted` return the
    setting and the nodes that have lied to this one, as they are now.
    """

    def __init__(
        self,
        identity: NodeIdentity | None,
        certificate_of: Callable[[str], str | None],
        trust_sealers: Callable[[], str],
        distrusted: Callable[[], Container[str]],
    ) -> None:
        self._identity, self._certificate_of = identity, certificate_of
        self._trust_sealers, self._distrusted = trust_sealers, distrusted

    @property
    def signs(self) -> bool:
        """Whether this node makes seals: it belongs to a cluster."""
        return self._identity is not None

    def sign(self, sealed: SealedList, now_s: float) -> LeafListSeal | None:
        """Return this node's seal of a blob that it has hashed whole; None without an identity. Blocking: a file."""
        if self._identity is None:
            return None
        return sign(self._identity.private_key, self._identity.node, sealed, now_s)

    def is_own(self, seal: LeafListSeal | None, sealed: SealedList) -> bool:
        """Return whether this node has hashed the blob itself, by its own seal."""
        identity = self._identity
        if identity is None or seal is None or seal.node != identity.node:
            return False
        return is_signed(seal, sealed, identity.private_key.public_key())

    def refusal(self, seal: LeafListSeal | None, sealed: SealedList) -> str:
        """Return why a leaf list is no substitute for hashing the blob here; "" if it is one."""
        setting = self._trust_sealers()
        if self._identity is None:
            # Nobody signs here: the digest is the word of whoever published it.
            return "" if setting == CLUSTER else f"trust_sealers is {setting!r}, and a node of no cluster cannot sign"
        if seal is None:
            return "it has no seal"
        if self.is_own(seal, sealed):
            return ""
        if setting == NONE:
            return "trust_sealers is 'none'"
        if setting != CLUSTER and seal.node not in trusted_names(setting):
            return f"trust_sealers does not name node {seal.node[:63]}"
        if seal.node in self._distrusted():
            return f"node {seal.node} has sealed a corrupt blob before"
        return self._signature_refusal(seal, sealed, self._identity)

    def _signature_refusal(self, seal: LeafListSeal, sealed: SealedList, identity: NodeIdentity) -> str:
        try:
            certificate = self._certificate_of(check_node(seal.node))
            if certificate is None:
                return f"its sealer {seal.node} is not a member of this cluster"
            key = public_key_of(certificate, identity.authority, seal.node)
        except (Denied, BadName) as e:
            return e.message
        return "" if is_signed(seal, sealed, key) else f"the seal of node {seal.node} is not about this blob"
