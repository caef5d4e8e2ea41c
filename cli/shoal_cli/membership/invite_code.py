"""The code that lets one node into a cluster: what it proves with, and what it trusts. Pure.

52 characters of base32: 128 bits from which the key of a NATS user is made, and the first 128 bits of the SHA-256 of
the authority's certificate. Whoever answers with another certificate is not the cluster, and learns nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os

import msgspec

from shoal_common.errors import BadInput
from shoal_common.identity.nkey import Nkey

_SECRET_BYTES = 16
FINGERPRINT_BYTES = 16
_GROUP = 4


class InviteCode(msgspec.Struct, frozen=True):
    """An invitation as its two ends know it. A secret."""

    secret: bytes
    fingerprint: bytes
    """Of the authority's certificate, shortened."""

    @property
    def key(self) -> Nkey:
        """The key of the NATS user who may only ask to join."""
        return Nkey(hashlib.sha256(b"shoal/v1/invitation/" + self.secret).digest())

    @property
    def id(self) -> str:
        """The invitation's id: part of subjects, no secret."""
        return invitation_id(self.key.public)

    @property
    def text(self) -> str:
        """The code as a person copies it."""
        text = base64.b32encode(self.secret + self.fingerprint).rstrip(b"=").decode()
        return "-".join(text[i : i + _GROUP] for i in range(0, len(text), _GROUP))


def invitation_id(public_nkey: str) -> str:
    """Return the id of the invitation whose user has this key."""
    return hashlib.sha256(public_nkey.encode()).hexdigest()[:16]


def new_code(authority_fingerprint: bytes) -> InviteCode:
    """Return a new code for the cluster of an authority."""
    return InviteCode(os.urandom(_SECRET_BYTES), authority_fingerprint[:FINGERPRINT_BYTES])


def parse_code(text: str) -> InviteCode:
    """Return a code that was typed: case, spaces and dashes do not matter. Raises BadInput, without its text."""
    plain = "".join(text.split()).replace("-", "").upper()
    try:
        raw = base64.b32decode(plain + "=" * (-len(plain) % 8))
    except (ValueError, binascii.Error):
        raw = b""
    if len(raw) != _SECRET_BYTES + FINGERPRINT_BYTES:
        raise BadInput("this is not an invitation: copy the whole code that `shoal invite` printed, 13 groups of 4")
    return InviteCode(raw[:_SECRET_BYTES], raw[_SECRET_BYTES:])
