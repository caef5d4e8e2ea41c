"""A NATS user's key (nkey): an Ed25519 key in NATS's own text form, as `nats --nkey` reads it.

The form (github.com/nats-io/nkeys): base32 without padding of prefix bytes, the key, and a CRC-16/XMODEM of both. The
package `nkeys` would bring a second library of ciphers beside `cryptography`, which certificates need.
"""

from __future__ import annotations

import base64
import binascii
import os
import struct

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shoal_common.errors import BadInput

_SEED, _USER = 18 << 3, 20 << 3
_KEY_BYTES = 32


class Nkey:
    """The private key of one NATS user."""

    def __init__(self, seed: bytes) -> None:
        self._key, self._seed = Ed25519PrivateKey.from_private_bytes(seed), seed

    @classmethod
    def create(cls) -> Nkey:
        """Return a new key."""
        return cls(os.urandom(_KEY_BYTES))

    @classmethod
    def from_text(cls, text: str) -> Nkey:
        """Return the key of a text like `SU…`. Raises BadInput, without the text."""
        raw = _decoded(text)
        if len(raw) != _KEY_BYTES + 2 or raw[0] & 0xF8 != _SEED:
            raise BadInput("this is not the seed of a NATS user: it starts with SU and has 58 characters")
        return cls(raw[2:])

    @property
    def text(self) -> str:
        """The key as text, `SU…`. A secret."""
        return _encoded(bytes([_SEED | _USER >> 5, (_USER & 31) << 3]) + self._seed)

    @property
    def public(self) -> str:
        """The public key as text, `U…`: the user's name in the server's configuration."""
        return _encoded(bytes([_USER]) + self._key.public_key().public_bytes_raw())

    def sign(self, nonce: str) -> bytes:
        """Return the signature of a server's nonce, as the protocol's CONNECT carries it."""
        return base64.urlsafe_b64encode(self._key.sign(nonce.encode())).rstrip(b"=")


def check_public_nkey(text: str) -> str:
    """Return the public key of a NATS user if it is one. Raises BadInput."""
    raw = _decoded(text)
    if len(raw) != _KEY_BYTES + 1 or raw[0] != _USER:
        raise BadInput(f"{text[:80]!r} is not the public key of a NATS user: it starts with U and has 56 characters")
    return text


def is_signed_by(public: str, nonce: str, signature: bytes) -> bool:
    """Return whether the holder of a public key has signed a nonce."""
    key = Ed25519PublicKey.from_public_bytes(_decoded(check_public_nkey(public))[1:])
    try:
        key.verify(base64.urlsafe_b64decode(signature + b"=" * (-len(signature) % 4)), nonce.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def _encoded(raw: bytes) -> str:
    return base64.b32encode(raw + struct.pack("<H", binascii.crc_hqx(raw, 0))).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    """Return prefix and key; empty for what is no nkey."""
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except (ValueError, binascii.Error):
        return b""
    payload, check = raw[:-2], raw[-2:]
    return payload if check == struct.pack("<H", binascii.crc_hqx(payload, 0)) else b""
